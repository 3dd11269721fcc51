// What an instruction set must provide: the products of one tile of weights with one chunk of channels. Who is
// multiplied with what is decided in selection.h and product.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace quicksilver {

constexpr int kMaxBits = 8;
constexpr int kPlanes = 4;         // two bits each, leading bits first
constexpr int kFields = 4;         // outputs that share a byte of a plane
constexpr int kTileOutputs = 256;  // a channel's run in a plane of a tile: one cache line
constexpr int kHalfOutputs = 128;
constexpr int kLaneOutputs = 32;  // outputs that share a coefficient: the smallest group
constexpr int kTileGroups = kTileOutputs / kLaneOutputs;
constexpr int kChunkChannels = 64;                                  // channels whose coefficients share a scale
constexpr int kQuadChannels = 4;                                    // channels that a dot product's word holds
constexpr int kQuadBytes = kQuadChannels * kHalfOutputs / kFields;  // of a plane of half a tile
constexpr int kChunkSlots = kChunkChannels + kMaxBits * kQuadChannels;
constexpr int kRecordBytes = 2 * kTileGroups;

// How planes are laid out. As runs, each channel has its bytes of a strip in a row: long runs where channels differ in
// bits. As quads, four channels' bytes are interleaved as a dot product takes them, and a block's quads follow one
// another, half by half of each tile: read in order where all channels have one number of bits.
enum class Layout { kRuns, kQuads };

// One tile of a matrix: 256 outputs, or 128 at its end, of a block's channels.
struct Tile {
  Layout layout;
  const std::uint8_t* planes[kPlanes];  // see `offset`
  const std::uint8_t* records;          // the first channel's: 8 groups' steps above its base, then their zeros
  std::size_t stride;         // of runs: bytes from channel to channel in planes 0 and 1; in 2 and 3 twice as many
  std::size_t record_stride;  // bytes from channel to channel
  const std::uint8_t* bases;  // [channels] the smallest exponent of each
  int halves;                 // of 128 outputs

  int outputs() const { return halves * kHalfOutputs; }
  const std::uint8_t* record(std::size_t channel) const { return records + channel * record_stride; }

  // The byte of a plane that has an output's two bits. The order of a run is what AVX-512 needs to end with outputs in
  // order: its lanes hold 8 bytes of each half, and 16 outputs' sums lie 4 in each lane.
  std::size_t offset(int plane, std::size_t channel, int output) const {
    const std::size_t half = output / kHalfOutputs, pair = output % kHalfOutputs / (16 * kFields),
                      lane = output / 4 % 4;
    const std::size_t times = plane < 2 ? 1 : 2;
    if (layout == Layout::kRuns) return times * channel * stride + 8 * (halves * lane + half) + 4 * pair + output % 4;
    return times * quad_offset(half, channel / kQuadChannels) + 64 * pair + 16 * lane + 4 * (output % 4) +
           channel % kQuadChannels;
  }

  // Where a quad begins in planes 0 and 1; in 2 and 3 it is twice as far.
  static std::size_t quad_offset(std::size_t half, std::size_t quad) {
    return (half * (kChunkChannels / kQuadChannels) + quad) * kQuadBytes;
  }
};

// Where a byte has an output's two bits, from the lowest bits on: in place `field ^ plane`, so an output's pairs in
// four planes are at four places, and one byte can take them all.
inline int field_of(int output) { return output / 16 % kFields; }

// What prefixes of each number of bits stand for, in units of 8-bit codes: a whole number and an offset.
struct Levels {
  // By nibbles as fields 0 and 2 leave them, and as 1 and 3 do: of 4 bits, with the pairs swapped and in order; of 2
  // bits, where the code is the nibble's lower pair and where it is its upper one.
  alignas(64) std::uint8_t table4[2][16];
  alignas(64) std::uint8_t table2[2][16];
  float offset[kMaxBits + 1];
  float largest;  // scale of exponent 0
  float unit;     // of products of coefficients: largest * kMultiplierUnit
};

// Channels of a chunk that are read at one number of bits: so many slots, a multiple of kQuadChannels.
struct Part {
  int bits;
  int slots;
};

// What a row reads of 64 neighbouring channels, and the activations that they multiply. Slots are filled part after
// part, from the widest on; a part's last slots may repeat a channel times zero.
struct Chunk {
  const std::uint32_t* channels;  // [slots], counted from the block's first
  const std::int16_t* x;          // [slots], in units of `unit`
  float unit;                     // an activation times the scale of its channel's base
  const Part* parts;
  int num_parts;
  int slots;
};

// Room for a chunk's coefficients; each instruction set arranges it as it likes.
struct alignas(64) Coefficients {
  std::int32_t words[kChunkSlots * kTileGroups];
  std::int32_t zero_sums[kTileGroups];
  float offsets[kTileGroups];
  float scale;
};

// What a thread reads after the chunk at hand, fetched meanwhile: of each channel the records and, two lines at a time,
// the runs of a strip in the planes that its bits take.
struct Upcoming {
  const std::uint32_t *channels = nullptr, *end = nullptr;  // still to come
  const Part* part = nullptr;                               // of the channel at hand
  int slots_left = 0;                                       // of that part
  int num_planes = 0;
  const std::uint8_t* planes[kPlanes] = {};  // where channel 0 has its runs
  const std::uint8_t* records = nullptr;
  std::size_t stride = 0, record_stride = 0;  // as a tile has them
  std::size_t run_bytes = 0;
  std::size_t run = 0, line = 0;  // bytes: to the channel's run in plane 0, and how far that is fetched
  std::uint32_t rate = 0;         // steps to take while half a quad is multiplied, in units of 1 / kFetchUnit
  std::uint32_t due = 0;
};

constexpr std::uint32_t kFetchUnit = 1 << 16;
constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kFetchBytes = 2 * kLineBytes;  // of a run in a step

struct Kernels {
  const char* name;
  // Writes the chunk's share of the product to y[0 .. outputs of the tile), those beyond the matrix's outputs included,
  // or adds it to what y holds.
  void (*tile_chunk)(const Tile&, const Chunk&, const Levels&, Coefficients&, bool adds, float* y, Upcoming&);
  FloatKernels floats;
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the build lacks them
const Kernels* avx512_kernels();  // likewise

// 2 ** (-i / 16) for i = 0 .. 15, rounded to float.
extern const float kFractions[16];

// 2 ** (-(i + 1) / 16) for i = 0 .. 15, in units of 2 ** -15, and what that leaves for a chunk's scale.
extern const std::uint16_t kMultipliers[32];  // twice the sixteen
constexpr float kMultiplierUnit = 1.044273782f;

// A coefficient: an activation, times the scale of its channel's base, in a group `steps` above it.
inline std::int32_t coefficient_of(std::int16_t x, int steps) {
  return (x * (kMultipliers[steps & 15] >> (steps >> 4)) + (1 << 14)) >> 15;
}

// The scale of an exponent, in units of the largest.
inline float factor_of(std::uint8_t exponent) {
  std::uint32_t bits;
  std::memcpy(&bits, &kFractions[exponent & 15], sizeof bits);
  bits -= static_cast<std::uint32_t>(exponent >> 4) << 23;
  float factor;
  std::memcpy(&factor, &bits, sizeof factor);
  return factor;
}

constexpr int planes_of(int bits) { return (bits + 1) / 2; }

}  // namespace quicksilver

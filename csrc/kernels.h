// What an instruction set must provide: the products of one tile of nested weights with one chunk of channels.
// Who is multiplied with what is decided in selection.h and product.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace quicksilver {

constexpr int kMaxWidth = 8;
constexpr int kPlanes = 4;         // two bits each, leading bits first
constexpr int kTileOutputs = 256;  // a channel's run in a plane of a tile: one cache line
constexpr int kHalfOutputs = 128;
constexpr int kLaneOutputs = 32;  // outputs that share a coefficient: the smallest group
constexpr int kTileGroups = kTileOutputs / kLaneOutputs;
constexpr int kChunkChannels = 64;  // channels whose coefficients share a scale
constexpr int kRecordBytes = 2 * kTileGroups;
constexpr float kSteps = 127.0f * 256.0f;  // the largest coefficient of a chunk, in integers
constexpr float kSmallest = 1e-34f;        // chunks of smaller coefficients count as zero: kSteps / x must be finite

// One tile of a matrix: 256 outputs of all input channels, or 128 at its end.
struct Tile {
  const std::uint8_t* planes[kPlanes];  // [channels, line]; see place_of
  const std::uint8_t* records;          // [channels, 16]: the groups' exponents, then their zeros
  int line;                             // bytes of one channel in one plane: 32 for each half
  int halves;                           // of 128 outputs

  int outputs() const { return halves * kHalfOutputs; }
};

// Where a plane keeps an output's two bits: bit `bit` of byte `byte` of the channel's run, and of the byte after it.
// Eight outputs' leading bits are a byte, and so are their trailing ones. The order is what AVX-512 needs to end with
// outputs in order: its lanes hold 8 bytes of each half, and 16 outputs' sums lie 4 in each lane.
struct Place {
  int byte, bit;
};

inline Place place_of(int output, int halves) {
  const int half = output / kHalfOutputs, sum = output % kHalfOutputs / 16;
  const int lane = output / 4 % 4, byte_of_lane = 2 * (2 * (sum / 4) + sum % 4 / 2);
  return {8 * (halves * lane + half) + byte_of_lane, 4 * (sum % 2) + output % 4};
}

// What prefixes of each width stand for, in units of 8-bit codes: a whole number and an offset.
struct Levels {
  alignas(64) std::uint8_t table4[16];
  alignas(64) std::uint8_t table2[16];  // the first four repeated
  float offset[kMaxWidth + 1];
  float largest;  // scale of exponent 0
};

// Channels read at one width, and the activations that they multiply.
struct Chunk {
  const std::uint32_t* channels;  // [kChunkChannels], those beyond `count` repeat one that is there
  const float* x;                 // [kChunkChannels], zero beyond `count`
  int count;
  int width;
};

// Room for a chunk's coefficients; each instruction set arranges it as it likes.
struct alignas(64) Coefficients {
  std::int32_t words[2 * kChunkChannels * kTileGroups / 4 * 2];
  float raw[kChunkChannels * kTileGroups];
  std::int32_t zero_sums[kTileGroups];
  float scales[kTileGroups];
  float offsets[kTileGroups];
};

// What will be read after a chunk, to be fetched meanwhile.
struct Upcoming {
  const Tile* tile = nullptr;
  const std::uint32_t* channels = nullptr;
  int count = 0;
  int planes = 0;
};

struct Kernels {
  const char* name;
  // y[0 .. outputs of the tile) += the chunk's share of the product, those beyond the matrix's outputs included.
  void (*tile_chunk)(const Tile&, const Chunk&, const Levels&, Coefficients&, float* y, const Upcoming&);
  // Writes the weights of one channel, [outputs of the tile].
  void (*expand_channel)(const Tile&, const Levels&, std::uint32_t channel, int width, float* weights);
  void (*to_bfloat16)(const float* x, int size, std::uint16_t* y);
  FloatKernels floats;
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the build lacks them
const Kernels* avx512_kernels();  // likewise

// 2 ** (-i / 16) for i = 0 .. 15, rounded to float.
extern const float kFractions[16];

// The scale of an exponent, in units of the largest.
inline float factor_of(std::uint8_t exponent) {
  std::uint32_t bits;
  std::memcpy(&bits, &kFractions[exponent & 15], sizeof bits);
  bits -= static_cast<std::uint32_t>(exponent >> 4) << 23;
  float factor;
  std::memcpy(&factor, &bits, sizeof factor);
  return factor;
}

inline int planes_of(int width) { return (width + 1) / 2; }

}  // namespace quicksilver

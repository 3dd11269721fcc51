// What an instruction set must provide: products of tiles of weights with one group of channels. Who is multiplied with
// what is decided in operand.h and product.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace quicksilver {

constexpr int kMaxBits = 8;
constexpr int kTileOutputs = 64;    // whose codes of a channel lie together, in 32 bytes of four bits
constexpr int kHighBytes = 32;
constexpr int kQuadChannels = 4;    // that a dot product's word holds
constexpr int kHalfChannels = 16;   // whose activations share a scale
constexpr int kGroupChannels = 32;  // whose weights share one, mostly
constexpr int kHalfQuads = kHalfChannels / kQuadChannels;
constexpr int kGroupQuads = kGroupChannels / kQuadChannels;
constexpr int kBlockInputs = 256;  // that share the half-precision scales of scales in two levels
constexpr std::size_t kLineBytes = 64;

// Bits of codes: of the first plane; of the second, four or two of each code; of both, as one number.
enum class Plane { kHigh, kLow, kPairs, kBoth, kBothPairs };
constexpr int kMaxTerms = 5;

// Channels of a group that are read alike, in quads, those of its first half before those of the second; a half's last
// may repeat a channel, times zero.
struct Term {
  Plane plane;
  std::uint8_t mask;  // of the bits that are read
  int shift;          // how many times the codes are to be doubled to be in halves of whole codes
  const std::uint8_t* high;
  const std::uint8_t* low;      // two bits: half as far apart
  std::size_t tile_stride;      // bytes from tile to tile, in the first plane
  bool interleaved;             // a quad's channels lie together, byte by byte
  const std::uint32_t* places;  // [4 * quads] bytes to a channel, or to its quad, in the first plane
  int quads[2];                 // of each half

  int all_quads() const { return quads[0] + quads[1]; }
};

enum class Steps { kHalf, kUnsigned, kSigned };            // half-precision scales; or bytes, times a block's
enum class Offsets { kNone, kHalf, kUnsigned, kZeros };  // likewise; or codes of zero, times the scale

// Where the scales of a group's outputs are.
struct Scales {
  Steps steps_kind;
  Offsets offsets_kind;
  const void* steps;
  const void* offsets;
  const std::uint16_t* block_steps;
  const std::uint16_t* block_offsets;
};

// What one row brings to a group.
struct Share {
  const std::int8_t* words[kMaxTerms];  // [4 * quads] of each term, activations
  std::int32_t begin[2];                // what sums of each half begin with, in halves of codes
  float unit[2];                        // of the sums, but for the weights' scales
  float sum;                            // of the activations read
};

// A run of codes over tiles: where the first tile's lie, and the bytes of two tiles.
struct Run {
  const std::uint8_t* at;
  std::uint32_t bytes;
};

// What is fetched while tiles are multiplied: runs of the same tiles, some tiles ahead, and once these are at their
// end, those that are read next.
struct Ahead {
  struct Runs {
    const Run* begin;
    const Run* end;
    int tiles;
  };
  Runs own{}, next{};
};
constexpr int kTilesAhead = 8;

struct Kernels {
  const char* name;
  bool joins;  // both planes' bits are multiplied as one number
  // Adds rows' products of a group with tiles [first, end) to y, [rows, stride] from the matrix's first output on.
  void (*multiply)(const Term* terms, int num_terms, const Share* shares, int num_rows, const Scales&, int first,
                   int end, float* y, std::size_t stride, const Ahead&);
  FloatKernels floats;
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the build lacks them
const Kernels* avx512_kernels();  // likewise

}  // namespace quicksilver

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
constexpr int kBlockOutputs = 64;
constexpr int kTileBlocks = kTileOutputs / kBlockOutputs;
constexpr int kLaneOutputs = 32;  // outputs that share a coefficient: the smallest group
constexpr int kTileGroups = kTileOutputs / kLaneOutputs;
constexpr int kChunkChannels = 64;  // channels whose coefficients share a scale
constexpr int kRecordBytes = 2 * kTileGroups;
constexpr float kSteps = 127.0f * 256.0f;  // the largest coefficient of a chunk, in integers
constexpr float kSmallest = 1e-34f;        // chunks of smaller coefficients count as zero: kSteps / x must be finite

// One tile of a matrix: up to 256 outputs of all input channels.
struct Tile {
  const std::uint8_t* planes[kPlanes];  // [channels, line]
  const std::uint8_t* records;          // [channels, 16]: the groups' exponents, then their zeros
  int line;                             // bytes of one channel in one plane: 16 for each block
  int blocks;                           // of 64 outputs
};

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

struct Kernels {
  const char* name;
  // y[0 .. 64 * blocks) += the chunk's share of the product, channels beyond the outputs included.
  void (*tile_chunk)(const Tile&, const Chunk&, const Levels&, Coefficients&, float* y);
  // Fetches what tile_chunk will read.
  void (*prefetch)(const Tile&, const Chunk&);
  // Writes the weights of one channel, [64 * blocks].
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

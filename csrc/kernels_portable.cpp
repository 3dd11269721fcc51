// The definition in plain C++, and what runs where no vector unit is known.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "expand.inl"
#include "floats.inl"

namespace quicksilver {

const float kFractions[16] = {1.0f,         0.957603281f, 0.917004043f, 0.878126080f, 0.840896415f, 0.805245166f,
                              0.771105413f, 0.738413073f, 0.707106781f, 0.677127773f, 0.648419777f, 0.620928906f,
                              0.594603558f, 0.569394317f, 0.545253866f, 0.522136891f};

namespace {

// Rounds the chunk's activations times scales to integers of 16 bits, one scale for each group.
void round_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c) {
  for (int g = 0; g < 2 * tile.blocks; ++g) {
    float largest = 0.0f;
    for (int j = 0; j < chunk.count; ++j) {
      const std::uint8_t* record = tile.records + std::size_t{chunk.channels[j]} * kRecordBytes;
      c.raw[j * kTileGroups + g] = chunk.x[j] * factor_of(record[g]);
      largest = std::fmax(largest, std::fabs(c.raw[j * kTileGroups + g]));
    }
    const float inverse = largest > kSmallest ? kSteps / largest : 0.0f;
    std::int32_t zero_sum = 0, sum = 0;
    for (int j = 0; j < chunk.count; ++j) {
      const std::uint8_t* record = tile.records + std::size_t{chunk.channels[j]} * kRecordBytes;
      const auto q = static_cast<std::int32_t>(std::nearbyint(c.raw[j * kTileGroups + g] * inverse));
      c.words[j * kTileGroups + g] = q;
      zero_sum += q * record[kTileGroups + g];
      sum += q;
    }
    c.zero_sums[g] = zero_sum;
    c.scales[g] = largest * (1.0f / kSteps) * levels.largest;
    c.offsets[g] = c.scales[g] * (static_cast<float>(sum) * levels.offset[chunk.width]);
  }
}

int level_of(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, int block, int output) {
  // Output 16 r + 4 k + e of a block lies in byte 4 r + e of its 16, in the k-th pair of bits.
  const int byte = (output >> 4) * 4 + (output & 3), field = (output >> 2) & 3;
  const std::size_t at = std::size_t{channel} * tile.line + 16 * block + byte;
  int code = 0;
  for (int p = 0; p < planes_of(width); ++p) code = code << 2 | ((tile.planes[p][at] >> (2 * field)) & 3);
  code >>= 2 * planes_of(width) - width;
  if (width == 4) return levels.table4[code];
  if (width == 2) return levels.table2[code];
  return code << (kMaxWidth - width);
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y) {
  round_coefficients(tile, chunk, levels, c);
  for (int block = 0; block < tile.blocks; ++block) {
    std::int32_t sums[kBlockOutputs] = {};
    for (int j = 0; j < chunk.count; ++j) {
      for (int o = 0; o < kBlockOutputs; ++o) {
        const int g = 2 * block + o / kLaneOutputs;
        sums[o] += c.words[j * kTileGroups + g] * level_of(tile, levels, chunk.channels[j], chunk.width, block, o);
      }
    }
    for (int o = 0; o < kBlockOutputs; ++o) {
      const int g = 2 * block + o / kLaneOutputs;
      y[block * kBlockOutputs + o] += c.scales[g] * static_cast<float>(sums[o] - c.zero_sums[g]) + c.offsets[g];
    }
  }
}

void prefetch(const Tile&, const Chunk&) {}

const Kernels kPortable = {"portable", tile_chunk, prefetch, expand_channel, to_bfloat16, kFloats};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace quicksilver

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
  for (int g = 0; g < 4 * tile.halves; ++g) {
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

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y,
                const Upcoming&) {
  round_coefficients(tile, chunk, levels, c);
  std::int32_t sums[kTileOutputs] = {};
  std::uint8_t codes[kTileOutputs];
  for (int j = 0; j < chunk.count; ++j) {
    unpack_channel(tile, levels, chunk.channels[j], chunk.width, codes);
    for (int o = 0; o < tile.outputs(); ++o) sums[o] += c.words[j * kTileGroups + o / kLaneOutputs] * codes[o];
  }
  for (int o = 0; o < tile.outputs(); ++o) {
    const int g = o / kLaneOutputs;
    y[o] += c.scales[g] * static_cast<float>(sums[o] - c.zero_sums[g]) + c.offsets[g];
  }
}

const Kernels kPortable = {"portable", tile_chunk, expand_channel, to_bfloat16, kFloats};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace quicksilver

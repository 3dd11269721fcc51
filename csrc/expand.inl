// Included once by each kernels_*.cpp: codes expanded to the weights that they mean, as the package's definition does.
#include "kernels.h"

namespace quicksilver {
namespace {

// Levels of a channel's codes, [outputs], as `bits` bits tell them but for the offset.
[[maybe_unused]] void unpack_channel(const Tile& tile, const Levels& levels, std::uint32_t channel, int bits,
                                     std::uint8_t* codes) {
  const std::uint8_t* table = bits == 4 ? levels.table4[1] : bits == 2 ? levels.table2[0] : nullptr;
  const int outputs = tile.outputs(), dropped = 2 * planes_of(bits) - bits;
  for (int o = 0; o < outputs; ++o) {
    int code = 0;
    for (int p = 0; p < planes_of(bits); ++p) {
      code = code << 2 | (tile.planes[p][tile.offset(p, channel, o)] >> (2 * (field_of(o) ^ p)) & 3);
    }
    code >>= dropped;
    codes[o] = static_cast<std::uint8_t>(table ? table[code] : code << (kMaxBits - bits));
  }
}

// Weights of one input channel, [outputs].
[[maybe_unused]] void expand_channel(const Tile& tile, const Levels& levels, int channel, int bits, float* weights) {
  const std::uint8_t* record = tile.record(channel);
  std::uint8_t codes[kTileOutputs];
  unpack_channel(tile, levels, channel, bits, codes);
  for (int g = 0; g < 4 * tile.halves; ++g) {
    const float scale = levels.largest * factor_of(tile.bases[channel] + record[g]);
    const float zero = static_cast<float>(record[kTileGroups + g]) - levels.offset[bits];
    for (int o = g * kLaneOutputs; o < (g + 1) * kLaneOutputs; ++o) {
      weights[o] = scale * (static_cast<float>(codes[o]) - zero);
    }
  }
}

[[maybe_unused]] void expand_quad(const Tile& tile, const Levels& levels, int first, int count, int bits,
                                  float* weights) {
  for (int j = 0; j < count; ++j) expand_channel(tile, levels, first + j, bits, weights + j * kTileOutputs);
}

}  // namespace
}  // namespace quicksilver

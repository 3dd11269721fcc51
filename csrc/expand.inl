// Included once by each kernels_*.cpp: codes expanded to the weights that they mean, as the package's definition does.
#include "kernels.h"

namespace quicksilver {
namespace {

// Unpacks a block's 64 codes, left-aligned in bytes; byte 16 k + b holds pair k of byte b of each plane.
[[maybe_unused]] inline void unpack_block(const Tile& tile, std::uint32_t channel, int block, int width, std::uint8_t* codes) {
  for (int i = 0; i < kBlockOutputs; ++i) codes[i] = 0;
  for (int p = 0; p < planes_of(width); ++p) {
    const std::uint8_t* run = tile.planes[p] + std::size_t{channel} * tile.line + 16 * block;
    for (int k = 0; k < 4; ++k) {
      for (int b = 0; b < 16; ++b) codes[16 * k + b] |= ((run[b] >> (2 * k)) & 3) << (6 - 2 * p);
    }
  }
  if (width % 2) {
    const auto kept = static_cast<std::uint8_t>(0xff << (kMaxWidth - width));
    for (int i = 0; i < kBlockOutputs; ++i) codes[i] &= kept;
  }
}

// Weights of one input channel, [64 * blocks].
[[maybe_unused]] void expand_channel(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  const std::uint8_t* record = tile.records + std::size_t{channel} * kRecordBytes;
  const std::uint8_t* table = width == 4 ? levels.table4 : width == 2 ? levels.table2 : nullptr;
  for (int block = 0; block < tile.blocks; ++block) {
    std::uint8_t codes[kBlockOutputs];
    unpack_block(tile, channel, block, width, codes);
    if (table) {
      for (std::uint8_t& code : codes) code = table[code >> (kMaxWidth - width)];
    }
    for (int r = 0; r < 4; ++r) {
      const int g = 2 * block + r / 2;
      const float scale = levels.largest * factor_of(record[g]);
      const float zero = static_cast<float>(record[kTileGroups + g]) - levels.offset[width];
      float* out = weights + kBlockOutputs * block + 16 * r;
      for (int k = 0; k < 4; ++k) {
        for (int e = 0; e < 4; ++e) {
          out[4 * k + e] = scale * (static_cast<float>(codes[16 * k + 4 * r + e]) - zero);
        }
      }
    }
  }
}

// Rounds to bfloat16, to nearest and even.
void to_bfloat16(const float* x, int size, std::uint16_t* y) {
  for (int i = 0; i < size; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    y[i] = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

}  // namespace
}  // namespace quicksilver

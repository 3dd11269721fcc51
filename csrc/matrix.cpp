#include "matrix.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace quicksilver {
namespace {

constexpr std::size_t kLine = 64;

std::size_t rounded_up(std::size_t size, std::size_t step) { return (size + step - 1) / step * step; }

int blocks_of(int num_outputs) { return (num_outputs + kBlockOutputs - 1) / kBlockOutputs; }

std::size_t tile_bytes(int num_inputs, int blocks) {
  const std::size_t plane = rounded_up(std::size_t{16} * blocks * num_inputs, kLine);
  return kPlanes * plane + rounded_up(std::size_t{kRecordBytes} * num_inputs, kLine);
}

std::size_t all_bytes(int num_inputs, int num_outputs) {
  const int blocks = blocks_of(num_outputs);
  const int rest = blocks % kTileBlocks;
  return blocks / kTileBlocks * tile_bytes(num_inputs, kTileBlocks) + (rest ? tile_bytes(num_inputs, rest) : 0);
}

// One channel's pairs of bits in one plane, from the stored order to the kernels' (see Unpack).
void pack_run(const std::uint8_t* stored, int first_output, int num_outputs, int blocks, std::uint8_t* run) {
  for (int o = 0; o < blocks * kBlockOutputs && first_output + o < num_outputs; ++o) {
    const int from = first_output + o, inner = o % kBlockOutputs;
    const int bits = (stored[from / 4] >> (2 * (from % 4))) & 3;
    const int byte = (inner >> 4) * 4 + (inner & 3), field = (inner >> 2) & 3;
    run[16 * (o / kBlockOutputs) + byte] |= static_cast<std::uint8_t>(bits << (2 * field));
  }
}

std::uint8_t whole_level(float level) {
  if (!(level >= 0.0f && level <= 255.0f) || level != std::floor(level)) {
    throw std::invalid_argument("a level of its narrow widths is not a whole 8-bit code");
  }
  return static_cast<std::uint8_t>(level);
}

Levels levels_of(const StoredCodes& codes) {
  Levels levels;
  for (int i = 0; i < 16; ++i) {
    levels.table4[i] = whole_level(codes.table4[i]);
    levels.table2[i] = whole_level(codes.table2[i % 4]);
  }
  for (int width = 0; width <= kMaxWidth; ++width) {
    const bool tabled = width == 4 || width == 2;
    levels.offset[width] = tabled ? 0.0f : (std::ldexp(1.0f, kMaxWidth - width) - 1.0f) / 2.0f;
  }
  levels.largest = codes.largest;
  return levels;
}

}  // namespace

AlignedBytes::AlignedBytes(std::size_t size)
    : data_(static_cast<std::uint8_t*>(std::aligned_alloc(kLine, rounded_up(size + kLine, kLine)))), size_(size) {
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, size);
}

void AlignedBytes::Free::operator()(std::uint8_t* p) const { std::free(p); }

NestedMatrix::NestedMatrix(const StoredCodes& codes, int num_inputs, int num_outputs)
    : num_inputs_(num_inputs),
      num_outputs_(num_outputs),
      padded_outputs_(blocks_of(num_outputs) * kBlockOutputs),
      bytes_(all_bytes(num_inputs, num_outputs)),
      levels_(levels_of(codes)) {
  const int groups = (num_outputs + codes.group_size - 1) / codes.group_size;
  const int run = (num_outputs + 3) / 4;
  std::uint8_t* at = bytes_.data();
  for (int first = 0; first < padded_outputs_; first += kTileOutputs) {
    const int blocks = std::min(kTileBlocks, (padded_outputs_ - first) / kBlockOutputs);
    Tile tile{{}, nullptr, 16 * blocks, blocks};
    for (int p = 0; p < kPlanes; ++p) {
      for (int j = 0; j < num_inputs; ++j) {
        pack_run(codes.planes[p] + std::size_t(j) * run, first, num_outputs, blocks, at + std::size_t(j) * tile.line);
      }
      tile.planes[p] = at;
      at += rounded_up(std::size_t(num_inputs) * tile.line, kLine);
    }
    for (int j = 0; j < num_inputs; ++j) {
      for (int g = 0; g < kTileGroups; ++g) {
        const int output = first + g * kLaneOutputs;
        if (output >= num_outputs) continue;
        const std::size_t from = std::size_t(j) * groups + output / codes.group_size;
        at[j * kRecordBytes + g] = codes.exponents[from];
        at[j * kRecordBytes + kTileGroups + g] = codes.zeros[from];
      }
    }
    tile.records = at;
    at += rounded_up(std::size_t{kRecordBytes} * num_inputs, kLine);
    tiles_.push_back(tile);
  }
}

}  // namespace quicksilver

#include "matrix.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace quicksilver {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kLargePage = std::size_t{1} << 21;

std::size_t rounded_up(std::size_t size, std::size_t step) { return (size + step - 1) / step * step; }

int halves_of(int num_outputs) { return (num_outputs + kHalfOutputs - 1) / kHalfOutputs; }

std::size_t tile_bytes(int num_inputs, int halves) {
  const std::size_t plane = rounded_up(std::size_t{32} * halves * num_inputs, kLine);
  return kPlanes * plane + rounded_up(std::size_t{kRecordBytes} * num_inputs, kLine);
}

std::size_t all_bytes(int num_inputs, int num_outputs) {
  const int halves = halves_of(num_outputs);
  return halves / 2 * tile_bytes(num_inputs, 2) + (halves % 2 ? tile_bytes(num_inputs, 1) : 0);
}

// The leading bits of the four codes in a stored byte, and the trailing ones, as nibbles.
struct Nibbles {
  std::uint8_t leading[256], trailing[256];

  Nibbles() {
    for (int byte = 0; byte < 256; ++byte) {
      leading[byte] = trailing[byte] = 0;
      for (int e = 0; e < 4; ++e) {
        leading[byte] |= static_cast<std::uint8_t>(((byte >> (2 * e + 1)) & 1) << e);
        trailing[byte] |= static_cast<std::uint8_t>(((byte >> (2 * e)) & 1) << e);
      }
    }
  }
};

// One channel's pairs of bits in one plane, from the stored order, four codes to a byte, to the kernels'.
void pack_run(const std::uint8_t* stored, int first_output, int num_outputs, int halves, std::uint8_t* run) {
  static const Nibbles nibbles;
  const int held = std::min(halves * kHalfOutputs, num_outputs - first_output);
  for (int o = 0; o < held; o += 4) {
    const std::uint8_t codes = stored[(first_output + o) / 4];
    const Place place = place_of(o, halves);
    run[place.byte] |= static_cast<std::uint8_t>(nibbles.leading[codes] << place.bit);
    run[place.byte + 1] |= static_cast<std::uint8_t>(nibbles.trailing[codes] << place.bit);
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

AlignedBytes::AlignedBytes(std::size_t size) : size_(size) {
  // Where there are many, large pages: weights are streamed, and a page walk every 4 KiB would break the stream.
  const std::size_t alignment = size >= kLargePage ? kLargePage : kLine;
  const std::size_t room = rounded_up(size + kLine, alignment);
  data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(alignment, room)));
  if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kLargePage) madvise(data_.get(), room, MADV_HUGEPAGE);
#endif
  std::memset(data_.get(), 0, size);
}

void AlignedBytes::Free::operator()(std::uint8_t* p) const { std::free(p); }

NestedMatrix::NestedMatrix(const StoredCodes& codes, int num_inputs, int num_outputs)
    : num_inputs_(num_inputs),
      num_outputs_(num_outputs),
      padded_outputs_(halves_of(num_outputs) * kHalfOutputs),
      bytes_(all_bytes(num_inputs, num_outputs)),
      levels_(levels_of(codes)) {
  const int groups = (num_outputs + codes.group_size - 1) / codes.group_size;
  const int run = (num_outputs + 3) / 4;
  std::uint8_t* at = bytes_.data();
  for (int first = 0; first < padded_outputs_; first += kTileOutputs) {
    const int halves = std::min(2, (padded_outputs_ - first) / kHalfOutputs);
    Tile tile{{}, nullptr, 32 * halves, halves};
    for (int p = 0; p < kPlanes; ++p) {
      for (int j = 0; j < num_inputs; ++j) {
        pack_run(codes.planes[p] + std::size_t(j) * run, first, num_outputs, halves, at + std::size_t(j) * tile.line);
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

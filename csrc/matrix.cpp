#include "matrix.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

namespace quicksilver {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kLargePage = std::size_t{1} << 21;
constexpr std::size_t kSlab = 16 * kLargePage;

std::size_t rounded_up(std::size_t size, std::size_t step) { return (size + step - 1) / step * step; }

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kApart = true;  // so that what is read past a matrix's end is noticed
#else
constexpr bool kApart = false;
#endif

std::shared_ptr<std::uint8_t> new_slab(std::size_t needed) {
  const std::size_t alignment = kApart ? kLine : kLargePage, size = rounded_up(needed, alignment);
  std::shared_ptr<std::uint8_t> slab(static_cast<std::uint8_t*>(std::aligned_alloc(alignment, size)), std::free);
  if (!slab) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (!kApart) madvise(slab.get(), size, MADV_HUGEPAGE);
#endif
  return slab;
}

int halves_of(int num_outputs) { return (num_outputs + kHalfOutputs - 1) / kHalfOutputs; }

// Bytes of one channel in a strip of so many halves of tiles. An odd number of cache lines, so that neighbouring
// channels' runs do not compete for the same places of a cache.
std::size_t stride_of(int halves) { return ((halves + 1) / 2 | 1) * kLine; }
std::size_t record_stride_of(int halves) { return std::size_t{kRecordBytes} * ((halves + 1) / 2); }

std::size_t strip_bytes(int num_inputs, int halves) {
  return kPlanes * stride_of(halves) * num_inputs + rounded_up(record_stride_of(halves) * num_inputs, kLine);
}

std::size_t all_bytes(int num_inputs, int num_outputs) {
  const int halves = halves_of(num_outputs), whole = halves / (2 * kStripTiles), rest = halves % (2 * kStripTiles);
  return whole * strip_bytes(num_inputs, 2 * kStripTiles) + (rest ? strip_bytes(num_inputs, rest) : 0);
}

// One channel's pairs of bits in one plane, from the stored order, four neighbours to a byte, to the kernels'.
void pack_run(const std::uint8_t* stored, int plane, int first_output, int num_outputs, int halves, std::uint8_t* run) {
  const int held = std::min(halves * kHalfOutputs, num_outputs - first_output);
  for (int o = 0; o < held; o += 4) {
    const std::uint8_t codes = stored[(first_output + o) / 4];
    const Place place = place_of(o, halves);  // neighbours have the same field of bytes that are neighbours
    for (int e = 0; e < 4; ++e) {
      run[place.byte + e] |= static_cast<std::uint8_t>((codes >> (2 * e) & 3) << (2 * (place.field ^ plane)));
    }
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
  levels.unit = codes.largest * kMultiplierUnit;
  return levels;
}

}  // namespace

SlabBytes::SlabBytes(std::size_t size) : size_(size) {
  const std::size_t room = rounded_up(size, kLine);
  if (room > kSlab || kApart) {
    slab_ = new_slab(room);
    data_ = slab_.get();
  } else {
    static std::mutex mutex;
    static std::weak_ptr<std::uint8_t> current;
    static std::size_t used = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    slab_ = current.lock();
    if (!slab_ || used + room > kSlab) {
      slab_ = new_slab(kSlab);
      current = slab_;
      used = 0;
    }
    data_ = slab_.get() + used;
    used += room;
  }
  std::memset(data_, 0, size);
}

NestedMatrix::NestedMatrix(const StoredCodes& codes, int num_inputs, int num_outputs)
    : num_inputs_(num_inputs),
      num_outputs_(num_outputs),
      padded_outputs_(halves_of(num_outputs) * kHalfOutputs),
      bytes_(all_bytes(num_inputs, num_outputs)),
      levels_(levels_of(codes)) {
  const int halves = halves_of(num_outputs);
  const int groups = (num_outputs + codes.group_size - 1) / codes.group_size;
  for (int j = 0; j < num_inputs; ++j) {
    const std::uint8_t* exponents = codes.exponents + std::size_t(j) * groups;
    bases_.push_back(*std::min_element(exponents, exponents + groups));
    base_scales_.push_back(factor_of(bases_.back()));
  }
  std::uint8_t* at = bytes_.data();
  for (int first = 0; first < halves; first += 2 * kStripTiles) {
    at = add_strip(codes, first, std::min(2 * kStripTiles, halves - first), at);
  }
}

// Lays out a strip of `halves` halves of tiles; returns where it ends.
std::uint8_t* NestedMatrix::add_strip(const StoredCodes& codes, int first_half, int halves, std::uint8_t* at) {
  const std::size_t inputs = num_inputs_, stride = stride_of(halves), record_stride = record_stride_of(halves);
  std::uint8_t* const planes[kPlanes] = {at, at + stride * inputs, at + 2 * stride * inputs,
                                         at + (2 * inputs + 1) * stride};
  std::uint8_t* const records = at + kPlanes * stride * inputs;
  for (int h = 0; h < halves; h += 2) {
    const int first = (first_half + h) * kHalfOutputs;
    Tile tile{{}, records + kRecordBytes * (h / 2), stride, record_stride, bases_.data(), std::min(2, halves - h)};
    for (int p = 0; p < kPlanes; ++p) tile.planes[p] = planes[p] + 32 * h;
    for (int j = 0; j < num_inputs_; ++j) pack_channel(codes, tile, j, first);
    tiles_.push_back(tile);
  }
  return at + strip_bytes(num_inputs_, halves);
}

// Writes a channel's runs and records of a tile, which lie in the matrix's own bytes.
void NestedMatrix::pack_channel(const StoredCodes& codes, const Tile& tile, int channel, int first_output) {
  const int groups = (num_outputs_ + codes.group_size - 1) / codes.group_size, run = (num_outputs_ + 3) / 4;
  for (int p = 0; p < kPlanes; ++p) {
    pack_run(codes.planes[p] + std::size_t(channel) * run, p, first_output, num_outputs_, tile.halves,
             const_cast<std::uint8_t*>(tile.run(p, channel)));
  }
  std::uint8_t* record = const_cast<std::uint8_t*>(tile.record(channel));
  for (int g = 0; g < kTileGroups && first_output + g * kLaneOutputs < num_outputs_; ++g) {
    const std::size_t from = std::size_t(channel) * groups + (first_output + g * kLaneOutputs) / codes.group_size;
    record[g] = static_cast<std::uint8_t>(codes.exponents[from] - bases_[channel]);
    record[kTileGroups + g] = codes.zeros[from];
  }
}

}  // namespace quicksilver

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

constexpr std::size_t kLine = kLineBytes;
constexpr std::size_t kHalfBytes = kHalfOutputs / kFields;
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

// What a strip of so many halves of tiles takes.
struct StripSize {
  std::size_t channel, block;  // bytes of one channel and of a block of channels, in one plane
  std::size_t plane, records;  // bytes of all channels

  StripSize(int num_inputs, int halves, Layout layout) {
    const bool runs = layout == Layout::kRuns;
    const std::size_t inputs = runs ? num_inputs : rounded_up(num_inputs, kChunkChannels);
    // An odd number of cache lines, so that neighbouring channels' runs do not compete for the same places of a cache.
    channel = runs ? ((halves + 1) / 2 | 1) * kLine : halves * kHalfBytes;
    block = channel * kChunkChannels;
    plane = channel * inputs;
    records = rounded_up(std::size_t{kRecordBytes} * ((halves + 1) / 2) * inputs, kLine);
  }

  std::size_t all() const { return kPlanes * plane + records; }
};

std::size_t all_bytes(int num_inputs, int num_outputs, Layout layout) {
  const int halves = halves_of(num_outputs), whole = halves / (2 * kStripTiles), rest = halves % (2 * kStripTiles);
  const StripSize size(num_inputs, 2 * kStripTiles, layout), last(num_inputs, rest, layout);
  return whole * size.all() + (rest ? last.all() : 0);
}

std::uint8_t whole_level(float level) {
  if (!(level >= 0.0f && level <= 255.0f) || level != std::floor(level)) {
    throw std::invalid_argument("a level of fewer bits is not a whole 8-bit code");
  }
  return static_cast<std::uint8_t>(level);
}

Levels levels_of(const StoredCodes& codes) {
  Levels levels;
  for (int i = 0; i < 16; ++i) {
    levels.table4[0][i] = whole_level(codes.table4[i % 4 * 4 + i / 4]);
    levels.table4[1][i] = whole_level(codes.table4[i]);
    levels.table2[0][i] = whole_level(codes.table2[i % 4]);
    levels.table2[1][i] = whole_level(codes.table2[i / 4]);
  }
  for (int bits = 0; bits <= kMaxBits; ++bits) {
    const bool tabled = bits == 4 || bits == 2;
    levels.offset[bits] = tabled ? 0.0f : (std::ldexp(1.0f, kMaxBits - bits) - 1.0f) / 2.0f;
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

AnyPrecisionMatrix::AnyPrecisionMatrix(const StoredCodes& codes, int num_inputs, int num_outputs, Layout layout)
    : num_inputs_(num_inputs),
      num_outputs_(num_outputs),
      padded_outputs_(halves_of(num_outputs) * kHalfOutputs),
      layout_(layout),
      bytes_(all_bytes(num_inputs, num_outputs, layout)),
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
    at = add_strip(codes, std::min(2 * kStripTiles, halves - first), at);
  }
}

// Lays out a strip of `halves` halves of tiles; returns where it ends.
std::uint8_t* AnyPrecisionMatrix::add_strip(const StoredCodes& codes, int halves, std::uint8_t* at) {
  const StripSize size(num_inputs_, halves, layout_);
  const bool runs = layout_ == Layout::kRuns;
  const std::size_t tiles = (halves + 1) / 2;
  const std::uint8_t* const records = at + kPlanes * size.plane;
  for (int h = 0; h < halves; h += 2) {
    const std::size_t to_tile = h * kHalfBytes * (runs ? 1 : kChunkChannels);  // in planes 0 and 1
    Tile tile{layout_, {}, records, size.channel, kRecordBytes, bases_.data(), std::min(2, halves - h)};
    tile.planes[0] = at + to_tile;
    tile.planes[1] = at + size.plane + to_tile;
    tile.planes[2] = at + 2 * size.plane + (runs ? 1 : 2) * to_tile;
    tile.planes[3] = tile.planes[2] + (runs ? size.channel : kQuadBytes);
    tile.records += std::size_t{kRecordBytes} * (h / 2) * (runs ? 1 : kChunkChannels);
    tile.record_stride *= runs ? tiles : 1;
    origins_.push_back({tile, size.block, kRecordBytes * tiles * kChunkChannels});
    for (int j = 0; j < num_inputs_; ++j) pack_channel(codes, num_tiles() - 1, j);
  }
  return at + size.all();
}

// Writes a channel's bits and records of a tile, which lie in the matrix's own bytes.
void AnyPrecisionMatrix::pack_channel(const StoredCodes& codes, int index, int channel) {
  const Tile tile = this->tile(index, channel / kChunkChannels);
  const int first_output = index * kTileOutputs, in_block = channel % kChunkChannels;
  const int groups = (num_outputs_ + codes.group_size - 1) / codes.group_size, run = (num_outputs_ + 3) / 4;
  const int held = std::min(tile.outputs(), num_outputs_ - first_output);
  const int step = layout_ == Layout::kRuns ? 1 : kQuadChannels;  // between four neighbours, which have the same field
  for (int p = 0; p < kPlanes; ++p) {
    const std::uint8_t* stored = codes.planes[p] + std::size_t(channel) * run + first_output / 4;
    for (int o = 0; o < held; o += 4) {
      std::uint8_t* const to = const_cast<std::uint8_t*>(tile.planes[p]) + tile.offset(p, in_block, o);
      for (int e = 0; e < 4; ++e) {
        to[e * step] |= static_cast<std::uint8_t>((stored[o / 4] >> (2 * e) & 3) << (2 * (field_of(o) ^ p)));
      }
    }
  }
  std::uint8_t* record = const_cast<std::uint8_t*>(tile.record(in_block));
  for (int g = 0; g < kTileGroups && first_output + g * kLaneOutputs < num_outputs_; ++g) {
    const std::size_t from = std::size_t(channel) * groups + (first_output + g * kLaneOutputs) / codes.group_size;
    record[g] = static_cast<std::uint8_t>(codes.exponents[from] - bases_[channel]);
    record[kTileGroups + g] = codes.zeros[from];
  }
}

}  // namespace quicksilver

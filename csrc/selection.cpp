#include "selection.h"

#include <algorithm>
#include <cfloat>
#include <numeric>

namespace quicksilver {
namespace {

constexpr int kBlockRoom = kChunkSlots + 32;  // collecting writes past what it finds

// The bits that channels may have, from the most on; returns how many.
int occurring(const BitsChoice& choice, int* found) {
  int count = 0;
  for (int bits = kMaxBits; bits >= 1; --bits) {
    bool may = choice.each != nullptr || (!choice.grades && bits == choice.uniform);
    if (const Grades* grades = choice.grades) {
      const std::uint8_t* end = grades->levels + grades->num_levels;
      may = bits == grades->max_bits || (bits < grades->max_bits && std::find(grades->levels, end, bits) != end);
    }
    if (may) found[count++] = bits;
  }
  return count;
}

}  // namespace

void Selection::prepare(int num_inputs) {
  const std::size_t blocks = blocks_of(num_inputs);
  if (blocks_.size() >= blocks) return;
  blocks_.resize(blocks);
  channels_.resize(blocks * kBlockRoom);
  x_.resize(blocks * kBlockRoom);
}

Chunk Selection::chunk(int block) const {
  const Block& from = blocks_[block];
  const std::size_t first = std::size_t(block) * kBlockRoom;
  return {channels_.data() + first, x_.data() + first, from.unit, from.parts, from.num_parts, from.slots};
}

bool Selection::finite(int num_inputs) const {
  return std::all_of(blocks_.begin(), blocks_.begin() + blocks_of(num_inputs), [](const Block& b) { return b.finite; });
}

BitsCounts Selection::choose(const FloatKernels& floats, const float* x, const float* scales, int num_inputs,
                              const BitsChoice& choice, int begin, int end) {
  BitsCounts counts{};
  int levels[kMaxBits];
  const int num_levels = occurring(choice, levels);
  for (int b = begin; b < end; ++b) {
    const int first = b * kChunkChannels, count = std::min(kChunkChannels, num_inputs - first);
    std::uint8_t graded[kChunkChannels];
    const std::uint8_t* chosen = choice.each ? choice.each + first : nullptr;
    if (choice.grades) {
      floats.grade(x + first, count, *choice.grades, first, graded);
      chosen = graded;
    }
    Block& block = blocks_[b];
    block = {0, 0, {}, 0.0f, floats.largest_magnitude(x + first, count) <= FLT_MAX};
    std::uint32_t* const channels = channels_.data() + std::size_t(b) * kBlockRoom;
    float scaled[kChunkChannels], values[kBlockRoom];
    for (int j = 0; j < count; ++j) scaled[j] = x[first + j] * scales[first + j];
    int left = count;
    for (int i = 0; i < num_levels && left > 0; ++i) {
      const int at = block.slots;
      int held = count;
      if (chosen) {
        held = floats.collect(chosen, scaled, count, levels[i], channels + at, values + at);
      } else {
        std::iota(channels, channels + count, 0u);
        std::copy(scaled, scaled + count, values);
      }
      if (held == 0) continue;
      const int slots = (held + kQuadChannels - 1) / kQuadChannels * kQuadChannels;
      std::fill(channels + at + held, channels + at + slots, channels[at + held - 1]);
      std::fill(values + at + held, values + at + slots, 0.0f);
      block.parts[block.num_parts++] = {levels[i], slots};
      block.slots += slots;
      counts[levels[i]] += held;
      left -= held;
    }
    counts[0] += left;
    if (!block.finite) std::fill(values, values + block.slots, 0.0f);
    block.unit = floats.quantize(values, block.slots, x_.data() + std::size_t(b) * kBlockRoom);
  }
  return counts;
}

}  // namespace quicksilver

#include "operand.h"

#include <algorithm>
#include <cfloat>
#include <numeric>

namespace quicksilver {
namespace {

Level level_of(int bits) { return bits > 6 ? kAll8 : bits > 4 ? kTop6 : bits > 2 ? kTop4 : kTop2; }

std::uint32_t first_channels(int count) { return count == 32 ? ~0u : (1u << count) - 1; }

}  // namespace

void Operand::prepare(int num_inputs) {
  const std::size_t groups = groups_of(num_inputs);
  if (groups_.size() >= groups) return;
  groups_.resize(groups);
  codes_.resize(groups * kGroupChannels);
}

bool Operand::finite(int num_inputs) const {
  return std::all_of(groups_.begin(), groups_.begin() + groups_of(num_inputs), [](const Group& g) { return g.finite; });
}

BitsCounts Operand::choose(const FloatKernels& floats, const float* x, int num_inputs, const BitsChoice& choice,
                           int begin, int end) {
  BitsCounts counts{};
  for (int g = begin; g < end; ++g) {
    const int first = g * kGroupChannels, count = std::min(kGroupChannels, num_inputs - first);
    Group& group = groups_[g];
    group = {{}, {}, {}, floats.largest_magnitude(x + first, count) <= FLT_MAX};
    float values[kGroupChannels] = {};
    const bool by_channel = choice.each || choice.grades;
    if (group.finite && (by_channel || choice.uniform)) std::copy_n(x + first, count, values);
    if (by_channel) {
      std::uint8_t graded[kGroupChannels];
      const std::uint8_t* each = choice.each ? choice.each + first : graded;
      if (choice.grades) floats.grade(x + first, count, *choice.grades, first, graded);
      for (int j = 0; j < count; ++j) {
        ++counts[each[j]];
        if (each[j]) group.read[level_of(each[j])] |= 1u << j;
        values[j] = each[j] ? values[j] : 0.0f;
      }
    } else {
      counts[choice.uniform] += count;
      if (choice.uniform) group.read[level_of(choice.uniform)] = first_channels(count);
    }
    std::int8_t* const codes = codes_.data() + std::size_t(first);
    for (int half : {0, 1}) {
      std::int8_t* const first_code = codes + kHalfChannels * half;
      group.units[half] = floats.quantize(values + kHalfChannels * half, kHalfChannels, first_code);
      group.sums[half] = static_cast<std::int16_t>(std::accumulate(first_code, first_code + kHalfChannels, 0));
    }
  }
  return counts;
}

}  // namespace quicksilver

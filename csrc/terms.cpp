#include "terms.h"

#include <algorithm>

namespace quicksilver {
namespace {

constexpr unsigned at(Level level) { return 1u << level; }

// The channels of a row's group that are read at any of some levels.
std::uint32_t read_at(const Operand::Group& group, unsigned levels) {
  std::uint32_t found = 0;
  for (int level = 0; level < kLevels; ++level) found |= levels >> level & 1 ? group.read[level] : 0;
  return found;
}

// All channels of the quads that have any of these.
std::uint32_t whole_quads(std::uint32_t channels) {
  channels |= channels >> 1 & 0x77777777u;
  channels |= channels >> 2 & 0x33333333u;
  return (channels & 0x11111111u) * 15;
}

std::int32_t sum_of(const std::int8_t* codes, std::uint32_t which) {
  std::int32_t sum = 0;
  for (; which; which &= which - 1) sum += codes[__builtin_ctz(which)];
  return sum;
}

// What of the kept channels' codes lies below the middle of the cells that they are read as, in halves of codes.
std::int32_t below_middle(int bits, const Operand::Group& group, const std::int8_t* codes, std::uint32_t within) {
  std::int32_t sum = 0;
  const int kept_bits[kLevels] = {8, 6, 4, 2};
  for (int level = kTop6; level < kLevels; ++level) {
    const int dropped = bits - kept_bits[level];
    if (dropped > 0 && group.read[level]) sum += ((1 << dropped) - 1) * sum_of(codes, group.read[level] & within);
  }
  return sum;
}

}  // namespace

void GroupTerms::reserve(int num_rows) {
  if (shares_.size() >= std::size_t(num_rows)) return;
  shares_.resize(num_rows);
  words_.resize(std::size_t(kMaxTerms) * num_rows * kGroupChannels);
}

void GroupTerms::build(const Kernels& kernels, const Matrix& matrix, const Operand* rows, int num_rows, int channel,
                       int count) {
  num_terms_ = 0;
  scales_ = matrix.scales_at(channel);
  levels_ = 0;
  for (int r = 0; r < num_rows; ++r) {
    const Operand::Group& group = rows[r].group(channel / kGroupChannels);
    for (int level = 0; level < kLevels; ++level) levels_ |= unsigned{group.read[level] != 0} << level;
  }
  const auto add = [&](Plane plane, int mask, int shift, unsigned levels) {
    add_term(matrix, rows, num_rows, channel, count, plane, static_cast<std::uint8_t>(mask), shift, levels);
  };
  if (matrix.bits == 8) {
    if (kernels.joins) add(Plane::kBoth, 255, 1, at(kAll8));
    add(Plane::kHigh, 15, 5, at(kTop6) | at(kTop4) | (kernels.joins ? 0 : at(kAll8)));
    if (!kernels.joins) add(Plane::kLow, 15, 1, at(kAll8));
    add(Plane::kLow, 12, 1, at(kTop6));
    add(Plane::kHigh, 12, 5, at(kTop2));
  } else if (matrix.bits == 6) {
    const unsigned all = at(kAll8) | at(kTop6);
    if (kernels.joins) add(Plane::kBothPairs, 63, 1, all);
    add(Plane::kHigh, 15, 3, at(kTop4) | (kernels.joins ? 0 : all));
    if (!kernels.joins) add(Plane::kPairs, 3, 1, all);
    add(Plane::kHigh, 12, 3, at(kTop2));
  } else {
    add(Plane::kHigh, 15, 1, at(kAll8) | at(kTop6) | at(kTop4));
    add(Plane::kHigh, 12, 1, at(kTop2));
  }
  if (num_terms_) begin_shares(matrix, rows, num_rows, channel, count);
}

void GroupTerms::add_term(const Matrix& matrix, const Operand* rows, int num_rows, int channel, int count, Plane plane,
                          std::uint8_t mask, int shift, unsigned levels) {
  if (!(levels & levels_)) return;
  const int index = channel / kGroupChannels, first = channel % kGroupChannels;
  const std::uint32_t within = (count == 32 ? ~0u : (1u << count) - 1) << first;
  std::uint32_t any = 0;
  for (int r = 0; r < num_rows; ++r) any |= read_at(rows[r].group(index), levels);
  any &= within;
  if (!any) return;
  if (matrix.interleaved()) any = whole_quads(any) & within;
  const int t = num_terms_++;
  const bool whole = __builtin_popcount(any) >= count - kQuadChannels / 2;  // few would be left out
  Term& term = terms_[t];
  term = {plane, mask, shift, matrix.high, matrix.low, matrix.tile_stride(), matrix.interleaved(),
          matrix.places.data() + channel, {}};
  std::uint8_t slots[kGroupChannels];  // which channel is in which place of the quads; 255: none
  if (!whole) term.places = places_[t];
  int at = 0;
  for (int half : {0, 1}) {
    std::uint32_t left = (whole ? within : any) & (half ? 0xffff0000u : 0xffffu);
    const int begin = at;
    for (; left; left &= left - 1) slots[at++] = static_cast<std::uint8_t>(__builtin_ctz(left));
    term.quads[half] = (at - begin + kQuadChannels - 1) / kQuadChannels;
    for (const int end = begin + term.quads[half] * kQuadChannels; at < end; ++at) slots[at] = 255;
    for (int i = begin; !whole && i < at; ++i) {
      const int filled = slots[i] == 255 ? i - i % kQuadChannels : i;
      places_[t][i] = matrix.places[index * kGroupChannels + slots[filled]];
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    const Operand::Group& group = rows[r].group(index);
    const std::int8_t* codes = rows[r].codes(index);
    const std::uint32_t own = read_at(group, levels);
    if (whole && (group.kept() & within & ~own) == 0) {  // those left out are zero
      shares_[r].words[t] = codes + first;
      continue;
    }
    std::int8_t* const words = words_.data() + (std::size_t(t) * num_rows + r) * kGroupChannels;
    shares_[r].words[t] = words;
    for (int i = 0; i < at; ++i) words[i] = slots[i] != 255 && own >> slots[i] & 1 ? codes[slots[i]] : 0;
  }
}

void GroupTerms::begin_shares(const Matrix& matrix, const Operand* rows, int num_rows, int channel, int count) {
  const int index = channel / kGroupChannels, first = channel % kGroupChannels;
  const std::uint32_t within = (count == 32 ? ~0u : (1u << count) - 1) << first;
  // A zero is a code, and so in units of the scale.
  const float factor = matrix.scales.offsets_kind == Offsets::kZeros ? matrix.factor : 1.0f;
  for (int r = 0; r < num_rows; ++r) {
    const Operand::Group& group = rows[r].group(index);
    const std::int8_t* codes = rows[r].codes(index);
    Share& share = shares_[r];
    share.sum = 0.0f;
    for (int half : {0, 1}) {
      const std::uint32_t of_half = within & (half ? 0xffff0000u : 0xffffu);
      const int sum = of_half ? group.sums[half] : 0;
      share.begin[half] = below_middle(matrix.bits, group, codes, of_half) - 2 * matrix.zero * sum;
      share.unit[half] = of_half ? group.units[half] * 0.5f * matrix.factor : 0.0f;
      share.sum += group.units[half] * static_cast<float>(sum);
    }
    share.sum *= factor;
  }
}

}  // namespace quicksilver

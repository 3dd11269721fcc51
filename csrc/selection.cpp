#include "selection.h"

#include <algorithm>
#include <numeric>

namespace quicksilver {
namespace {

bool all_finite(const float* x, int count) {
  float sum = 0.0f;
  for (int j = 0; j < count; ++j) sum += x[j] * 0.0f;
  return sum == 0.0f;
}

bool occurs(const Grades& grades, int width) {
  if (width == grades.cap) return true;
  return width < grades.cap && std::find(grades.levels, grades.levels + grades.num_levels, width) !=
                                   grades.levels + grades.num_levels;
}

}  // namespace

Chunk Selection::chunk(int index) const {
  const Span& span = chunks_[index];
  return {channels_.data() + span.begin, x_.data() + span.begin, span.count, span.width};
}

// Cuts the channels [begin, end), all of one width, into chunks; the last is filled up with a channel times zero.
// Returns where the next may begin.
int Selection::close(int width, int begin, int end) {
  counts_[width] += end - begin;
  if (width == 0 || begin == end) return begin;
  for (int at = begin; at < end; at += kChunkChannels) {
    const int count = std::min(kChunkChannels, end - at);
    chunks_.push_back({at, count, width});
    costs_.push_back(costs_.back() + count * (planes_of(width) + 1L));
  }
  const int next = begin + (end - begin + kChunkChannels - 1) / kChunkChannels * kChunkChannels;
  std::fill(channels_.begin() + end, channels_.begin() + next, channels_[end - 1]);
  std::fill(x_.begin() + end, x_.begin() + next, 0.0f);
  return next;
}

void Selection::choose_uniform(const float* x, int num_inputs, int width) {
  if (width) {
    std::iota(channels_.begin(), channels_.begin() + num_inputs, 0u);
    std::copy(x, x + num_inputs, x_.begin());
  }
  close(width, 0, num_inputs);
}

void Selection::choose(const FloatKernels& floats, const float* x, int num_inputs, const Widths& widths) {
  chunks_.clear();
  costs_.assign(1, 0);
  counts_.fill(0);
  finite_ = all_finite(x, num_inputs);
  const std::size_t room = std::size_t(num_inputs) + (kMaxWidth + 2) * kChunkChannels;
  if (channels_.size() < room) {
    channels_.resize(room);
    x_.resize(room);
    widths_.resize(room);
  }
  if (!widths.each && !widths.grades) return choose_uniform(x, num_inputs, widths.uniform);
  const std::uint8_t* chosen = widths.each;
  if (!chosen) {
    floats.grade(x, num_inputs, *widths.grades, widths_.data());
    chosen = widths_.data();
  }
  int begin = 0, found = 0;
  for (int width = kMaxWidth; width >= 1 && found < num_inputs; --width) {
    if (widths.grades && !occurs(*widths.grades, width)) continue;
    const int count = floats.collect(chosen, x, num_inputs, width, channels_.data() + begin, x_.data() + begin);
    begin = close(width, begin, begin + count);
    found += count;
  }
  counts_[0] = num_inputs - found;
}

}  // namespace quicksilver

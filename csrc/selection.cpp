#include "selection.h"

#include <algorithm>
#include <cmath>

namespace quicksilver {
namespace {

int graded(const Widths& widths, float score) {
  int level = 0;
  while (level < widths.num_levels - 1 && !(score >= widths.thresholds[level])) ++level;
  return widths.levels[level];
}

int width_of(const Widths& widths, const float* x, int j) {
  if (widths.each) return std::min<int>(widths.each[j], kMaxWidth);
  if (!widths.thresholds) return widths.uniform;
  const float magnitude = std::fabs(x[j]);
  return std::min(widths.cap, graded(widths, widths.norms ? magnitude * widths.norms[j] : magnitude));
}

bool all_finite(const float* x, int count) {
  float sum = 0.0f;
  for (int j = 0; j < count; ++j) sum += x[j] * 0.0f;
  return sum == 0.0f;
}

}  // namespace

Chunk Selection::chunk(int index) const {
  const Span& span = chunks_[index];
  return {channels_.data() + span.begin, x_.data() + span.begin, span.count, span.width};
}

// Cuts the channels [begin, end), all of one width, into chunks; the last is filled up with a channel times zero.
void Selection::close(int width, int begin, int end) {
  counts_[width] += end - begin;
  if (width == 0) return;
  for (int at = begin; at < end; at += kChunkChannels) {
    const int count = std::min(kChunkChannels, end - at);
    chunks_.push_back({at, count, width});
    costs_.push_back(costs_.back() + count * (planes_of(width) + 1L));
  }
}

void Selection::choose(const float* x, int num_inputs, const Widths& widths) {
  chunks_.clear();
  costs_.assign(1, 0);
  counts_.fill(0);
  finite_ = all_finite(x, num_inputs);
  const std::size_t room = std::size_t(num_inputs) + (kMaxWidth + 1) * kChunkChannels;
  channels_.resize(room);
  x_.resize(room);
  if (!widths.each && !widths.thresholds) {
    if (widths.uniform) {
      for (int j = 0; j < num_inputs; ++j) channels_[j] = j;
      std::copy(x, x + num_inputs, x_.begin());
    }
    std::fill(channels_.begin() + num_inputs, channels_.end(), num_inputs - 1);
    std::fill(x_.begin() + num_inputs, x_.end(), 0.0f);
    close(widths.uniform, 0, num_inputs);
    return;
  }
  std::array<int, kMaxWidth + 1> sizes{};
  std::vector<std::uint8_t>& chosen = widths_;
  chosen.resize(num_inputs);
  for (int j = 0; j < num_inputs; ++j) ++sizes[chosen[j] = static_cast<std::uint8_t>(width_of(widths, x, j))];
  std::array<int, kMaxWidth + 1> next{};
  int begin = 0;
  for (int width = kMaxWidth; width >= 1; --width) {
    next[width] = begin;
    begin += (sizes[width] + kChunkChannels - 1) / kChunkChannels * kChunkChannels;
  }
  const std::array<int, kMaxWidth + 1> first = next;
  for (int j = 0; j < num_inputs; ++j) {
    const int width = chosen[j];
    if (width == 0) continue;
    channels_[next[width]] = j;
    x_[next[width]++] = x[j];
  }
  for (int width = kMaxWidth; width >= 1; --width) {
    const int end = first[width] + sizes[width];
    for (int at = end; at % kChunkChannels; ++at) {
      channels_[at] = channels_[end - 1];
      x_[at] = 0.0f;
    }
    if (sizes[width]) close(width, first[width], end);
  }
  close(0, 0, sizes[0]);
}

}  // namespace quicksilver

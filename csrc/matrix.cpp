#include "matrix.h"

#include <algorithm>

namespace quicksilver {
namespace {

const void* moved(const void* from, std::size_t bytes) {
  return from ? static_cast<const std::uint8_t*>(from) + bytes : nullptr;
}

}  // namespace

void Matrix::find_places() {
  places.resize(std::size_t(num_groups()) * kGroupChannels);
  for (int i = 0; i < static_cast<int>(places.size()); ++i) {
    const int within = std::min(i, num_inputs - 1);
    const int channel = interleaved() ? within - within % kQuadChannels : within;
    places[i] = static_cast<std::uint32_t>(channel / unit * unit_stride + channel % unit * std::size_t(kHighBytes));
  }
}

Scales Matrix::scales_at(int channel) const {
  const std::size_t group = channel / group_size * scale_stride, block = channel / kBlockInputs * scale_stride;
  Scales found = scales;
  found.steps = moved(scales.steps, group * (scales.steps_kind == Steps::kHalf ? 2 : 1));
  found.offsets = moved(scales.offsets, group * (scales.offsets_kind == Offsets::kHalf ? 2 : 1));
  if (found.block_steps) found.block_steps += block;
  if (found.block_offsets) found.block_offsets += block;
  return found;
}

}  // namespace quicksilver

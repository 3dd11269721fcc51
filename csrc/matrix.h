// A matrix of codes as the package keeps it (see weights/planes.py and weights/codes.py): nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quicksilver {

struct Matrix {
  int num_inputs = 0, num_outputs = 0;
  int bits = 0;        // 4, 6 or 8 of each code
  int group_size = 0;  // inputs that share a scale: 16, 32, 64 or 128
  int unit = 0;        // channels whose codes lie together
  const std::uint8_t* high = nullptr;
  const std::uint8_t* low = nullptr;
  std::size_t unit_stride = 0;  // bytes from unit to unit, in the first plane
  Scales scales{};              // of the first group
  std::size_t scale_stride = 0;  // outputs from group to group, and from block to block
  int zero = 0;                  // the code of zero, where there are no offsets
  float factor = 1.0f;           // of all scales

  // Bytes to each channel, or to its quad, in the first plane; the last one's, repeated, fills its group.
  std::vector<std::uint32_t> places;

  // To be called once all else is set.
  void find_places();

  int num_tiles() const { return (num_outputs + kTileOutputs - 1) / kTileOutputs; }
  int padded_outputs() const { return num_tiles() * kTileOutputs; }
  int num_groups() const { return (num_inputs + kGroupChannels - 1) / kGroupChannels; }
  bool interleaved() const { return unit >= kQuadChannels; }
  std::size_t tile_stride() const { return std::size_t(unit) * kHighBytes; }
  Scales scales_at(int channel) const;
};

}  // namespace quicksilver

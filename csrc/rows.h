// Rows of floats, and fitted maps of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "decoder.h"
#include "floats.h"

namespace quicksilver {

// Rows of floats at a stride, in memory that is kept.
struct Grid {
  std::vector<float> values;
  int stride = 0;

  void resize(int rows, int columns) {
    stride = columns;
    if (values.size() < std::size_t(rows) * columns) values.resize(std::size_t(rows) * columns);
  }
  float* row(int index) { return values.data() + std::size_t(index) * stride; }
};

// Applies a fitted map to a row of `size` floats.
inline void apply(const FloatKernels& floats, const AffineMap& map, const float* x, int size, std::vector<float>& room,
                  float* y) {
  std::copy(map.bias, map.bias + size, y);
  if (!map.down) return floats.add_rows(x, size, map.up, size, size, y);
  room.assign(map.rank, 0.0f);
  floats.add_rows(x, size, map.down, map.rank, map.rank, room.data());
  floats.add_rows(room.data(), map.rank, map.up, size, size, y);
}

}  // namespace quicksilver

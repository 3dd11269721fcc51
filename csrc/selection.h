// Which channels of a row are read at which width, as chunks for the kernels. A pure function of a row and its widths.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// How a row's widths are told.
struct Widths {
  int uniform = kMaxWidth;             // for every channel, where nothing below is given
  const std::uint8_t* each = nullptr;  // [in], one for each channel
  const Grades* grades = nullptr;      // by the channels' scores
};

// One row's chunks. Filled anew for every row; its memory is kept.
class Selection {
 public:
  void choose(const FloatKernels& floats, const float* x, int num_inputs, const Widths& widths);

  int num_chunks() const { return static_cast<int>(chunks_.size()); }
  Chunk chunk(int index) const;
  // Bytes of codes and scales that chunks before `index` read of a tile, in units that make chunks comparable.
  long cost_before(int index) const { return costs_[index]; }
  long cost() const { return costs_.back(); }
  // A row with a NaN or an infinity has no product.
  bool finite() const { return finite_; }
  // Channels read at 0, 1, ... 8 bits.
  const std::array<std::int64_t, kMaxWidth + 1>& counts() const { return counts_; }

 private:
  struct Span {
    int begin, count, width;
  };
  void choose_uniform(const float* x, int num_inputs, int width);
  int close(int width, int begin, int end);

  std::vector<std::uint32_t> channels_;
  std::vector<float> x_;
  std::vector<std::uint8_t> widths_;
  std::vector<Span> chunks_;
  std::vector<long> costs_;
  std::array<std::int64_t, kMaxWidth + 1> counts_;
  bool finite_ = true;
};

}  // namespace quicksilver

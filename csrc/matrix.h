// A matrix in nested codes, laid out for the kernels: tiles of 256 outputs, in each the planes, in each the channels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// Bytes that begin at a cache line; zeroed.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t size);
  std::uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::uint8_t* p) const;
  };
  std::unique_ptr<std::uint8_t[], Free> data_;
  std::size_t size_;
};

// Codes as the package keeps them (see quant/planes.py and quant/codes.py).
struct StoredCodes {
  const std::uint8_t* planes[kPlanes];  // [in, ceil(out / 4)], the first code of a byte in its lowest bits
  const std::uint8_t* exponents;        // [in, groups]
  const std::uint8_t* zeros;            // [in, groups]
  int group_size;                       // 32, 64 or 128
  float largest;
  const float* table4;  // [16] whole numbers from 0 to 255
  const float* table2;  // [4]
};

class NestedMatrix {
 public:
  // Throws std::invalid_argument where a level of a table is no code.
  NestedMatrix(const StoredCodes& codes, int num_inputs, int num_outputs);

  int num_inputs() const { return num_inputs_; }
  int num_outputs() const { return num_outputs_; }
  int num_tiles() const { return static_cast<int>(tiles_.size()); }
  int padded_outputs() const { return padded_outputs_; }  // a multiple of 128
  std::size_t nbytes() const { return bytes_.size(); }
  const Tile& tile(int index) const { return tiles_[index]; }
  const Levels& levels() const { return levels_; }

 private:
  int num_inputs_, num_outputs_, padded_outputs_;
  AlignedBytes bytes_;
  std::vector<Tile> tiles_;
  Levels levels_;
};

}  // namespace quicksilver

// A matrix of codes, laid out for the kernels: strips of up to 16 tiles, in each the planes; the last two,
// mostly read together, have a channel's runs, or a quad's bytes, side by side. Memory gives long runs faster, and what
// is read in order fastest.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// Bytes that begin at a cache line; zeroed. Matrices share large pages: weights are streamed, and a page walk every
// 4 KiB would break the stream. A slab of 32 MiB goes when no matrix in it is left.
class SlabBytes {
 public:
  explicit SlabBytes(std::size_t size);
  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::shared_ptr<std::uint8_t> slab_;
  std::uint8_t* data_;
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

constexpr int kStripTiles = 16;

class AnyPrecisionMatrix {
 public:
  // Throws std::invalid_argument where a level of a table is no code.
  AnyPrecisionMatrix(const StoredCodes& codes, int num_inputs, int num_outputs, Layout layout);
  AnyPrecisionMatrix(AnyPrecisionMatrix&&) = default;  // no copy: tiles point to what the matrix holds

  int num_inputs() const { return num_inputs_; }
  int num_outputs() const { return num_outputs_; }
  int num_strips() const { return (num_tiles() + kStripTiles - 1) / kStripTiles; }
  int padded_outputs() const { return padded_outputs_; }  // a multiple of 128
  int strip_outputs(int strip) const {
    return std::min(kStripTiles * kTileOutputs, padded_outputs_ - strip * kStripTiles * kTileOutputs);
  }
  std::size_t nbytes() const { return bytes_.size(); }
  int num_tiles() const { return static_cast<int>(origins_.size()); }
  Tile tile(int index, int block) const {
    const Origin& origin = origins_[index];
    Tile tile = origin.first;
    for (int p = 0; p < kPlanes; ++p) tile.planes[p] += block * origin.block_stride * (p < 2 ? 1 : 2);
    tile.records += block * origin.block_record_stride;
    tile.bases += block * kChunkChannels;
    return tile;
  }
  Layout layout() const { return layout_; }
  const Levels& levels() const { return levels_; }
  // [in] what activations are multiplied with before they are rounded.
  const float* base_scales() const { return base_scales_.data(); }

 private:
  struct Origin {
    Tile first;                                     // of the first block
    std::size_t block_stride, block_record_stride;  // bytes from block to block; as in Tile
  };

  std::uint8_t* add_strip(const StoredCodes& codes, int halves, std::uint8_t* at);
  void pack_channel(const StoredCodes& codes, int tile, int channel);

  int num_inputs_, num_outputs_, padded_outputs_;
  Layout layout_;
  SlabBytes bytes_;
  std::vector<std::uint8_t> bases_;  // [in] smallest exponents
  std::vector<float> base_scales_;   // [in] theirs, in units of the largest scale
  std::vector<Origin> origins_;      // [tiles]
  Levels levels_;
};

}  // namespace quicksilver

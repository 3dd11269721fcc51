// Which channels of a row are read at how many bits, as chunks for the kernels. A pure function of a row and its bits.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// How a row's bits are told.
struct BitsChoice {
  int uniform = kMaxBits;             // for every channel, where nothing below is given
  const std::uint8_t* each = nullptr;  // [in], one for each channel
  const Grades* grades = nullptr;      // by the channels' scores
};

using BitsCounts = std::array<std::int64_t, kMaxBits + 1>;  // channels read at 0, 1, ... 8 bits

// One row's chunks, one for each block of 64 neighbouring channels, which may be empty. Filled anew for every row; its
// memory is kept.
class Selection {
 public:
  static int blocks_of(int num_inputs) { return (num_inputs + kChunkChannels - 1) / kChunkChannels; }

  // Makes room; to be called by one thread.
  void prepare(int num_inputs);

  // Fills blocks [begin, end) of a row x, [in]. Threads may fill others meanwhile.
  // `scales`, [in], multiply the activations before they are rounded.
  BitsCounts choose(const FloatKernels& floats, const float* x, const float* scales, int num_inputs,
                     const BitsChoice& bits, int begin, int end);

  Chunk chunk(int block) const;
  // A row with a NaN or an infinity has no product.
  bool finite(int num_inputs) const;

 private:
  struct Block {
    int slots, num_parts;
    Part parts[kMaxBits];
    float unit;
    bool finite;
  };

  std::vector<Block> blocks_;
  std::vector<std::uint32_t> channels_;  // [blocks, kBlockRoom]
  std::vector<std::int16_t> x_;          // likewise
};

}  // namespace quicksilver

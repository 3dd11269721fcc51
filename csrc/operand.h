// A row as products take it: activations in 8 bits, and at how many bits each channel's weights are read. A pure
// function of the row and its bits, so that it depends on no other row.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// How a row's bits are told.
struct BitsChoice {
  int uniform = kMaxBits;              // for every channel, where nothing below is given
  const std::uint8_t* each = nullptr;  // [in], one for each channel
  const Grades* grades = nullptr;      // by the channels' scores
};

using BitsCounts = std::array<std::int64_t, kMaxBits + 1>;  // channels read at 0, 1, ... 8 bits

// The bits that weights may be read at.
enum Level { kAll8, kTop6, kTop4, kTop2, kLevels };

class Operand {
 public:
  struct Group {
    std::uint32_t read[kLevels];  // which of 32 channels are read at each level
    float units[2];               // of the activations of each half
    std::int16_t sums[2];         // of them, in those units
    bool finite;

    std::uint32_t kept() const { return read[kAll8] | read[kTop6] | read[kTop4] | read[kTop2]; }
  };

  static int groups_of(int num_inputs) { return (num_inputs + kGroupChannels - 1) / kGroupChannels; }

  // Makes room; to be called by one thread.
  void prepare(int num_inputs);

  // Fills groups [begin, end) of a row x, [in]. Threads may fill others meanwhile.
  BitsCounts choose(const FloatKernels& floats, const float* x, int num_inputs, const BitsChoice& bits, int begin,
                    int end);

  const Group& group(int index) const { return groups_[index]; }
  // [32] of a group; zero where a channel is left out.
  const std::int8_t* codes(int group) const { return codes_.data() + std::size_t(group) * kGroupChannels; }
  // A row with a NaN or an infinity has no product.
  bool finite(int num_inputs) const;

 private:
  std::vector<Group> groups_;
  std::vector<std::int8_t> codes_;
};

}  // namespace quicksilver

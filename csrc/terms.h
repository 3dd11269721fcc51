// What kernels are told of one group of channels: which codes meet which activations, for a few rows at once.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "operand.h"

namespace quicksilver {

// Of some rows; its memory is kept from group to group.
class GroupTerms {
 public:
  void reserve(int num_rows);

  // Channels [channel, channel + count) share a scale; they lie in one group of 32.
  void build(const Kernels& kernels, const Matrix& matrix, const Operand* rows, int num_rows, int channel, int count);

  bool empty() const { return num_terms_ == 0; }
  int num_terms() const { return num_terms_; }
  const Term* terms() const { return terms_; }
  const Share* shares() const { return shares_.data(); }
  const Scales& scales() const { return scales_; }

 private:
  void add_term(const Matrix& matrix, const Operand* rows, int num_rows, int channel, int count, Plane plane,
                std::uint8_t mask, int shift, unsigned levels);
  void begin_shares(const Matrix& matrix, const Operand* rows, int num_rows, int channel, int count);

  Term terms_[kMaxTerms];
  int num_terms_ = 0;
  Scales scales_{};
  std::vector<Share> shares_;
  std::vector<std::int8_t> words_;  // [terms, rows, 32], where not all of a group's activations are wanted
  unsigned levels_ = 0;             // that any row reads any of the channels at
  std::uint32_t places_[kMaxTerms][kGroupChannels];
};

}  // namespace quicksilver

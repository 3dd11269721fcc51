// Operations on float32 rows that every instruction set is compiled for: floats.inl, one source for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quicksilver {

struct Norm {
  const float* weight;
  const float* bias;  // null: root mean square; else LayerNorm
  float epsilon;
};

enum class Activation { kSilu, kGeluTanh };

// How keys and values are kept; int8 codes have a scale for each group of a vector's dimensions.
enum class Kept { kFloats, kBfloat16, kCodes };

// Dimensions of either half of a vector that share a scale: a rotation turns pairs of one of each.
constexpr int kPairs = 16;

constexpr int scales_of(int head_dim) { return ((head_dim + 1) / 2 + kPairs - 1) / kPairs; }

constexpr std::size_t bytes_of(Kept kept) { return kept == Kept::kFloats ? 4 : kept == Kept::kBfloat16 ? 2 : 1; }

// One K/V head's entries of one sequence in one layer: vector i lies `i * stride` elements, its scale
// `i * scale_stride` floats on.
struct Entries {
  Kept kept;
  const void* keys;
  const void* values;
  const float* key_scales;  // of codes, else null
  const float* value_scales;
  const std::int32_t* masses;  // tokens that each entry stands for; null where each stands for one
  std::int64_t stride, scale_stride;
};

// Keys or values that come next, at the strides of the entries at hand, and their scales, null where there are none.
struct RowsAhead {
  const void* rows;
  const float* scales;
};

constexpr int kTileEntries = 16;    // that become floats together
constexpr int kBlockEntries = 128;  // of which partial results are kept: [0, 128), [128, 256), ... of a sequence
constexpr int kPartialExtra = 16;   // floats of a head's partial result after its values: the largest score, the total

// Of vectors as they are worked on, in whole registers.
constexpr int padded(int size) { return (size + 15) / 16 * 16; }

// Floats of partial results, and of the rooms that `attend_block` and `attend_in_two_steps` need.
constexpr std::size_t partial_floats(int heads, int size) {
  return std::size_t(heads) * (padded(size) + kPartialExtra);
}
constexpr std::size_t block_room(int heads, int size) {
  return std::size_t(heads) * (padded(size) + kBlockEntries) + std::size_t(kTileEntries) * padded(size);
}
constexpr std::size_t two_steps_room(int size, int entries) {
  return std::size_t(3 + kTileEntries) * padded(size) + padded(entries);
}

// What a head leaves out; see ops/skipping.py.
struct Attention {
  float scaling;
  float skip_below;           // keys and values weighed below this / count; 0: none
  float estimate_dims_above;  // components of the first step, in multiples of a query's root mean square
  float softcap;              // scores s are softcap * tanh(s / softcap); 0: as they are
};

// Of a head.
struct Skipped {
  std::int64_t values, scores, scored_twice;

  void operator+=(const Skipped& other) {
    values += other.values;
    scores += other.scores;
    scored_twice += other.scored_twice;
  }
};

// Thresholds, descending, between bits: the first whose threshold a score |x| * norm reaches, else the last.
struct Grades {
  const float* thresholds;     // [num_levels - 1]
  const std::uint8_t* levels;  // [num_levels]
  int num_levels;
  const float* norms;  // [size]; null where |x| alone is the score
  int max_bits;             // no number of bits is larger
};

struct FloatKernels {
  void (*norm)(const float* x, int size, const Norm&, float* y);
  // Rotates heads [count, size] in place; halves are paired. cos and sin: [size].
  void (*rotate)(float* heads, int count, int size, const float* cos, const float* sin);
  // Attends from queries [heads, size] that share a K/V head to entries [begin, end) of a block; see `block_room`.
  // The keys of the block that comes next are fetched meanwhile.
  void (*attend_block)(const float* queries, int heads, int size, const Entries&, const Attention&, int begin, int end,
                       const RowsAhead& ahead, float* room, float* partial);
  // Adds a block's partial results to those of the blocks before it; gives what all blocks' come to.
  void (*join_blocks)(int heads, int size, const float* next, float* partial);
  void (*finish_blocks)(int heads, int size, const float* partial, float* out);
  // Attends from one head's query, in the steps of ops/skipping.py; `kept` has room for all entries.
  Skipped (*attend_in_two_steps)(const float* query, int size, const Entries&, const Attention&, int begin, int end,
                                 float* room, std::int32_t* kept, float* out);
  // Codes [size] and the scales of a vector that is kept in 8 bits.
  void (*encode)(const float* x, int size, std::int8_t* codes, float* scales);
  void (*to_bfloat16)(const float* x, int size, std::uint16_t* y);  // to nearest and even
  // gate = activation(gate) * up, or activation(gate) where up is null.
  void (*activate)(Activation, float* gate, const float* up, int size);
  // `first`: where x lies in what the grades' norms are of.
  void (*grade)(const float* x, int size, const Grades&, int first, std::uint8_t* bits);
  float (*largest_magnitude)(const float* x, int size);  // not finite where one of them is not
  // Rounds finite activations to integers of 8 bits, the largest to 127; returns their unit.
  float (*quantize)(const float* x, int size, std::int8_t* codes);
  float (*dot)(const float* a, const float* b, int size);
  // y[0 .. outputs) += sum over inputs of x[i] * weight[i * stride ..]
  void (*add_rows)(const float* x, int inputs, const float* weight, std::int64_t stride, int outputs, float* y);
};

}  // namespace quicksilver

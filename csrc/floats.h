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

// How keys and values are kept; int8 codes have a scale for each vector.
enum class Kept { kFloats, kBfloat16, kCodes };

constexpr std::size_t bytes_of(Kept kept) { return kept == Kept::kFloats ? 4 : kept == Kept::kBfloat16 ? 2 : 1; }

// One K/V head's entries of one sequence in one layer: vector i lies `i * stride` elements, its scale
// `i * scale_stride` floats on.
struct Entries {
  Kept kept;
  const void* keys;
  const void* values;
  const float* key_scales;  // of codes
  const float* value_scales;
  const std::int32_t* masses;  // tokens that each entry stands for; null where each stands for one
  std::int64_t stride, scale_stride;
  int count;
};

// What a head leaves out; see ops/skipping.py.
struct Attention {
  float scaling;
  float skip_below;           // keys and values weighed below this / count; 0: none
  float estimate_dims_above;  // components of the first step, in multiples of a query's root mean square
  float softcap;              // scores s are softcap * tanh(s / softcap); 0: as they are
};

// Of the heads attended from.
struct Skipped {
  std::int64_t values, scores, scored_twice;
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
  // Attends from `group` queries [group, size] that share a K/V head. Room for count + size floats.
  Skipped (*attend)(const float* queries, int group, int size, const Entries&, const Attention&, float* room, float* out);
  // Codes [size] and the scale of a vector that is kept in 8 bits.
  float (*encode)(const float* x, int size, std::int8_t* codes);
  void (*to_bfloat16)(const float* x, int size, std::uint16_t* y);  // to nearest and even
  // gate = activation(gate) * up, or activation(gate) where up is null.
  void (*activate)(Activation, float* gate, const float* up, int size);
  // `first`: where x lies in what the grades' norms are of.
  void (*grade)(const float* x, int size, const Grades&, int first, std::uint8_t* bits);
  // Writes the channels read at some bits and their values; returns how many. Room for 16 more is needed.
  int (*collect)(const std::uint8_t* each, const float* x, int size, int bits, std::uint32_t* channels,
                 float* values);
  float (*largest_magnitude)(const float* x, int size);  // not finite where one of them is not
  // Rounds finite activations to integers of 16 bits, the largest to 127 * 256; returns their unit.
  float (*quantize)(const float* x, int size, std::int16_t* codes);
  float (*dot)(const float* a, const float* b, int size);
  // y[0 .. outputs) += sum over inputs of x[i] * weight[i * stride ..]
  void (*add_rows)(const float* x, int inputs, const float* weight, std::int64_t stride, int outputs, float* y);
};

}  // namespace quicksilver

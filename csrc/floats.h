// Operations on float32 rows that every instruction set is compiled for: floats.inl, one source for all.
#pragma once

#include <cstdint>

namespace quicksilver {

struct Norm {
  const float* weight;
  const float* bias;  // null: root mean square; else LayerNorm
  float epsilon;
};

enum class Activation { kSilu, kGeluTanh };

// One K/V head's entries of one sequence in one layer: entry i at keys + i * stride.
struct Entries {
  const float* keys;
  const float* values;
  const std::int32_t* masses;  // tokens that each entry stands for; null where each stands for one
  std::int64_t stride;
  int count;
};

// What a head leaves out (see AttentionConfig): values weighed below skip_below / count.
struct Attention {
  float scaling;
  float skip_below;
};

struct FloatKernels {
  void (*norm)(const float* x, int size, const Norm&, float* y);
  // Rotates heads [count, size] in place; halves are paired. cos and sin: [size].
  void (*rotate)(float* heads, int count, int size, const float* cos, const float* sin);
  // Sets to zero what is small against the root mean square of [size]; returns how many components.
  int (*drop_small)(float* query, int size, float below);
  // Attends from `group` queries [group, size] that share a K/V head. Room for group * count floats.
  // Returns how many of their values were not read.
  std::int64_t (*attend)(const float* queries, int group, int size, const Entries&, const Attention&, float* room,
                         float* out);
  // gate = activation(gate) * up, or activation(gate) where up is null.
  void (*activate)(Activation, float* gate, const float* up, int size);
  float (*dot)(const float* a, const float* b, int size);
  // y[0 .. outputs) += sum over inputs of x[i] * weight[i * stride ..]
  void (*add_rows)(const float* x, int inputs, const float* weight, std::int64_t stride, int outputs, float* y);
};

}  // namespace quicksilver

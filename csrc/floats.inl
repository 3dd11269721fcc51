// Included once by each kernels_*.cpp, compiled for its instruction set. Sums have a fixed order, 16 lanes and then a
// tree, and nothing is contracted, so that all give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "functions.inl"

namespace quicksilver {
namespace {

constexpr int kLanes = 16;

// Vectors of the compiler's, in as many registers as the instruction set needs; loaded from anywhere.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

inline Lanes load(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

// The first `count` values, then zeros.
inline Lanes load_some(const float* x, int count) {
  float values[kLanes] = {};
  std::copy_n(x, count, values);
  return load(values);
}

inline float tree_sum(const Lanes& x) {
  Eight eight[2];
  std::memcpy(eight, &x, sizeof eight);
  const Eight half = eight[0] + eight[1];
  Four four[2];
  std::memcpy(four, &half, sizeof four);
  const Four quarter = four[0] + four[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

float dot(const float* a, const float* b, int size) {
  Lanes lanes = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) lanes += load(a + i) * load(b + i);
  if (i < size) lanes += load_some(a + i, size - i) * load_some(b + i, size - i);
  return tree_sum(lanes);
}

float sum(const float* a, int size) {
  Lanes lanes = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) lanes += load(a + i);
  if (i < size) lanes += load_some(a + i, size - i);
  return tree_sum(lanes);
}

void norm(const float* x, int size, const Norm& norm, float* y) {
  if (norm.bias == nullptr) {
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + norm.epsilon);
    for (int i = 0; i < size; ++i) y[i] = norm.weight[i] * (x[i] * scale);
    return;
  }
  const float mean = sum(x, size) / static_cast<float>(size);
  for (int i = 0; i < size; ++i) y[i] = x[i] - mean;
  const float scale = 1.0f / std::sqrt(dot(y, y, size) / static_cast<float>(size) + norm.epsilon);
  for (int i = 0; i < size; ++i) y[i] = (y[i] * scale) * norm.weight[i] + norm.bias[i];
}

void rotate(float* heads, int count, int size, const float* cos, const float* sin) {
  const int half = size / 2;
  for (int h = 0; h < count; ++h) {
    float *first = heads + h * size, *second = first + half;
    for (int i = 0; i < half; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a * cos[i] - b * sin[i];
      second[i] = b * cos[half + i] + a * sin[half + i];
    }
  }
}

float root_mean_square(const float* x, int size) { return std::sqrt(dot(x, x, size) / static_cast<float>(size)); }

// Codes of a vector, and the scale of each group: what is largest in it is 127.
void encode(const float* x, int size, std::int8_t* codes, float* scales) {
  const int half = (size + 1) / 2;
  for (int g = 0; g < scales_of(size); ++g) {
    const int first = g * kPairs, end = std::min(first + kPairs, half);
    float largest = 0.0f;
    const auto each = [&](auto f) {
      for (int d = first; d < end; ++d) f(d);
      for (int d = half + first; d < std::min(half + end, size); ++d) f(d);
    };
    each([&](int d) { largest = std::fabs(x[d]) > largest || x[d] != x[d] ? std::fabs(x[d]) : largest; });
    const float scale = largest / 127.0f;
    each([&](int d) {
      const float level = scale > 0.0f && scale < INFINITY ? std::nearbyint(x[d] / scale) : 0.0f;
      codes[d] = static_cast<std::int8_t>(std::min(std::max(level, -127.0f), 127.0f));
    });
    scales[g] = scale;
  }
}

// To nearest and even; what is not a number stays so.
void to_bfloat16(const float* x, int size, std::uint16_t* y) {
  for (int i = 0; i < size; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    y[i] = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

void activate(Activation activation, float* gate, const float* up, int size) {
  if (activation == Activation::kSilu) {
    for (int i = 0; i < size; ++i) gate[i] = gate[i] * logistic(gate[i]);
  } else {  // 1 + tanh(u) = 2 logistic(2 u)
    for (int i = 0; i < size; ++i) {
      const float x = gate[i];
      gate[i] = x * logistic(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
    }
  }
  if (up) {
    for (int i = 0; i < size; ++i) gate[i] *= up[i];
  }
}

void add_rows(const float* x, int inputs, const float* weight, std::int64_t stride, int outputs, float* y) {
  for (int i = 0; i < inputs; ++i) {
    const float* row = weight + i * stride;
    const float factor = x[i];
    for (int o = 0; o < outputs; ++o) y[o] += factor * row[o];
  }
}

void grade(const float* x, int size, const Grades& grades, int first, std::uint8_t* bits) {
  constexpr int kBlock = 64;
  const int last = grades.levels[grades.num_levels - 1];
  for (int begin = 0; begin < size; begin += kBlock) {
    const int count = std::min(kBlock, size - begin);
    const float* norms = grades.norms ? grades.norms + first + begin : nullptr;
    float scores[kBlock];
    std::int32_t chosen[kBlock];
    for (int j = 0; j < count; ++j) {
      scores[j] = std::fabs(x[begin + j]) * (norms ? norms[j] : 1.0f);
      chosen[j] = last;
    }
    for (int i = 0; i + 1 < grades.num_levels; ++i) {
      const float limit = grades.thresholds[i];
      const std::int32_t step = grades.levels[i] - grades.levels[i + 1];
      for (int j = 0; j < count; ++j) chosen[j] += scores[j] >= limit ? step : 0;
    }
    for (int j = 0; j < count; ++j) bits[begin + j] = static_cast<std::uint8_t>(std::min(chosen[j], grades.max_bits));
  }
}

// The largest magnitude; not finite where one of them is not. As integers, magnitudes have the order of floats.
float largest_magnitude(const float* x, int size) {
  std::int32_t largest = 0;
  for (int j = 0; j < size; ++j) {
    std::int32_t bits;
    std::memcpy(&bits, x + j, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

float quantize(const float* x, int size, std::int8_t* codes) {
  constexpr float kSmallest = 1e-34f;  // smaller ones count as zero: 127 / x must be finite
  const float largest = largest_magnitude(x, size);
  const float inverse = largest > kSmallest ? 127.0f / largest : 0.0f;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2 ** 23: sums with it are whole numbers, rounded to even
  for (int j = 0; j < size; ++j) {
    const float level = x[j] * inverse + kWhole - kWhole;
    codes[j] = static_cast<std::int8_t>(std::min(std::max(level, -127.0f), 127.0f));
  }
  return largest > kSmallest ? largest * (1.0f / 127.0f) : 0.0f;
}

}  // namespace
}  // namespace quicksilver

#include "attention.inl"

namespace quicksilver {
namespace {

constexpr FloatKernels kFloats = {
    norm,   rotate,      attend_block, join_blocks, finish_blocks, attend_in_two_steps, encode, to_bfloat16,
    activate, grade, largest_magnitude, quantize, dot, add_rows};

}  // namespace
}  // namespace quicksilver

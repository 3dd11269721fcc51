// Included once by each kernels_*.cpp, compiled for its instruction set. Sums have a fixed order, 16 lanes and then a
// tree, and nothing is contracted, so that all give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace quicksilver {
namespace {

constexpr int kLanes = 16;

inline float tree_sum(float* lanes) {
  for (int step = kLanes / 2; step; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

float dot(const float* a, const float* b, int size) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < size; ++l) lanes[l] += a[i + l] * b[i + l];
  return tree_sum(lanes);
}

float sum(const float* a, int size) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l];
  }
  for (int l = 0; i + l < size; ++l) lanes[l] += a[i + l];
  return tree_sum(lanes);
}

// exp by reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial (Cephes' expf); 0 below -87.
inline float exponential(float x) {
  const float bounded = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2 ** 23 rounds to a whole number
  const float whole = shifted - 12582912.0f;
  const float r = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = (p * r) * r + r + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &fraction, sizeof bits);
  bits += static_cast<std::int32_t>(whole) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return x < -87.0f ? 0.0f : (x == x ? value : x);
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

int drop_small(float* query, int size, float below) {
  const float limit = below * std::sqrt(dot(query, query, size) / static_cast<float>(size));
  int dropped = 0;
  for (int i = 0; i < size; ++i) {
    const bool small = std::fabs(query[i]) < limit;
    dropped += small;
    query[i] = small ? 0.0f : query[i];
  }
  return dropped;
}

// Turns scores [count] into weights that are not normalised; returns their sum. `largest` is the largest score.
float exponentials(float* scores, int count, float largest) {
  for (int i = 0; i < count; ++i) scores[i] = exponential(scores[i] - largest);
  return sum(scores, count);
}

// Sets weights to zero that, normalised, lie below skip_below / count and below the largest; returns how many are 0.
std::int64_t drop_light(float* weights, int count, float total, float skip_below) {
  const float largest = 1.0f / total;  // the largest weight is 1 before it is normalised
  const float limit = std::min(skip_below / static_cast<float>(count), largest);
  std::int64_t dropped = 0;
  for (int i = 0; i < count; ++i) {
    const float weight = weights[i] / total;
    weights[i] = weight < limit ? 0.0f : weights[i];
    dropped += weights[i] == 0.0f;
  }
  return dropped;
}

inline void weigh(const Entries& entries, const float* weights, int size, float total, float* out) {
  for (int d = 0; d < size; ++d) out[d] = 0.0f;
  for (int i = 0; i < entries.count; ++i) {
    const float weight = weights[i];
    if (weight == 0.0f) continue;
    const float* value = entries.values + i * entries.stride;
    for (int d = 0; d < size; ++d) out[d] += weight * value[d];
  }
  for (int d = 0; d < size; ++d) out[d] /= total;
}

std::int64_t attend(const float* queries, int group, int size, const Entries& entries, const Attention& attention,
                    float* room, float* out) {
  const int count = entries.count;
  float largest[64];
  for (int g = 0; g < group; ++g) largest[g] = -INFINITY;
  for (int i = 0; i < count; ++i) {
    const float* key = entries.keys + i * entries.stride;
    const float bias = entries.masses ? std::log(static_cast<float>(entries.masses[i])) : 0.0f;
    for (int g = 0; g < group; ++g) {
      const float score = dot(queries + g * size, key, size) * attention.scaling + bias;
      room[std::size_t(g) * count + i] = score;
      largest[g] = score > largest[g] || score != score ? score : largest[g];
    }
  }
  std::int64_t skipped = 0;
  for (int g = 0; g < group; ++g) {
    float* weights = room + std::size_t(g) * count;
    float total = exponentials(weights, count, largest[g]);
    if (attention.skip_below > 0.0f) {
      skipped += drop_light(weights, count, total, attention.skip_below);
      total = sum(weights, count);
    }
    weigh(entries, weights, size, total, out + g * size);
  }
  return skipped;
}

inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

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

constexpr FloatKernels kFloats = {norm, rotate, drop_small, attend, activate, dot, add_rows};

}  // namespace
}  // namespace quicksilver

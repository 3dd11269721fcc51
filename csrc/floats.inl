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
typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));

struct Bfloat16 {
  std::uint16_t bits;
};

inline float value_of(float x) { return x; }
inline float value_of(std::int8_t x) { return static_cast<float>(x); }
inline float value_of(Bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Lanes load(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

inline Lanes load(const std::int8_t* x) {
  Bytes bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return __builtin_convertvector(bytes, Lanes);
}

inline Lanes load(const Bfloat16* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

// The first `count` values, then zeros.
template <typename T>
inline Lanes load_some(const T* x, int count) {
  float values[kLanes] = {};
  for (int l = 0; l < count; ++l) values[l] = value_of(x[l]);
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

template <typename T>
inline float product(const float* a, const T* b, int size) {
  Lanes lanes = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) lanes += load(a + i) * load(b + i);
  if (i < size) lanes += load_some(a + i, size - i) * load_some(b + i, size - i);
  return tree_sum(lanes);
}

float dot(const float* a, const float* b, int size) { return product(a, b, size); }

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

float encode(const float* x, int size, std::int8_t* codes) {
  float largest = 0.0f;
  for (int i = 0; i < size; ++i) largest = std::fabs(x[i]) > largest || x[i] != x[i] ? std::fabs(x[i]) : largest;
  const float scale = largest / 127.0f;
  for (int i = 0; i < size; ++i) {
    const float level = scale > 0.0f && scale < INFINITY ? std::nearbyint(x[i] / scale) : 0.0f;
    codes[i] = static_cast<std::int8_t>(std::min(std::max(level, -127.0f), 127.0f));
  }
  return scale;
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

// Entries as they are kept: their elements, and what those are multiplied with.
template <typename T>
struct Plain {
  static const T* at(const void* base, std::int64_t offset) { return static_cast<const T*>(base) + offset; }
  static float scale(const float*, std::int64_t) { return 1.0f; }
};

struct Codes {
  static const std::int8_t* at(const void* base, std::int64_t offset) {
    return static_cast<const std::int8_t*>(base) + offset;
  }
  static float scale(const float* scales, std::int64_t offset) { return scales[offset]; }
};

// Fetches what is read after key i: its value, and the key of the next head, which lies beside it.
template <typename Kept>
inline void fetch_entry(const Entries& entries, int size, int i) {
  const auto* value = Kept::at(entries.values, i * entries.stride);
  const auto* key = Kept::at(entries.keys, i * entries.stride) + size;
  const int step = static_cast<int>(64 / sizeof *value);
  for (int d = 0; d < size; d += step) {
    __builtin_prefetch(value + d, 0, 2);
    __builtin_prefetch(key + d, 0, 2);
  }
}

// The score of key i.
template <typename Kept>
float score(const float* query, int size, const Entries& entries, const Attention& attention, int i) {
  const float scale = Kept::scale(entries.key_scales, i * entries.scale_stride);
  const float of_key = product(query, Kept::at(entries.keys, i * entries.stride), size) * scale;
  float found = of_key * attention.scaling;
  if (attention.softcap > 0.0f) found = hyperbolic_tangent(found / attention.softcap) * attention.softcap;
  return found + (entries.masses ? std::log(static_cast<float>(entries.masses[i])) : 0.0f);
}

float largest_of(const float* scores, int count) {
  float largest = -INFINITY;
  for (int i = 0; i < count; ++i) largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
  return largest;
}

// Makes weights of scores, in units of the largest; returns their sum.
float soften(float* scores, int count) {
  const float largest = largest_of(scores, count);
  for (int i = 0; i < count; ++i) scores[i] = exponential(scores[i] - largest);
  return sum(scores, count);
}

// Sets weights to zero that, normalised, lie below `limit` and below the largest.
void drop_light(float* weights, int count, float total, float limit) {
  const float least = std::min(limit, 1.0f / total);  // the largest weight is 1 before it is normalised
  for (int i = 0; i < count; ++i) weights[i] = weights[i] / total < least ? 0.0f : weights[i];
}

// Adds weight * value over the entries that weigh something; returns how many do.
template <typename Kept>
int weigh(const Entries& entries, const float* weights, int size, float total, float* out) {
  int read = 0;
  for (int i = 0; i < entries.count; ++i) read += weights[i] != 0.0f;
  constexpr int kBlock = 4 * kLanes;  // of the sums that registers hold
  int begin = 0;
  for (; begin + kBlock <= size; begin += kBlock) {
    Lanes sums[4] = {};
    for (int i = 0; i < entries.count; ++i) {
      if (weights[i] == 0.0f) continue;
      const auto* value = Kept::at(entries.values, i * entries.stride) + begin;
      const float weight = weights[i] * Kept::scale(entries.value_scales, i * entries.scale_stride);
      for (int k = 0; k < 4; ++k) sums[k] += weight * load(value + k * kLanes);
    }
    std::memcpy(out + begin, sums, sizeof sums);
  }
  for (int d = begin; d < size; ++d) out[d] = 0.0f;
  for (int i = 0; i < entries.count && begin < size; ++i) {
    if (weights[i] == 0.0f) continue;
    const auto* value = Kept::at(entries.values, i * entries.stride);
    const float weight = weights[i] * Kept::scale(entries.value_scales, i * entries.scale_stride);
    for (int d = begin; d < size; ++d) out[d] += weight * value_of(value[d]);
  }
  for (int d = 0; d < size; ++d) out[d] /= total;
  return read;
}

// Scores in two steps: with the large components first, then with all for the keys that weigh enough by these.
template <typename Kept>
void score_in_two_steps(const float* query, int size, const Entries& entries, const Attention& attention, float* scores,
                        float* large, Skipped& skipped) {
  const int count = entries.count;
  const float limit = attention.estimate_dims_above * root_mean_square(query, size);
  int later = 0;
  for (int d = 0; d < size; ++d) {
    const bool small = std::fabs(query[d]) < limit;
    large[d] = small ? 0.0f : query[d];
    later += small;
  }
  for (int i = 0; i < count; ++i) scores[i] = score<Kept>(large, size, entries, attention, i);
  const float total = soften(scores, count);
  drop_light(scores, count, total, attention.skip_below / static_cast<float>(count));
  int left = 0;
  for (int i = 0; i < count; ++i) {
    const bool out = scores[i] == 0.0f;
    left += !out;
    scores[i] = out ? -INFINITY : score<Kept>(query, size, entries, attention, i);
  }
  skipped.scores += std::int64_t{later} * (count - left);
  skipped.scored_twice += left;
}

template <typename Kept>
Skipped attend_to(const float* queries, int group, int size, const Entries& entries, const Attention& attention,
                  float* room, float* out) {
  const int count = entries.count;
  const bool skips = attention.skip_below > 0.0f;
  Skipped skipped{0, 0, 0};
  float* weights = room;
  for (int g = 0; g < group; ++g) {
    const float* query = queries + g * size;
    if (skips) {
      score_in_two_steps<Kept>(query, size, entries, attention, weights, room + count, skipped);
    } else {
      for (int i = 0; i < count; ++i) {
        fetch_entry<Kept>(entries, size, i);
        weights[i] = score<Kept>(query, size, entries, attention, i);
      }
    }
    float total = soften(weights, count);
    if (skips) {
      drop_light(weights, count, total, attention.skip_below / static_cast<float>(count));
      total = sum(weights, count);
    }
    const int read = weigh<Kept>(entries, weights, size, total, out + g * size);
    if (skips) skipped.values += count - read;
  }
  return skipped;
}

Skipped attend(const float* queries, int group, int size, const Entries& entries, const Attention& attention,
               float* room, float* out) {
  switch (entries.kept) {
    case Kept::kCodes:
      return attend_to<Codes>(queries, group, size, entries, attention, room, out);
    case Kept::kBfloat16:
      return attend_to<Plain<Bfloat16>>(queries, group, size, entries, attention, room, out);
    default:
      return attend_to<Plain<float>>(queries, group, size, entries, attention, room, out);
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

[[maybe_unused]] int collect(const std::uint8_t* each, const float* x, int size, int bits, std::uint32_t* channels,
                             float* values) {
  int count = 0;
  for (int j = 0; j < size; ++j) {
    channels[count] = j;
    values[count] = x[j];
    count += each[j] == bits;
  }
  return count;
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

float quantize(const float* x, int size, std::int16_t* codes) {
  constexpr float kLargest = 127.0f * 256.0f;
  constexpr float kSmallest = 1e-34f;  // smaller ones count as zero: kLargest / x must be finite
  const float largest = largest_magnitude(x, size);
  const float inverse = largest > kSmallest ? kLargest / largest : 0.0f;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2 ** 23: sums with it are whole numbers, rounded to even
  for (int j = 0; j < size; ++j) codes[j] = static_cast<std::int16_t>(x[j] * inverse + kWhole - kWhole);
  return largest > kSmallest ? largest * (1.0f / kLargest) : 0.0f;
}

constexpr FloatKernels kFloats = {
    norm, rotate, attend, encode, to_bfloat16, activate, grade, collect, largest_magnitude, quantize, dot, add_rows};

}  // namespace
}  // namespace quicksilver

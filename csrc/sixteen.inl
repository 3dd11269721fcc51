// Included once by attention.inl: sixteen floats in registers, and the few operations on them, for each instruction
// set. The compiler's own vectors of this size live in memory where registers are narrower.
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace quicksilver {
namespace {

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

// kHeads, kParts: how many heads' sums, of so many times sixteen numbers, there are registers for.
#if defined(__AVX512F__)
struct Sixteen {
  __m512 all;
};
constexpr int kHeads = 4, kParts = 4;
inline Sixteen take(const float* x) { return {_mm512_loadu_ps(x)}; }
inline Sixteen take(const std::int8_t* x) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))))};
}
inline Sixteen take(const Bfloat16* x) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}
inline void put(Sixteen x, float* y) { _mm512_storeu_ps(y, x.all); }
inline Sixteen splat(float x) { return {_mm512_set1_ps(x)}; }
inline Sixteen add(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Sixteen multiply(Sixteen a, Sixteen b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm512_max_ps(a.all, b.all)}; }  // b's where a's is not a number

// Four sums of each of four: of lanes l, l + 4, l + 8 and l + 12.
inline Sixteen fold(Sixteen a, Sixteen b, Sixteen c, Sixteen d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.all, b.all, 0x44), _mm512_shuffle_f32x4(a.all, b.all, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.all, d.all, 0x44), _mm512_shuffle_f32x4(c.all, d.all, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
}

// Lane 4 j + e: the sum of lanes 4 j to 4 j + 3 of x[e].
inline Sixteen join(const Sixteen (&x)[4]) {
  const auto pair = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const __m512 first = pair(x[0].all, x[1].all), second = pair(x[2].all, x[3].all);
  return {_mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88), _mm512_shuffle_ps(first, second, 0xdd))};
}
#elif defined(__AVX2__)
struct Sixteen {
  __m256 low, high;
};
constexpr int kHeads = 2, kParts = 2;
inline Sixteen take(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline Sixteen take(const std::int8_t* x) {
  const auto eight = [](const std::int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
  };
  return {eight(x), eight(x + 8)};
}
inline Sixteen take(const Bfloat16* x) {
  const auto eight = [](const Bfloat16* at) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  };
  return {eight(x), eight(x + 8)};
}
inline void put(Sixteen x, float* y) {
  _mm256_storeu_ps(y, x.low);
  _mm256_storeu_ps(y + 8, x.high);
}
inline Sixteen splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Sixteen add(Sixteen a, Sixteen b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Sixteen multiply(Sixteen a, Sixteen b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Sixteen larger(Sixteen a, Sixteen b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

inline Sixteen fold(Sixteen a, Sixteen b, Sixteen c, Sixteen d) {
  const auto pair = [](Sixteen one, Sixteen other) {
    const __m256 x = _mm256_add_ps(one.low, one.high), y = _mm256_add_ps(other.low, other.high);
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  return {pair(a, b), pair(c, d)};
}

inline Sixteen join(const Sixteen (&x)[4]) {
  const auto pair = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  const auto all = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  };
  return {all(pair(x[0].low, x[1].low), pair(x[2].low, x[3].low)),
          all(pair(x[0].high, x[1].high), pair(x[2].high, x[3].high))};
}
#else
struct Sixteen {
  Four quarters[4];
};
constexpr int kHeads = 1, kParts = 1;
inline Sixteen take(const float* x) {
  Sixteen y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
template <typename T>
inline Sixteen take(const T* x) {
  float values[16];
  for (int l = 0; l < 16; ++l) values[l] = value_of(x[l]);
  return take(values);
}
inline void put(Sixteen x, float* y) { std::memcpy(y, &x, sizeof x); }
inline Sixteen splat(float x) {
  const Four all = {x, x, x, x};
  return {{all, all, all, all}};
}
inline Sixteen add(Sixteen a, Sixteen b) {
  for (int i = 0; i < 4; ++i) a.quarters[i] += b.quarters[i];
  return a;
}
inline Sixteen multiply(Sixteen a, Sixteen b) {
  for (int i = 0; i < 4; ++i) a.quarters[i] *= b.quarters[i];
  return a;
}
inline Sixteen larger(Sixteen a, Sixteen b) {
  for (int i = 0; i < 4; ++i) a.quarters[i] = a.quarters[i] > b.quarters[i] ? a.quarters[i] : b.quarters[i];
  return a;
}
inline Sixteen fold(Sixteen a, Sixteen b, Sixteen c, Sixteen d) {
  const auto four = [](Sixteen x) { return (x.quarters[0] + x.quarters[2]) + (x.quarters[1] + x.quarters[3]); };
  return {{four(a), four(b), four(c), four(d)}};
}
inline Sixteen join(const Sixteen (&x)[4]) {
  Sixteen sums;
  for (int j = 0; j < 4; ++j) {
    for (int e = 0; e < 4; ++e) {
      const Four four = x[e].quarters[j];
      sums.quarters[j][e] = (four[0] + four[2]) + (four[1] + four[3]);
    }
  }
  return sums;
}
#endif

inline Sixteen add_product(Sixteen sum, Sixteen a, Sixteen b) { return add(sum, multiply(a, b)); }

}  // namespace
}  // namespace quicksilver

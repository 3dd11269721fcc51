// Included once by each kernels_*.cpp, with floats.inl: functions of one number, the same bits on every instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace quicksilver {
namespace {

// exp by reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial (Cephes' expf); 0 below -87.
inline float exponential(float x) {
  const float bounded = std::min(std::max(-87.0f, x), 88.0f);  // -87 where x is not a number
  const float shifted = bounded * 1.44269504f + 12582912.0f;   // adding 1.5 * 2 ** 23 rounds to a whole number
  const float whole = shifted - 12582912.0f;
  const float r = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = (p * r) * r + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &fraction, sizeof bits);
  bits += static_cast<std::uint32_t>(static_cast<std::int32_t>(whole)) << 23;  // unsigned: negative ones shift, too
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return x < -87.0f ? 0.0f : (x == x ? value : x);
}

inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float hyperbolic_tangent(float x) {
  const float e = exponential(-2.0f * std::fabs(x));
  return std::copysign((1.0f - e) / (1.0f + e), x);
}

}  // namespace
}  // namespace quicksilver

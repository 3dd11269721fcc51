// The definition in plain C++, and what runs where no vector unit is known.
#include <cmath>
#include <cstring>

#include "floats.inl"
#include "kernels.h"

namespace quicksilver {
namespace {

// Where a tile has a channel's bits of an output, [eighth, quarter, place] of half a tile, and in which of a byte's.
struct Spot {
  std::size_t high, pairs;  // bytes
  int high_shift, pairs_shift;
};

Spot spot_of(const Term& term, int channel, int output) {
  const int half = output / 32, eighth = output % 32 / 8, quarter = output % 8 / 4, place = output % 4;
  const int lane = term.interleaved ? channel % kQuadChannels : 0, step = term.interleaved ? kQuadChannels : 1;
  const std::size_t in_order = term.interleaved ? (eighth * 2 + quarter) * 4 + place : quarter * 16 + eighth * 4 + place;
  return {in_order * step + lane, std::size_t((eighth * 4 + place) * step + lane), 4 * half, 2 * half + 4 * quarter};
}

int code_at(const Term& term, int channel, int tile, int output) {
  const std::size_t at = term.places[channel] + tile * term.tile_stride;
  const Spot spot = spot_of(term, channel, output);
  const auto nibble = [&](const std::uint8_t* plane) { return plane[at + spot.high] >> spot.high_shift & 15; };
  const auto pair = [&] { return term.low[at / 2 + spot.pairs] >> spot.pairs_shift & 3; };
  switch (term.plane) {
    case Plane::kHigh:
      return nibble(term.high) & term.mask;
    case Plane::kLow:
      return nibble(term.low) & term.mask;
    case Plane::kPairs:
      return pair() & term.mask;
    case Plane::kBoth:
      return nibble(term.high) << 4 | nibble(term.low);
    default:
      return nibble(term.high) << 2 | pair();
  }
}

float half_at(const void* from, int at) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const std::uint16_t*>(from) + at, sizeof bits);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}

void add_output(const Scales& scales, const Share& share, int at, float sum, float* y) {
  float step;
  if (scales.steps_kind == Steps::kHalf) {
    step = half_at(scales.steps, at);
  } else {
    const std::uint8_t whole = static_cast<const std::uint8_t*>(scales.steps)[at];
    const int value = scales.steps_kind == Steps::kSigned ? static_cast<std::int8_t>(whole) : whole;
    step = static_cast<float>(value) * half_at(scales.block_steps, at);
  }
  float total = std::fma(sum, step, *y);
  if (scales.offsets_kind == Offsets::kHalf) {
    total = std::fma(-half_at(scales.offsets, at), share.sum, total);
  } else if (scales.offsets_kind != Offsets::kNone) {
    const float whole = static_cast<const std::uint8_t*>(scales.offsets)[at];
    const float times = scales.offsets_kind == Offsets::kUnsigned ? half_at(scales.block_offsets, at) : step;
    total = std::fma(-(whole * times), share.sum, total);
  }
  *y = total;
}

// Adds what a half comes to.
float add_half(const Term* terms, int num_terms, const Share& share, int half, float sum, int tile, int output) {
  std::int32_t total = share.begin[half];
  for (int t = 0; t < num_terms; ++t) {
    std::int32_t part = 0;
    const int first = half ? terms[t].quads[0] : 0, end = first + terms[t].quads[half];
    for (int c = kQuadChannels * first; c < kQuadChannels * end; ++c) {
      part += share.words[t][c] * code_at(terms[t], c, tile, output);
    }
    total += part * (1 << terms[t].shift);
  }
  return std::fma(static_cast<float>(total), share.unit[half], sum);
}

void multiply(const Term* terms, int num_terms, const Share* shares, int num_rows, const Scales& scales, int first,
              int end, float* y, std::size_t stride, const Ahead&) {
  for (int r = 0; r < num_rows; ++r) {
    for (int at = first * kTileOutputs; at < end * kTileOutputs; ++at) {
      float sum = 0.0f;
      for (int half : {0, 1}) {
        sum = add_half(terms, num_terms, shares[r], half, sum, at / kTileOutputs, at % kTileOutputs);
      }
      add_output(scales, shares[r], at, sum, y + r * stride + at);
    }
  }
}

const Kernels kPortable = {"portable", true, multiply, kFloats};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace quicksilver

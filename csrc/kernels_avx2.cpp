// AVX2: coefficients of 16 bits meet weights widened to 16 bits, two channels at a time.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "codes.inl"
#include "fetch.inl"
#include "floats.inl"

namespace quicksilver {
namespace {

__m256i record(const Tile& tile, std::uint32_t channel, int part) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.record(channel) + part)));
}

// The scales of groups so many steps above their channel's base, in units of 2 ** -15; see coefficient_of.
__m256i multipliers(__m256i steps) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMultipliers));
  const __m256i first = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(low));
  const __m256i second = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(low, 1));
  const __m256i chosen = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_permutevar8x32_epi32(first, steps)),  // reads three bits of each
                       _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(second, steps)),
                       _mm256_castsi256_ps(_mm256_slli_epi32(steps, 28))));
  return _mm256_srlv_epi32(chosen, _mm256_srli_epi32(steps, 4));
}

// Leaves [pairs, groups] words of two channels' coefficients.
void make_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c) {
  __m256i zero_sums = _mm256_setzero_si256();
  __m256 offset = _mm256_setzero_ps();
  int pair = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    __m256i sums = _mm256_setzero_si256();
    for (const int end = pair + part->slots / 2; pair < end; ++pair) {
      __m256i q[2];
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * pair + i;
        const __m256i steps = record(tile, chunk.channels[j], 0);
        const __m256i product = _mm256_mullo_epi32(_mm256_set1_epi32(chunk.x[j]), multipliers(steps));
        q[i] = _mm256_srai_epi32(_mm256_add_epi32(product, _mm256_set1_epi32(1 << 14)), 15);
        sums = _mm256_add_epi32(sums, q[i]);
        const __m256i zeros = record(tile, chunk.channels[j], kTileGroups);  // below 2 ** 8
        zero_sums = _mm256_add_epi32(zero_sums, _mm256_madd_epi16(q[i], zeros));
      }
      const __m256i words = _mm256_blend_epi16(q[0], _mm256_slli_epi32(q[1], 16), 0xaa);
      _mm256_store_si256(reinterpret_cast<__m256i*>(c.words + pair * kTileGroups), words);
    }
    const __m256 step = _mm256_set1_ps(levels.offset[part->bits]);
    offset = _mm256_add_ps(offset, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), step));
  }
  c.scale = chunk.unit * levels.unit;
  _mm256_store_ps(c.offsets, _mm256_mul_ps(_mm256_set1_ps(c.scale), offset));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), zero_sums);
}

// What a matrix of bits (see matrix_of) makes of each low and of each high nibble. Each bit comes from one.
struct Images {
  alignas(16) std::uint8_t of_low[16], of_high[16];

  constexpr explicit Images(std::uint64_t matrix) : of_low{}, of_high{} {
    for (int bit = 0; bit < 8; ++bit) {
      const int from = static_cast<int>(matrix >> (8 * (7 - bit)) & 255);
      for (int nibble = 0; nibble < 16; ++nibble) {
        of_low[nibble] |= static_cast<std::uint8_t>((from & nibble) != 0) << bit;
        of_high[nibble] |= static_cast<std::uint8_t>((from & nibble << 4) != 0) << bit;
      }
    }
  }
};

struct Vector {
  using Bytes = __m256i;

  static Bytes repeated(const std::uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static Bytes looked_up(Bytes table, Bytes indices) { return _mm256_shuffle_epi8(table, indices); }
  static Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
  // Bits of Mask from x, the others from y.
  template <std::uint8_t Mask>
  static Bytes select(Bytes x, Bytes y) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(Mask));
    return _mm256_or_si256(_mm256_and_si256(mask, x), _mm256_andnot_si256(mask, y));
  }
  template <std::uint64_t Matrix>
  static Bytes permuted(Bytes x) {
    static constexpr Images images(Matrix);
    return _mm256_or_si256(looked_up(repeated(images.of_low), low_nibbles(x)),
                           looked_up(repeated(images.of_high), high_nibbles(x)));
  }
};

// A plane's bytes of a pair of channels in a half's lanes 2 k and 2 k + 1, side by side: [8 outputs, channel] in each
// lane.
__m256i load_pair(const Tile& tile, const std::uint32_t* channels, int pair, int plane, int half, int k) {
  const std::size_t times = plane < 2 ? 1 : 2;
  if (tile.layout == Layout::kRuns) {
    const auto run = [&](std::uint32_t channel) {  // in the low 8 bytes of each lane
      const std::uint8_t* from = tile.planes[plane] + times * channel * tile.stride + 8 * half + 16 * tile.halves * k;
      const auto word = [&](int offset) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + offset)); };
      return _mm256_set_m128i(word(8 * tile.halves), word(0));
    };
    return _mm256_unpacklo_epi8(run(channels[0]), run(channels[1]));
  }
  const std::uint8_t* from = tile.planes[plane] + times * Tile::quad_offset(half, pair / 2) + 32 * k;
  const auto pairs = [&](int offset) {  // of each [output, 4 channels] two, as words
    const __m256i quads = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + offset));
    return pair % 2 ? _mm256_srli_epi32(quads, 16) : _mm256_and_si256(quads, _mm256_set1_epi32(0xffff));
  };
  return _mm256_packus_epi32(pairs(0), pairs(64));
}

// Adds pairs of channels [begin, end), read at one number of bits, to sums of a half's lanes 2 k and 2 k + 1.
template <int Bits>
void add_pairs(const Tile& tile, const Chunk& chunk, const Levels& levels, int half, int k, int begin, int end,
               const Coefficients& c, __m256i* sums) {
  const Unpack<Vector, Bits> unpack(levels);
  const __m256i none = _mm256_setzero_si256();
  for (int pair = begin; pair < end; ++pair) {
    const std::uint32_t* channels = chunk.channels + 2 * pair;
    const std::int32_t* words = c.words + pair * kTileGroups + 4 * half;
    __m256i bytes[planes_of(Bits)], codes[kFields];
    for (int p = 0; p < planes_of(Bits); ++p) {
      bytes[p] = load_pair(tile, channels, pair, p, half, k);
    }
    unpack(bytes, codes);
    for (int a = 0; a < 2 * kFields; ++a) {  // words become [output, channel], 8 outputs in each register
      const __m256i packed = codes[a % kFields];
      const __m256i wide = a < kFields ? _mm256_unpacklo_epi8(packed, none) : _mm256_unpackhi_epi8(packed, none);
      sums[a] = _mm256_add_epi32(sums[a], _mm256_madd_epi16(wide, _mm256_set1_epi32(words[a / 2])));
    }
  }
}

// Sums of a half's lanes 2 k and 2 k + 1: 8 of every 16 outputs.
void multiply(const Tile& tile, const Chunk& chunk, const Levels& levels, int half, int k, Coefficients& c, bool adds,
              float* y) {
  __m256i sums[2 * kFields];
  for (int a = 0; a < 2 * kFields; ++a) sums[a] = _mm256_set1_epi32(-c.zero_sums[4 * half + a / 2]);
  int first = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    const int end = first + part->slots / 2;
    at_bits(part->bits,
             [&](auto bits) { add_pairs<decltype(bits)::value>(tile, chunk, levels, half, k, first, end, c, sums); });
    first = end;
  }
  for (int a = 0; a < 2 * kFields; ++a) {
    const int g = 4 * half + a / 2;
    const __m256 part = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(c.scale), _mm256_cvtepi32_ps(sums[a])),
                                      _mm256_set1_ps(c.offsets[g]));
    float* out = y + kHalfOutputs * half + 16 * a + 8 * k;
    _mm256_storeu_ps(out, adds ? _mm256_add_ps(_mm256_loadu_ps(out), part) : part);
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, bool adds, float* y,
                Upcoming& next) {
  for (int i = 0; i < chunk.slots / 2; ++i) fetch(next);
  make_coefficients(tile, chunk, levels, c);
  for (int half = 0; half < tile.halves; ++half) {
    for (int k = 0; k < 2; ++k) multiply(tile, chunk, levels, half, k, c, adds, y);
  }
}

const Kernels kAvx2 = {"avx2", tile_chunk, kFloats};

}  // namespace

const Kernels* avx2_kernels() { return &kAvx2; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

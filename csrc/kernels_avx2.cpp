// AVX2: coefficients of 16 bits meet weights widened to 16 bits, two channels at a time.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "expand.inl"
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
        zero_sums = _mm256_add_epi32(
            zero_sums, _mm256_madd_epi16(q[i], record(tile, chunk.channels[j], kTileGroups)));  // zeros < 2 ** 8
      }
      const __m256i words = _mm256_blend_epi16(q[0], _mm256_slli_epi32(q[1], 16), 0xaa);
      _mm256_store_si256(reinterpret_cast<__m256i*>(c.words + pair * kTileGroups), words);
    }
    const __m256 step = _mm256_set1_ps(levels.offset[part->width]);
    offset = _mm256_add_ps(offset, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), step));
  }
  c.scale = chunk.unit * levels.unit;
  _mm256_store_ps(c.offsets, _mm256_mul_ps(_mm256_set1_ps(c.scale), offset));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), zero_sums);
}

// Eight codes' bits, a byte of each bit from the trailing one on, become their eight bytes: three exchanges of blocks
// (Warren, "Hacker's Delight", 2nd ed., 7-3).
__m256i transposed(__m256i x) {
  const auto exchange = [&x](int shift, std::int64_t mask) {
    const __m256i moved = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, shift)), _mm256_set1_epi64x(mask));
    x = _mm256_xor_si256(x, _mm256_xor_si256(moved, _mm256_slli_epi64(moved, shift)));
  };
  exchange(7, 0x00AA00AA00AA00AA);
  exchange(14, 0x0000CCCC0000CCCC);
  exchange(28, 0x00000000F0F0F0F0);
  return x;
}

// Unpacks codes of two lanes of a half: those of words i and i + 2 of each lane, a lane's 16 bytes.
struct Unpack {
  int planes, width;
  __m256i table, kept, reversed;

  Unpack(const Levels& levels, int width) : planes(planes_of(width)), width(width) {
    const std::uint8_t* entries = width == 4 ? levels.table4 : levels.table2;
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    kept = _mm256_set1_epi8(static_cast<char>(0xff << (kMaxWidth - width)));
    reversed = _mm256_broadcastsi128_si256(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  }

  // The words of the half's lanes 2 k and 2 k + 1 in the low 8 bytes of each lane.
  static __m256i load(const Tile& tile, std::size_t channel, int plane, int half, int k) {
    const std::uint8_t* run = tile.run(plane, channel) + 8 * half + 16 * tile.halves * k;
    const auto word = [&](int offset) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(run + offset)); };
    return _mm256_set_m128i(word(8 * tile.halves), word(0));
  }

  void operator()(const Tile& tile, std::size_t channel, int half, int k, __m256i* codes) const {
    __m256i words[kPlanes] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                              _mm256_setzero_si256()};
    const int first = width == 4 || width == 2 ? kPlanes - planes : 0;  // as indices, codes lie in the low bits
    for (int p = 0; p < planes; ++p) words[first + p] = load(tile, channel, p, half, k);
    const __m256i low = _mm256_unpacklo_epi16(words[0], words[1]), high = _mm256_unpacklo_epi16(words[2], words[3]);
    codes[0] = _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
    codes[1] = _mm256_blend_epi32(_mm256_srli_epi64(low, 32), high, 0xaa);
    for (int i = 0; i < 2; ++i) {
      codes[i] = transposed(_mm256_shuffle_epi8(codes[i], reversed));
      codes[i] = first ? _mm256_shuffle_epi8(table, codes[i]) : _mm256_and_si256(codes[i], kept);
    }
  }
};

// Adds 32 codes of each of two channels: words become [output, channel], 8 outputs in each register.
inline void add_pair(__m256i first, __m256i second, const std::int32_t* words, __m256i* sums) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
  const __m256i codes[4] = {_mm256_unpacklo_epi8(low, none), _mm256_unpackhi_epi8(low, none),
                            _mm256_unpacklo_epi8(high, none), _mm256_unpackhi_epi8(high, none)};
  for (int m = 0; m < 4; ++m) {
    sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(codes[m], _mm256_set1_epi32(words[m / 2])));
  }
}

// Sums of a half's lanes 2 k and 2 k + 1: 8 of every 16 outputs.
void multiply(const Tile& tile, const Chunk& chunk, const Levels& levels, int half, int k, Coefficients& c, float* y) {
  __m256i sums[8];
  for (int a = 0; a < 8; ++a) sums[a] = _mm256_set1_epi32(-c.zero_sums[4 * half + a / 2]);
  int pair = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    const Unpack unpack(levels, part->width);
    for (const int end = pair + part->slots / 2; pair < end; ++pair) {
      __m256i first[2], second[2];
      unpack(tile, chunk.channels[2 * pair], half, k, first);
      unpack(tile, chunk.channels[2 * pair + 1], half, k, second);
      const std::int32_t* words = c.words + pair * kTileGroups + 4 * half;
      add_pair(first[0], second[0], words, sums);
      add_pair(first[1], second[1], words + 2, sums + 4);
    }
  }
  for (int a = 0; a < 8; ++a) {
    const int g = 4 * half + a / 2;
    const __m256 part = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(c.scale), _mm256_cvtepi32_ps(sums[a])),
                                      _mm256_set1_ps(c.offsets[g]));
    float* out = y + kHalfOutputs * half + 16 * a + 8 * k;
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), part));
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y, Upcoming& next) {
  for (int i = 0; i < chunk.slots / 2; ++i) fetch(next);
  make_coefficients(tile, chunk, levels, c);
  for (int half = 0; half < tile.halves; ++half) {
    for (int k = 0; k < 2; ++k) multiply(tile, chunk, levels, half, k, c, y);
  }
}

const Kernels kAvx2 = {"avx2", tile_chunk, expand_channel, to_bfloat16, kFloats};

}  // namespace

const Kernels* avx2_kernels() { return &kAvx2; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

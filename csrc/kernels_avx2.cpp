// AVX2: coefficients of 16 bits meet weights widened to 16 bits, two channels at a time.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "expand.inl"
#include "floats.inl"

namespace quicksilver {
namespace {

__m256i record(const Tile& tile, std::uint32_t channel, int part) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(
      reinterpret_cast<const __m128i*>(tile.records + std::size_t{channel} * kRecordBytes + part)));
}

// kFractions[exponent & 15] / 2 ** (exponent / 16): the two halves of the table, then the one that is meant.
__m256 factors(__m256i exponents) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kFractions), exponents);  // reads three bits of each
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kFractions + 8), exponents);
  const __m256 chosen = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(exponents, 28)));
  return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(chosen),
                                              _mm256_slli_epi32(_mm256_srli_epi32(exponents, 4), 23)));
}

// Leaves [pairs, groups] words of two channels' coefficients.
void round_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, int pairs, Coefficients& c) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps();
  for (int j = 0; j < 2 * pairs; ++j) {
    const __m256 raw = _mm256_mul_ps(_mm256_set1_ps(chunk.x[j]), factors(record(tile, chunk.channels[j], 0)));
    largest = _mm256_max_ps(largest, _mm256_and_ps(raw, magnitude));
    _mm256_store_ps(c.raw + j * kTileGroups, raw);
  }
  const __m256 some = _mm256_cmp_ps(largest, _mm256_set1_ps(kSmallest), _CMP_GT_OQ);
  const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(kSteps), largest));
  __m256i sums = _mm256_setzero_si256(), zero_sums = _mm256_setzero_si256();
  for (int pair = 0; pair < pairs; ++pair) {
    __m256i q[2];
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * pair + i;
      q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(c.raw + j * kTileGroups), inverse));
      sums = _mm256_add_epi32(sums, q[i]);
      zero_sums = _mm256_add_epi32(
          zero_sums, _mm256_madd_epi16(q[i], record(tile, chunk.channels[j], kTileGroups)));  // zeros < 2 ** 8
    }
    const __m256i words = _mm256_blend_epi16(q[0], _mm256_slli_epi32(q[1], 16), 0xaa);
    _mm256_store_si256(reinterpret_cast<__m256i*>(c.words + pair * kTileGroups), words);
  }
  const __m256 scales =
      _mm256_mul_ps(_mm256_mul_ps(largest, _mm256_set1_ps(1.0f / kSteps)), _mm256_set1_ps(levels.largest));
  const __m256 offset = _mm256_set1_ps(levels.offset[chunk.width]);
  _mm256_store_ps(c.scales, scales);
  _mm256_store_ps(c.offsets, _mm256_mul_ps(scales, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), offset)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), zero_sums);
}

// Unpacks 32 of a block's 64 codes: lanes k = 2 half and 2 half + 1 hold pair k of each byte.
template <int Planes>
struct Unpack {
  __m256i shift[2], table;
  int drop;
  bool uses_table;

  Unpack(const Levels& levels, int width) : drop(2 * Planes - width), uses_table(width == 4 || width == 2) {
    shift[0] = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0);
    shift[1] = _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4);
    const std::uint8_t* entries = width == 4 ? levels.table4 : levels.table2;
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  __m256i operator()(const std::uint8_t* const* planes, std::size_t at, int half) const {
    const __m256i three = _mm256_set1_epi8(3);
    __m256i codes = _mm256_setzero_si256();
    for (int p = 0; p < Planes; ++p) {
      const __m256i packed =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[p] + at)));
      const __m256i field = _mm256_and_si256(_mm256_srlv_epi32(packed, shift[half]), three);
      codes = _mm256_or_si256(_mm256_slli_epi32(codes, 2), field);  // below 2 ** 6 before: no bit leaves its byte
    }
    if (uses_table) return _mm256_shuffle_epi8(table, codes);
    if (drop) codes = _mm256_andnot_si256(_mm256_set1_epi8(1), codes);
    return _mm256_slli_epi32(codes, kMaxWidth - 2 * Planes);
  }
};

template <int Planes>
void multiply(const Tile& tile, const Chunk& chunk, const Levels& levels, int pairs, Coefficients& c, float* y) {
  const Unpack<Planes> unpack(levels, chunk.width);
  const std::size_t line = tile.line;
  const __m256i none = _mm256_setzero_si256();
  for (int block = 0; block < tile.blocks; ++block) {
    const std::uint8_t* planes[Planes];
    for (int p = 0; p < Planes; ++p) planes[p] = tile.planes[p] + 16 * block;
    for (int half = 0; half < 2; ++half) {
      __m256i sums[4];
      for (int r = 0; r < 4; ++r) sums[r] = _mm256_set1_epi32(-c.zero_sums[2 * block + r / 2]);
      for (int pair = 0; pair < pairs; ++pair) {
        const std::int32_t* words = c.words + pair * kTileGroups + 2 * block;
        const __m256i first = unpack(planes, chunk.channels[2 * pair] * line, half);
        const __m256i second = unpack(planes, chunk.channels[2 * pair + 1] * line, half);
        const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
        const __m256i codes[4] = {_mm256_unpacklo_epi8(low, none), _mm256_unpackhi_epi8(low, none),
                                  _mm256_unpacklo_epi8(high, none), _mm256_unpackhi_epi8(high, none)};
        for (int r = 0; r < 4; ++r) {
          sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(codes[r], _mm256_set1_epi32(words[r / 2])));
        }
      }
      for (int r = 0; r < 4; ++r) {
        const int g = 2 * block + r / 2;
        const __m256 part = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(c.scales[g]), _mm256_cvtepi32_ps(sums[r])),
                                          _mm256_set1_ps(c.offsets[g]));
        float* out = y + kBlockOutputs * block + 16 * r + 8 * half;
        _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), part));
      }
    }
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y) {
  const int pairs = (chunk.count + 1) / 2;
  round_coefficients(tile, chunk, levels, pairs, c);
  switch (planes_of(chunk.width)) {
    case 4: return multiply<4>(tile, chunk, levels, pairs, c, y);
    case 3: return multiply<3>(tile, chunk, levels, pairs, c, y);
    case 2: return multiply<2>(tile, chunk, levels, pairs, c, y);
    case 1: return multiply<1>(tile, chunk, levels, pairs, c, y);
    default: return;
  }
}

void prefetch(const Tile& tile, const Chunk& chunk) {
  const int planes = planes_of(chunk.width);
  for (int j = 0; j < chunk.count; ++j) {
    const std::size_t channel = chunk.channels[j];
    for (int p = 0; p < planes; ++p) {
      _mm_prefetch(reinterpret_cast<const char*>(tile.planes[p] + channel * tile.line), _MM_HINT_T0);
    }
    _mm_prefetch(reinterpret_cast<const char*>(tile.records + channel * kRecordBytes), _MM_HINT_T0);
  }
}

const Kernels kAvx2 = {"avx2", tile_chunk, prefetch, expand_channel, to_bfloat16, kFloats};

}  // namespace

const Kernels* avx2_kernels() { return &kAvx2; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

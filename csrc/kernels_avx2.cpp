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

// Eight codes' bits, a byte of each bit from the trailing one on, become their eight bytes: three exchanges of blocks
// (Warren, "Hacker's Delight", 2nd ed., 7-3).
__m256i transposed(__m256i x) {
  const auto exchange = [&x](int shift, std::int64_t mask) {
    const __m256i moved =
        _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, shift)), _mm256_set1_epi64x(mask));
    x = _mm256_xor_si256(x, _mm256_xor_si256(moved, _mm256_slli_epi64(moved, shift)));
  };
  exchange(7, 0x00AA00AA00AA00AA);
  exchange(14, 0x0000CCCC0000CCCC);
  exchange(28, 0x00000000F0F0F0F0);
  return x;
}

// Unpacks codes of two lanes of a half: those of groups 2 i and 2 i + 1 of each lane, a lane's 16 bytes.
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
    const std::uint8_t* run = tile.planes[plane] + channel * tile.line + 8 * half + 16 * tile.halves * k;
    const auto word = [&](int offset) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(run + offset)); };
    return _mm256_set_m128i(word(8 * tile.halves), word(0));
  }

  void operator()(const Tile& tile, std::size_t channel, int half, int k, __m256i* codes) const {
    __m256i words[kPlanes] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                              _mm256_setzero_si256()};
    const int first = width == 4 || width == 2 ? kPlanes - planes : 0;  // as indices, codes lie in the low bits
    for (int p = 0; p < planes; ++p) words[first + p] = load(tile, channel, p, half, k);
    const __m256i low = _mm256_unpacklo_epi16(words[0], words[1]), high = _mm256_unpacklo_epi16(words[2], words[3]);
    codes[0] = _mm256_unpacklo_epi32(low, high);
    codes[1] = _mm256_unpackhi_epi32(low, high);
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
void multiply(const Tile& tile, const Chunk& chunk, const Unpack& unpack, int half, int k, int pairs, Coefficients& c,
              float* y) {
  __m256i sums[8];
  for (int a = 0; a < 8; ++a) sums[a] = _mm256_set1_epi32(-c.zero_sums[4 * half + a / 2]);
  for (int pair = 0; pair < pairs; ++pair) {
    __m256i first[2], second[2];
    unpack(tile, chunk.channels[2 * pair], half, k, first);
    unpack(tile, chunk.channels[2 * pair + 1], half, k, second);
    const std::int32_t* words = c.words + pair * kTileGroups + 4 * half;
    add_pair(first[0], second[0], words, sums);
    add_pair(first[1], second[1], words + 2, sums + 4);
  }
  for (int a = 0; a < 8; ++a) {
    const int g = 4 * half + a / 2;
    const __m256 part = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(c.scales[g]), _mm256_cvtepi32_ps(sums[a])),
                                      _mm256_set1_ps(c.offsets[g]));
    float* out = y + kHalfOutputs * half + 16 * a + 8 * k;
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), part));
  }
}

inline void fetch(const Upcoming& next, int j) {
  const std::size_t channel = next.channels[j];
  for (int p = 0; p < next.planes; ++p) {
    _mm_prefetch(reinterpret_cast<const char*>(next.tile->planes[p] + channel * next.tile->line), _MM_HINT_T0);
  }
  _mm_prefetch(reinterpret_cast<const char*>(next.tile->records + channel * kRecordBytes), _MM_HINT_T0);
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y,
                const Upcoming& next) {
  for (int j = 0; j < next.count; ++j) fetch(next, j);
  const int pairs = (chunk.count + 1) / 2;
  round_coefficients(tile, chunk, levels, pairs, c);
  const Unpack unpack(levels, chunk.width);
  for (int half = 0; half < tile.halves; ++half) {
    for (int k = 0; k < 2; ++k) multiply(tile, chunk, unpack, half, k, pairs, c, y);
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

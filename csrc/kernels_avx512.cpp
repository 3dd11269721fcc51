// AVX-512 with byte dot products (VNNI). Coefficients of 16 bits are split into two signed bytes, so that one unpacked
// byte of weights meets both and the sums are exact.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "expand.inl"
#include "floats.inl"

namespace quicksilver {
namespace {

constexpr int kQuads = kChunkChannels / 4;

// The leading bytes of coefficients, [quads, groups] words of four channels, and after them the trailing bytes.
std::int32_t* leading(Coefficients& c) { return c.words; }
std::int32_t* trailing(Coefficients& c) { return c.words + kQuads * kTileGroups; }

// Two channels' records as [channel, group] words: 16 bytes at `part` of each.
__m512i two_records(const Tile& tile, const std::uint32_t* channels, int part) {
  const auto load = [&](int j) {
    return _mm_loadl_epi64(
        reinterpret_cast<const __m128i*>(tile.records + std::size_t{channels[j]} * kRecordBytes + part));
  };
  return _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(load(0), load(1)));
}

__m512 factors(__m512i exponents, __m512 fractions) {
  const __m512i bits = _mm512_castps_si512(_mm512_permutexvar_ps(exponents, fractions));  // reads four bits of each
  return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(_mm512_srli_epi32(exponents, 4), 23)));
}

// Four channels' bytes of each group, from [channel, group] words of two channels each.
__m256i bytes_of_four(__m512i first, __m512i second) {
  const __m512i mask = _mm512_set1_epi32(0xff);
  first = _mm512_and_si512(first, mask);
  second = _mm512_slli_epi32(_mm512_and_si512(second, mask), 16);
  const __m512i pairs = _mm512_or_si512(first, second);
  const __m256i even = _mm512_castsi512_si256(pairs), odd = _mm512_extracti64x4_epi64(pairs, 1);
  return _mm256_or_si256(even, _mm256_slli_epi32(odd, 8));
}

__m256 both_halves(__m512 v, __m256 (*merge)(__m256, __m256)) {
  return merge(_mm512_castps512_ps256(v), _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), 1)));
}

__m256 larger(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }

__m256i summed_halves(__m512i v) {
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}

void round_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, int quads, Coefficients& c) {
  const __m512 fractions = _mm512_loadu_ps(kFractions);
  const __m512i spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512 largest = _mm512_setzero_ps();
  for (int j = 0; j < 4 * quads; j += 2) {
    const __m512 x = _mm512_permutexvar_ps(
        spread, _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunk.x + j)))));
    const __m512 raw = _mm512_mul_ps(x, factors(two_records(tile, chunk.channels + j, 0), fractions));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(raw));
    _mm512_store_ps(c.raw + j * kTileGroups, raw);
  }
  const __m256 most = both_halves(largest, larger);
  const __mmask8 some = _mm256_cmp_ps_mask(most, _mm256_set1_ps(kSmallest), _CMP_GT_OQ);
  const __m512 inverse = _mm512_broadcast_f32x8(_mm256_maskz_div_ps(some, _mm256_set1_ps(kSteps), most));
  __m512i sums = _mm512_setzero_si512(), zero_sums = _mm512_setzero_si512();
  __m512i heads[2], tails[2];
  for (int quad = 0; quad < quads; ++quad) {
    for (int half = 0; half < 2; ++half) {
      const int j = 4 * quad + 2 * half;
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(c.raw + j * kTileGroups), inverse));
      heads[half] = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      tails[half] = q;  // its low byte is what is left
      sums = _mm512_add_epi32(sums, q);
      zero_sums = _mm512_add_epi32(
          zero_sums, _mm512_madd_epi16(q, two_records(tile, chunk.channels + j, kTileGroups)));  // zeros < 2 ** 8
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(leading(c) + quad * kTileGroups), bytes_of_four(heads[0], heads[1]));
    _mm256_store_si256(reinterpret_cast<__m256i*>(trailing(c) + quad * kTileGroups), bytes_of_four(tails[0], tails[1]));
  }
  const __m256 scales = _mm256_mul_ps(_mm256_mul_ps(most, _mm256_set1_ps(1.0f / kSteps)), _mm256_set1_ps(levels.largest));
  const __m256 sum = _mm256_cvtepi32_ps(summed_halves(sums));
  _mm256_store_ps(c.scales, scales);
  _mm256_store_ps(c.offsets, _mm256_mul_ps(scales, _mm256_mul_ps(sum, _mm256_set1_ps(levels.offset[chunk.width]))));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), summed_halves(zero_sums));
}

// Moves the k-th pair of bits of each byte of lane k to bits `to`, `to + 1`.
__m512i rotations(int to) {
  const auto by = [to](int lane) { return (to - 2 * lane) & 31; };
  return _mm512_set_epi32(by(3), by(3), by(3), by(3), by(2), by(2), by(2), by(2), by(1), by(1), by(1), by(1), by(0),
                          by(0), by(0), by(0));
}

// Unpacks 64 codes: byte 16 k + b is pair k of byte b of each plane, and so output 16 (b / 4) + 4 k + b % 4.
template <int Planes, bool Table>
struct Unpack {
  __m512i rotate[Planes], mask[Planes], table;

  Unpack(const Levels& levels, int width) {
    for (int p = 0; p < Planes; ++p) {
      const int to = Table ? 2 * (Planes - 1 - p) : 6 - 2 * p;
      const int dropped = p == Planes - 1 ? 2 * Planes - width : 0;  // an odd width leaves out the last bit
      rotate[p] = rotations(to);
      mask[p] = _mm512_set1_epi8(static_cast<char>((dropped ? 2 : 3) << to));
    }
    if (Table) {
      const std::uint8_t* entries = width == 4 ? levels.table4 : levels.table2;
      table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    }
  }

  __m512i operator()(const std::uint8_t* const* planes, std::size_t at) const {
    __m512i codes;
    for (int p = 0; p < Planes; ++p) {
      const __m512i packed =
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[p] + at)));
      const __m512i moved = _mm512_rolv_epi32(packed, rotate[p]);
      codes = p == 0 ? _mm512_and_si512(moved, mask[p]) : _mm512_ternarylogic_epi32(codes, moved, mask[p], 0xf8);
    }
    return Table ? _mm512_shuffle_epi8(table, codes) : codes;
  }
};

struct Sums {
  __m512i head[4], tail[4];
};

// Adds four channels: bytes become [output, channel], four outputs' words of 16 in each register.
inline void add_quad(__m512i c0, __m512i c1, __m512i c2, __m512i c3, const std::int32_t* head, const std::int32_t* tail,
                     Sums& sums) {
  const __m512i low01 = _mm512_unpacklo_epi8(c0, c1), high01 = _mm512_unpackhi_epi8(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi8(c2, c3), high23 = _mm512_unpackhi_epi8(c2, c3);
  const __m512i codes[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                            _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
  for (int r = 0; r < 4; ++r) {
    sums.head[r] = _mm512_dpbusd_epi32(sums.head[r], codes[r], _mm512_set1_epi32(head[r / 2]));
    sums.tail[r] = _mm512_dpbusd_epi32(sums.tail[r], codes[r], _mm512_set1_epi32(tail[r / 2]));
  }
}

template <int Planes, bool Table>
void multiply(const Tile& tile, const Chunk& chunk, const Levels& levels, int quads, Coefficients& c, float* y) {
  const Unpack<Planes, Table> unpack(levels, chunk.width);
  const std::size_t line = tile.line;
  for (int block = 0; block < tile.blocks; ++block) {
    const std::uint8_t* planes[Planes];
    for (int p = 0; p < Planes; ++p) planes[p] = tile.planes[p] + 16 * block;
    Sums sums;
    for (int r = 0; r < 4; ++r) {
      sums.head[r] = _mm512_setzero_si512();
      sums.tail[r] = _mm512_set1_epi32(-c.zero_sums[2 * block + r / 2]);
    }
    for (int quad = 0; quad < quads; ++quad) {
      const std::uint32_t* channels = chunk.channels + 4 * quad;
      const int at = quad * kTileGroups + 2 * block;
      add_quad(unpack(planes, channels[0] * line), unpack(planes, channels[1] * line),
               unpack(planes, channels[2] * line), unpack(planes, channels[3] * line), leading(c) + at,
               trailing(c) + at, sums);
    }
    for (int r = 0; r < 4; ++r) {
      const int g = 2 * block + r / 2;
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums.head[r], 8), sums.tail[r]);
      const __m512 part = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(c.scales[g]), _mm512_cvtepi32_ps(sum)),
                                        _mm512_set1_ps(c.offsets[g]));
      float* out = y + kBlockOutputs * block + 16 * r;
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), part));
    }
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y) {
  const int quads = (chunk.count + 3) / 4;
  round_coefficients(tile, chunk, levels, quads, c);
  switch (chunk.width) {
    case 8:
    case 7: return multiply<4, false>(tile, chunk, levels, quads, c, y);
    case 6:
    case 5: return multiply<3, false>(tile, chunk, levels, quads, c, y);
    case 4: return multiply<2, true>(tile, chunk, levels, quads, c, y);
    case 3: return multiply<2, false>(tile, chunk, levels, quads, c, y);
    case 2: return multiply<1, true>(tile, chunk, levels, quads, c, y);
    case 1: return multiply<1, false>(tile, chunk, levels, quads, c, y);
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

template <int Planes, bool Table>
void expand(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  const Unpack<Planes, Table> unpack(levels, width);
  // Four bytes of lane k at 4 r go to lane r at 4 k: then outputs are in order.
  const __m512i in_order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const std::uint8_t* record = tile.records + std::size_t{channel} * kRecordBytes;
  for (int block = 0; block < tile.blocks; ++block) {
    const std::size_t at = std::size_t{channel} * tile.line + 16 * block;
    alignas(64) std::uint8_t codes[kBlockOutputs];
    _mm512_store_si512(codes, _mm512_permutexvar_epi32(in_order, unpack(tile.planes, at)));
    for (int r = 0; r < 4; ++r) {
      const int g = 2 * block + r / 2;
      const __m512 scale = _mm512_set1_ps(levels.largest * factor_of(record[g]));
      const __m512 zero = _mm512_set1_ps(static_cast<float>(record[kTileGroups + g]) - levels.offset[width]);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * r)));
      _mm512_storeu_ps(weights + kBlockOutputs * block + 16 * r,
                       _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero)));
    }
  }
}

void expand_lanes(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  switch (width) {
    case 8:
    case 7: return expand<4, false>(tile, levels, channel, width, weights);
    case 6:
    case 5: return expand<3, false>(tile, levels, channel, width, weights);
    case 4: return expand<2, true>(tile, levels, channel, width, weights);
    case 3: return expand<2, false>(tile, levels, channel, width, weights);
    case 2: return expand<1, true>(tile, levels, channel, width, weights);
    default: return expand<1, false>(tile, levels, channel, width, weights);
  }
}

int collect_lanes(const std::uint8_t* widths, const float* x, int size, int width, std::uint32_t* channels,
                  float* values) {
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(width));
  __m512i indices = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int count = 0;
  for (int j = 0; j < size; j += 16, indices = _mm512_add_epi32(indices, _mm512_set1_epi32(16))) {
    const __mmask16 there = size - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - j)) - 1);
    const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(there, _mm_maskz_loadu_epi8(there, widths + j), wanted);
    _mm512_storeu_si512(channels + count, _mm512_maskz_compress_epi32(chosen, indices));
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(chosen, _mm512_maskz_loadu_ps(there, x + j)));
    count += __builtin_popcount(chosen);
  }
  return count;
}

constexpr FloatKernels floats() {
  FloatKernels kernels = kFloats;
  kernels.collect = collect_lanes;
  return kernels;
}

const Kernels kAvx512 = {"avx512", tile_chunk, prefetch, expand_lanes, to_bfloat16, floats()};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

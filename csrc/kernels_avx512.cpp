// AVX-512 with byte dot products (VNNI). Coefficients of 16 bits are split into two signed bytes, so that one unpacked
// byte of weights meets both and the sums are exact.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#include <immintrin.h>

#include "expand.inl"
#include "floats.inl"

namespace quicksilver {
namespace {

constexpr int kQuads = kChunkChannels / 4;

// The leading bytes of coefficients, [quads, groups] words of four channels, and after them the trailing bytes.
std::int32_t* leading(Coefficients& c) { return c.words; }
std::int32_t* trailing(Coefficients& c) { return c.words + kQuads * kTileGroups; }

// 8 bytes of each of two channels' records, one channel after the other.
__m128i two_records(const Tile& tile, const std::uint32_t* channels, int part) {
  const auto load = [&](int j) {
    return _mm_loadl_epi64(
        reinterpret_cast<const __m128i*>(tile.records + std::size_t{channels[j]} * kRecordBytes + part));
  };
  return _mm_unpacklo_epi64(load(0), load(1));
}

__m512 factors(__m512i exponents, __m512 fractions) {
  const __m512i bits = _mm512_castps_si512(_mm512_permutexvar_ps(exponents, fractions));  // reads four bits of each
  return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(_mm512_srli_epi32(exponents, 4), 23)));
}

// Byte `which` of words [2 channels, 8 groups] of `first` and of `second`, as [8 groups, 4 channels].
__m256i bytes_by_group(__m512i first, __m512i second, int which) {
  alignas(64) static const std::uint8_t kBytes[64] = {
      0,  32, 64, 96,  4,  36, 68, 100, 8,  40, 72, 104, 12, 44, 76, 108,
      16, 48, 80, 112, 20, 52, 84, 116, 24, 56, 88, 120, 28, 60, 92, 124,
  };
  const __m512i picked = _mm512_add_epi8(_mm512_load_si512(kBytes), _mm512_set1_epi8(static_cast<char>(which)));
  return _mm512_castsi512_si256(_mm512_permutex2var_epi8(first, picked, second));
}

// Zeros of four channels, [8 groups, 4 channels].
__m256i zeros_by_group(const Tile& tile, const std::uint32_t* channels) {
  const __m256i rows = _mm256_set_m128i(two_records(tile, channels + 2, kTileGroups), two_records(tile, channels, kTileGroups));
  const __m256i pairs = _mm256_unpacklo_epi8(rows, _mm256_srli_si256(rows, 8));  // [2 x (groups, 2 channels)]
  const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
  return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
}

__m256 halves_max(__m512 v) { return _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// head * 256 + tail.
__m256i joined(__m256i head, __m256i tail) { return _mm256_add_epi32(_mm256_slli_epi32(head, 8), tail); }

void round_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, int quads, Coefficients& c) {
  const __m512 fractions = _mm512_loadu_ps(kFractions);
  const __m512i spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512 largest = _mm512_setzero_ps();
  for (int j = 0; j < 4 * quads; j += 2) {
    const __m512 x = _mm512_permutexvar_ps(
        spread, _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunk.x + j)))));
    const __m512i exponents = _mm512_cvtepu8_epi32(two_records(tile, chunk.channels + j, 0));
    const __m512 raw = _mm512_mul_ps(x, factors(exponents, fractions));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(raw));
    _mm512_store_ps(c.raw + j * kTileGroups, raw);
  }
  const __m256 most = halves_max(largest);
  const __mmask8 some = _mm256_cmp_ps_mask(most, _mm256_set1_ps(kSmallest), _CMP_GT_OQ);
  const __m512 inverse = _mm512_broadcast_f32x8(_mm256_maskz_div_ps(some, _mm256_set1_ps(kSteps), most));
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i heads = _mm256_setzero_si256(), tails = heads, zero_heads = heads, zero_tails = heads;
  for (int quad = 0; quad < quads; ++quad) {
    const float* raw = c.raw + 4 * quad * kTileGroups;
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(raw), inverse));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(raw + 16), inverse));
    const __m512i half = _mm512_set1_epi32(128);  // so that what the low byte leaves out is a signed byte
    const __m256i head = bytes_by_group(_mm512_add_epi32(first, half), _mm512_add_epi32(second, half), 1);
    const __m256i tail = bytes_by_group(first, second, 0);
    const __m256i zeros = zeros_by_group(tile, chunk.channels + 4 * quad);
    heads = _mm256_dpbusd_epi32(heads, ones, head);
    tails = _mm256_dpbusd_epi32(tails, ones, tail);
    zero_heads = _mm256_dpbusd_epi32(zero_heads, zeros, head);
    zero_tails = _mm256_dpbusd_epi32(zero_tails, zeros, tail);
    _mm256_store_si256(reinterpret_cast<__m256i*>(leading(c) + quad * kTileGroups), head);
    _mm256_store_si256(reinterpret_cast<__m256i*>(trailing(c) + quad * kTileGroups), tail);
  }
  const __m256 scales = _mm256_mul_ps(_mm256_mul_ps(most, _mm256_set1_ps(1.0f / kSteps)), _mm256_set1_ps(levels.largest));
  const __m256 sum = _mm256_cvtepi32_ps(joined(heads, tails));
  _mm256_store_ps(c.scales, scales);
  _mm256_store_ps(c.offsets, _mm256_mul_ps(scales, _mm256_mul_ps(sum, _mm256_set1_ps(levels.offset[chunk.width]))));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), joined(zero_heads, zero_tails));
}

// Unpacks 64 of a half's 128 codes: those of groups 2 i and 2 i + 1 of each lane, a lane's 16 bytes.
template <int Planes, bool Table>
struct Unpack {
  __m512i table, kept;
  bool odd;

  Unpack(const Levels& levels, int width) : odd(width % 2 == 1) {
    const std::uint8_t* entries = width == 4 ? levels.table4 : levels.table2;
    table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    kept = _mm512_set1_epi8(static_cast<char>(0xff << (kMaxWidth - width)));
  }

  // Eight codes' bits, a byte of each bit from the leading one on, become their eight bytes.
  static __m512i transposed(__m512i bits) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), bits, 0);
  }

  // One channel's words of a half, four of each lane: groups 0 to 3.
  void operator()(const __m512i* words, __m512i* codes) const {
    const __m512i none = _mm512_setzero_si512();
    __m512i first, second;  // pairs of planes, [group] words of two
    if (Table) {            // the codes in the low bits, as indices
      second = Planes == 2 ? words[0] : none;
      second = _mm512_unpacklo_epi16(second, words[Planes - 1]);
      first = none;
    } else {
      first = _mm512_unpacklo_epi16(words[0], Planes > 1 ? words[1] : none);
      second = Planes > 2 ? _mm512_unpacklo_epi16(words[2], Planes > 3 ? words[3] : none) : none;
    }
    codes[0] = transposed(_mm512_unpacklo_epi32(first, second));
    codes[1] = transposed(_mm512_unpackhi_epi32(first, second));
    for (int i = 0; i < 2; ++i) {
      if (Table) codes[i] = _mm512_shuffle_epi8(table, codes[i]);
      if (!Table && odd) codes[i] = _mm512_and_si512(codes[i], kept);
    }
  }
};

// A channel's words of one half in one plane, in the low 8 bytes of each lane.
template <bool Full>
__m512i load_half(const std::uint8_t* line, int half) {
  if (!Full) {
    const __m512i run = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), run);
  }
  const __m512i run = _mm512_loadu_si512(line);
  return half ? _mm512_unpackhi_epi64(run, run) : run;
}

struct Sums {
  __m512i head[8], tail[8];
};

// Adds 64 codes of each of four channels: bytes become [output, channel], 16 outputs' words in each register.
inline void add_quad(const __m512i* c, const std::int32_t* head, const std::int32_t* tail, __m512i* heads,
                     __m512i* tails) {
  const __m512i low01 = _mm512_unpacklo_epi8(c[0], c[1]), high01 = _mm512_unpackhi_epi8(c[0], c[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(c[2], c[3]), high23 = _mm512_unpackhi_epi8(c[2], c[3]);
  const __m512i codes[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                            _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
  for (int m = 0; m < 4; ++m) {
    heads[m] = _mm512_dpbusd_epi32(heads[m], codes[m], _mm512_set1_epi32(head[m / 2]));
    tails[m] = _mm512_dpbusd_epi32(tails[m], codes[m], _mm512_set1_epi32(tail[m / 2]));
  }
}

// Fetches what a channel of the coming chunk reads. Inlined: a call would empty the vector registers.
inline void fetch(const Upcoming& next, int j) {
  const std::size_t channel = next.channels[j];
  for (int p = 0; p < next.planes; ++p) {
    _mm_prefetch(reinterpret_cast<const char*>(next.tile->planes[p] + channel * next.tile->line), _MM_HINT_T1);
  }
  _mm_prefetch(reinterpret_cast<const char*>(next.tile->records + channel * kRecordBytes), _MM_HINT_T1);
}

constexpr int kRun = 8;  // quads that one half goes through before the other: memory is read in small bursts

// Adds quads [begin, end) of one half to its sums.
template <int Planes, bool Table, bool Full>
void add_quads(const Tile& tile, const Chunk& chunk, const Unpack<Planes, Table>& unpack, int half, int begin, int end,
               Coefficients& c, Sums& kept, const Upcoming& next) {
  const std::size_t line = tile.line;
  Sums sums = kept;
  const int ahead = Full ? 2 : 4;  // channels fetched while one quad is added
  for (int quad = begin; quad < end; ++quad) {
    const std::uint32_t* channels = chunk.channels + 4 * quad;
    __m512i codes[2][4];
    for (int j = 0; j < 4; ++j) {
      __m512i words[Planes], unpacked[2];
      for (int p = 0; p < Planes; ++p) words[p] = load_half<Full>(tile.planes[p] + channels[j] * line, half);
      unpack(words, unpacked);
      codes[0][j] = unpacked[0];
      codes[1][j] = unpacked[1];
    }
    for (int j = 0; j < ahead; ++j) {
      const int fetched = quad * 4 + half * ahead + j;
      if (fetched < next.count) fetch(next, fetched);
    }
    const int at = quad * kTileGroups + 4 * half;
    add_quad(codes[0], leading(c) + at, trailing(c) + at, sums.head, sums.tail);
    add_quad(codes[1], leading(c) + at + 2, trailing(c) + at + 2, sums.head + 4, sums.tail + 4);
  }
  kept = sums;
}

void finish(const Sums& sums, int half, const Coefficients& c, float* y) {
  for (int a = 0; a < 8; ++a) {
    const int g = 4 * half + a / 2;
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums.head[a], 8), sums.tail[a]);
    const __m512 part = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(c.scales[g]), _mm512_cvtepi32_ps(sum)),
                                      _mm512_set1_ps(c.offsets[g]));
    float* out = y + kHalfOutputs * half + 16 * a;
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), part));
  }
}

template <int Planes, bool Table>
void multiply(const Tile& tile, const Chunk& chunk, const Levels& levels, int quads, Coefficients& c, float* y,
              const Upcoming& next) {
  const Unpack<Planes, Table> unpack(levels, chunk.width);
  Sums sums[2];
  for (int half = 0; half < tile.halves; ++half) {
    for (int a = 0; a < 8; ++a) {
      sums[half].head[a] = _mm512_setzero_si512();
      sums[half].tail[a] = _mm512_set1_epi32(-c.zero_sums[4 * half + a / 2]);
    }
  }
  for (int begin = 0; begin < quads; begin += kRun) {
    const int end = begin + kRun < quads ? begin + kRun : quads;
    if (tile.halves == 1) {
      add_quads<Planes, Table, false>(tile, chunk, unpack, 0, begin, end, c, sums[0], next);
    } else {
      add_quads<Planes, Table, true>(tile, chunk, unpack, 0, begin, end, c, sums[0], next);
      add_quads<Planes, Table, true>(tile, chunk, unpack, 1, begin, end, c, sums[1], next);
    }
  }
  for (int half = 0; half < tile.halves; ++half) finish(sums[half], half, c, y);
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y,
                const Upcoming& next) {
  const int quads = (chunk.count + 3) / 4;
  round_coefficients(tile, chunk, levels, quads, c);
  switch (chunk.width) {
    case 8:
    case 7: return multiply<4, false>(tile, chunk, levels, quads, c, y, next);
    case 6:
    case 5: return multiply<3, false>(tile, chunk, levels, quads, c, y, next);
    case 4: return multiply<2, true>(tile, chunk, levels, quads, c, y, next);
    case 3: return multiply<2, false>(tile, chunk, levels, quads, c, y, next);
    case 2: return multiply<1, true>(tile, chunk, levels, quads, c, y, next);
    case 1: return multiply<1, false>(tile, chunk, levels, quads, c, y, next);
    default: return;
  }
}

// Weights of one channel, 64 codes at a time; see Unpack for their order.
template <int Planes, bool Table>
void expand(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  const Unpack<Planes, Table> unpack(levels, width);
  // Four bytes of lane k at 4 m go to lane m at 4 k: then outputs are in order.
  const __m512i in_order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const std::uint8_t* record = tile.records + std::size_t{channel} * kRecordBytes;
  for (int half = 0; half < tile.halves; ++half) {
    __m512i words[Planes], unpacked[2];
    for (int p = 0; p < Planes; ++p) {
      const std::uint8_t* line = tile.planes[p] + std::size_t{channel} * tile.line;
      words[p] = tile.halves == 1 ? load_half<false>(line, half) : load_half<true>(line, half);
    }
    unpack(words, unpacked);
    alignas(64) std::uint8_t codes[kHalfOutputs];
    for (int i = 0; i < 2; ++i) _mm512_store_si512(codes + 64 * i, _mm512_permutexvar_epi32(in_order, unpacked[i]));
    for (int a = 0; a < 8; ++a) {
      const int g = 4 * half + a / 2;
      const __m512 scale = _mm512_set1_ps(levels.largest * factor_of(record[g]));
      const __m512 zero = _mm512_set1_ps(static_cast<float>(record[kTileGroups + g]) - levels.offset[width]);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * a)));
      _mm512_storeu_ps(weights + kHalfOutputs * half + 16 * a,
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

const Kernels kAvx512 = {"avx512", tile_chunk, expand_lanes, to_bfloat16, floats()};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

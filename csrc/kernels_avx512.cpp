// AVX-512 with byte dot products (VNNI). Coefficients of 16 bits are split into two signed bytes, so that one unpacked
// byte of weights meets both and the sums are exact.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#include <immintrin.h>

#include "codes.inl"
#include "expand.inl"
#include "fetch.inl"
#include "floats.inl"

namespace quicksilver {
namespace {

// A quad's coefficients: the leading bytes, [8 groups] words of four channels, and after them the trailing bytes.
const std::int32_t* leading(const Coefficients& c, int quad) { return c.words + 2 * kTileGroups * quad; }
const std::int32_t* trailing(const Coefficients& c, int quad) { return leading(c, quad) + kTileGroups; }

// Where to find bytes, as permutations take them.
struct Positions {
  alignas(64) std::uint8_t steps[64];  // of four records: words [channel, group], with every second byte masked
  alignas(64) std::uint8_t zeros[64];  // of four records: twice [group, channel]
  alignas(64) std::uint8_t split[64];  // of words [channel, group]: high bytes as [group, channel], then low ones

  constexpr Positions() : steps{}, zeros{}, split{} {
    for (int g = 0; g < kTileGroups; ++g) {
      for (int j = 0; j < 4; ++j) {
        steps[2 * (kTileGroups * j + g)] = static_cast<std::uint8_t>(kRecordBytes * j + g);
        zeros[4 * g + j] = zeros[32 + 4 * g + j] = static_cast<std::uint8_t>(kRecordBytes * j + kTileGroups + g);
        split[4 * g + j] = static_cast<std::uint8_t>(2 * (kTileGroups * j + g) + 1);
        split[32 + 4 * g + j] = static_cast<std::uint8_t>(2 * (kTileGroups * j + g));
      }
    }
  }
};
constexpr Positions kPositions;

__m512i four_records(const Tile& tile, const std::uint32_t* channels) {
  const auto load = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.record(channels[j]))); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load(2)), load(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Sums of leading bytes times 256 plus those of trailing bytes.
__m256i joined(__m512i sums) {
  return _mm256_add_epi32(_mm256_slli_epi32(_mm512_castsi512_si256(sums), 8), _mm512_extracti64x4_epi64(sums, 1));
}

void make_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c) {
  const __m512i table = _mm512_loadu_si512(kMultipliers);
  const __m512i step_bytes = _mm512_load_si512(kPositions.steps);
  const __m512i zero_bytes = _mm512_load_si512(kPositions.zeros), split_bytes = _mm512_load_si512(kPositions.split);
  const __m512i spread =
      _mm512_cvtepu8_epi16(_mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
  // So that what the low byte leaves out is a signed byte.
  const __m512i half = _mm512_set1_epi16(128);
  const __m512i sign = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(static_cast<char>(0x80)), 1);
  __m512i zero_sums = _mm512_setzero_si512();
  __m256 offset = _mm256_setzero_ps();
  int quad = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    __m512i sums = _mm512_setzero_si512();
    for (const int end = quad + part->slots / 4; quad < end; ++quad) {
      const __m512i records = four_records(tile, chunk.channels + 4 * quad);
      const __m512i steps = _mm512_maskz_permutexvar_epi8(0x5555555555555555, step_bytes, records);
      const __m512i multipliers =  // reads five bits of each
          _mm512_srlv_epi16(_mm512_permutexvar_epi16(steps, table), _mm512_srli_epi16(steps, 4));
      const __m512i x = _mm512_permutexvar_epi16(
          spread, _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunk.x + 4 * quad))));
      const __m512i words = _mm512_add_epi16(_mm512_mulhrs_epi16(x, multipliers), half);
      const __m512i bytes = _mm512_xor_si512(_mm512_permutexvar_epi8(split_bytes, words), sign);
      _mm512_store_si512(c.words + 2 * kTileGroups * quad, bytes);
      zero_sums = _mm512_dpbusd_epi32(zero_sums, _mm512_permutexvar_epi8(zero_bytes, records), bytes);
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), bytes);
    }
    const __m256 step = _mm256_set1_ps(levels.offset[part->width]);
    offset = _mm256_add_ps(offset, _mm256_mul_ps(_mm256_cvtepi32_ps(joined(sums)), step));
  }
  c.scale = chunk.unit * levels.unit;
  _mm256_store_ps(c.offsets, _mm256_mul_ps(_mm256_set1_ps(c.scale), offset));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c.zero_sums), joined(zero_sums));
}

struct Vector {
  using Bytes = __m512i;

  static Bytes repeated(const std::uint8_t* table) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static Bytes looked_up(Bytes table, Bytes indices) { return _mm512_shuffle_epi8(table, indices); }
  // Bits of Mask from x, the others from y.
  template <std::uint8_t Mask>
  static Bytes select(Bytes x, Bytes y) {
    return _mm512_ternarylogic_epi64(x, y, _mm512_set1_epi8(static_cast<char>(Mask)), 0xe4);
  }
  template <std::uint64_t Matrix>
  static Bytes permuted(Bytes x) {
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(static_cast<long long>(Matrix)), 0);
  }
};

// A channel's line in one plane, of both halves; of a lone half, its words in the low 8 bytes of each lane.
template <bool Full>
__m512i load_line(const std::uint8_t* line) {
  if (Full) return _mm512_loadu_si512(line);
  const __m512i run = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
  return _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), run);
}

struct Sums {
  __m512i head[8], tail[8];
};

// One half's bytes of four channels' lines, side by side: [16 outputs, channel] in each register.
template <int Half>
[[gnu::always_inline]] inline void interleave(const __m512i* lines, __m512i* first, __m512i* second) {
  const auto paired = [](__m512i a, __m512i b) {
    return Half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
  };
  const __m512i left = paired(lines[0], lines[1]), right = paired(lines[2], lines[3]);
  *first = _mm512_unpacklo_epi16(left, right);
  *second = _mm512_unpackhi_epi16(left, right);
}

// Adds quads [begin, end), read at one width, of one half to its sums.
template <int Width, bool Full, int Half>
[[gnu::always_inline]] inline void add_quads(const Tile& tile, const Chunk& chunk, const Levels& levels, int begin,
                                             int end, const Coefficients& c, Sums& sums, Upcoming& next) {
  constexpr int planes = planes_of(Width);
  const Unpack<Vector, Width> unpack(levels);
  for (int quad = begin; quad < end; ++quad) {
    fetch(next);
    const std::uint32_t* channels = chunk.channels + 4 * quad;
    const std::size_t at[kQuadChannels] = {channels[0] * tile.stride, channels[1] * tile.stride,
                                           channels[2] * tile.stride, channels[3] * tile.stride};
    __m512i bytes[2][planes];  // of each plane, of sums 0 to 3 and of 4 to 7
#pragma GCC unroll 4
    for (int p = 0; p < planes; ++p) {
      const auto line = [&](int j) {
        return load_line<Full>(tile.planes[p] + (p < 2 ? at[j] : 2 * at[j]));  // Tile::run; GCC multiplies in it anew
      };
      const __m512i lines[kQuadChannels] = {line(0), line(1), line(2), line(3)};
      interleave<Half>(lines, &bytes[0][p], &bytes[1][p]);
    }
    const std::int32_t *head = leading(c, quad) + 4 * Half, *tail = trailing(c, quad) + 4 * Half;
#pragma GCC unroll 2
    for (int m = 0; m < 2; ++m) {
      __m512i codes[kFields];
      unpack(bytes[m], codes);
#pragma GCC unroll 4
      for (int k = 0; k < kFields; ++k) {
        const int a = kFields * m + k;
        sums.head[a] = _mm512_dpbusd_epi32(sums.head[a], codes[k], _mm512_set1_epi32(head[a / 2]));
        sums.tail[a] = _mm512_dpbusd_epi32(sums.tail[a], codes[k], _mm512_set1_epi32(tail[a / 2]));
      }
    }
  }
}

// Writes a half's sums, scaled, to y, or adds them.
template <int Half>
[[gnu::always_inline]] inline void finish(const Sums& sums, const Coefficients& c, bool adds, float* y) {
#pragma GCC unroll 8
  for (int a = 0; a < 8; ++a) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums.head[a], 8), sums.tail[a]);
    const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(c.scale), _mm512_cvtepi32_ps(sum));
    const __m512 part = _mm512_add_ps(scaled, _mm512_set1_ps(c.offsets[4 * Half + a / 2]));
    float* out = y + kHalfOutputs * Half + 16 * a;
    _mm512_storeu_ps(out, adds ? _mm512_add_ps(_mm512_loadu_ps(out), part) : part);
  }
}

// A half's share of a chunk. Registers hold its sums; a cache near by keeps what the other half reads again.
template <bool Full, int Half>
void half_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, const Coefficients& c, bool adds, float* y,
                Upcoming& next) {
  Sums sums;
#pragma GCC unroll 8
  for (int a = 0; a < 8; ++a) {
    sums.head[a] = _mm512_setzero_si512();
    sums.tail[a] = _mm512_set1_epi32(-c.zero_sums[4 * Half + a / 2]);
  }
  int quad = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    const int end = quad + part->slots / kQuadChannels;
    at_width(part->width, [&](auto width) {
      add_quads<decltype(width)::value, Full, Half>(tile, chunk, levels, quad, end, c, sums, next);
    });
    quad = end;
  }
  finish<Half>(sums, c, adds, y);
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, bool adds, float* y,
                Upcoming& next) {
  make_coefficients(tile, chunk, levels, c);
  if (tile.halves == 1) {
    half_chunk<false, 0>(tile, chunk, levels, c, adds, y, next);
  } else {
    half_chunk<true, 0>(tile, chunk, levels, c, adds, y, next);
    half_chunk<true, 1>(tile, chunk, levels, c, adds, y, next);
  }
}

// Weights of one channel, 16 outputs at a time.
template <int Width>
void expand_at(const Tile& tile, const Levels& levels, std::uint32_t channel, float* weights) {
  // Four bytes of [lane, half, byte / 4] go to [half, byte / 4, lane]: then outputs are in order.
  const __m512i in_order = tile.halves == 1 ? _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 5, 3, 1, 6, 4, 2, 0)
                                            : _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __mmask16 there = tile.halves == 1 ? 0x00ff : 0xffff;
  __m512i lines[planes_of(Width)], codes[kFields];
  for (int p = 0; p < planes_of(Width); ++p) lines[p] = _mm512_maskz_loadu_epi32(there, tile.run(p, channel));
  Unpack<Vector, Width>{levels}(lines, codes);
  alignas(64) std::uint8_t stored[kFields][64];
  for (int k = 0; k < kFields; ++k) _mm512_store_si512(stored[k], _mm512_permutexvar_epi32(in_order, codes[k]));
  const std::uint8_t* record = tile.record(channel);
  for (int a = 0; a < tile.outputs() / 16; ++a) {
    const __m512 scale = _mm512_set1_ps(levels.largest * factor_of(tile.bases[channel] + record[a / 2]));
    const __m512 zero = _mm512_set1_ps(static_cast<float>(record[kTileGroups + a / 2]) - levels.offset[Width]);
    const std::uint8_t* from = stored[a % kFields] + 16 * (a / kFields);
    const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
    _mm512_storeu_ps(weights + 16 * a, _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero)));
  }
}

void expand_lanes(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  at_width(width, [&](auto each) { expand_at<decltype(each)::value>(tile, levels, channel, weights); });
}

int collect_lanes(const std::uint8_t* widths, const float* x, int size, int width, std::uint32_t first,
                  std::uint32_t* channels, float* values) {
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(width));
  const __m512i ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i indices = _mm512_add_epi32(ascending, _mm512_set1_epi32(static_cast<int>(first)));
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

const Kernels kAvx512 = {"avx512", tile_chunk, expand_lanes, floats()};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

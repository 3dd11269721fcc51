// AVX-512 with byte dot products (VNNI). Coefficients of 16 bits are split into two signed bytes, so that one unpacked
// byte of weights meets both and the sums are exact.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#include <immintrin.h>

#include <algorithm>

#include "codes.inl"
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
    const __m256 step = _mm256_set1_ps(levels.offset[part->bits]);
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
  static Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
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

// Four channels' bytes of a plane in a half: [16 outputs, channel] in each of two registers. Of runs, a line has those
// of both halves; of a lone half, its words are put into the low 8 bytes of each lane.
template <bool Full, int Half>
struct Runs {
  static constexpr int half = Half;
  const Tile& tile;
  const std::size_t at[kQuadChannels];  // in planes 0 and 1; twice as far in 2 and 3

  Runs(const Tile& tile, const std::uint32_t* channels, int)
      : tile(tile),
        at{channels[0] * tile.stride, channels[1] * tile.stride, channels[2] * tile.stride, channels[3] * tile.stride} {
  }

  [[gnu::always_inline]] void load(int plane, __m512i* first, __m512i* second) const {
    const __m512i left = paired(line(plane, 0), line(plane, 1)), right = paired(line(plane, 2), line(plane, 3));
    *first = _mm512_unpacklo_epi16(left, right);
    *second = _mm512_unpackhi_epi16(left, right);
  }

 private:
  [[gnu::always_inline]] __m512i line(int plane, int j) const {
    const std::uint8_t* from = tile.planes[plane] + (plane < 2 ? at[j] : 2 * at[j]);
    if (Full) return _mm512_loadu_si512(from);
    const __m512i run = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), run);
  }
  [[gnu::always_inline]] static __m512i paired(__m512i a, __m512i b) {
    return Half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
  }
};

template <int Half>
struct Quads {
  static constexpr int half = Half;
  const Tile& tile;
  const std::size_t at;

  Quads(const Tile& tile, const std::uint32_t*, int quad) : tile(tile), at(Tile::quad_offset(Half, quad)) {}

  [[gnu::always_inline]] void load(int plane, __m512i* first, __m512i* second) const {
    const std::uint8_t* from = tile.planes[plane] + (plane < 2 ? at : 2 * at);
    *first = _mm512_loadu_si512(from);
    *second = _mm512_loadu_si512(from + 64);
  }
};

// Calls `run` with a pointer, null, of the type that reads each half of a tile.
template <class Run>
[[gnu::always_inline]] inline void at_halves(const Tile& tile, const Run& run) {
  if (tile.layout == Layout::kQuads) {
    run(static_cast<Quads<0>*>(nullptr));
    if (tile.halves == 2) run(static_cast<Quads<1>*>(nullptr));
  } else if (tile.halves == 2) {
    run(static_cast<Runs<true, 0>*>(nullptr));
    run(static_cast<Runs<true, 1>*>(nullptr));
  } else {
    run(static_cast<Runs<false, 0>*>(nullptr));
  }
}

struct Sums {
  __m512i head[8], tail[8];
};

// Adds quads [begin, end), read at one number of bits, of one half to its sums.
template <int Bits, class Source>
[[gnu::always_inline]] inline void add_quads(const Tile& tile, const Chunk& chunk, const Levels& levels, int begin,
                                             int end, const Coefficients& c, Sums& sums, Upcoming& next) {
  constexpr int planes = planes_of(Bits);
  const Unpack<Vector, Bits> unpack(levels);
  for (int quad = begin; quad < end; ++quad) {
    fetch(next);
    const Source source(tile, chunk.channels + kQuadChannels * quad, quad);
    __m512i bytes[2][planes];  // of each plane, of sums 0 to 3 and of 4 to 7
#pragma GCC unroll 4
    for (int p = 0; p < planes; ++p) source.load(p, &bytes[0][p], &bytes[1][p]);
    const std::int32_t *head = leading(c, quad) + 4 * Source::half, *tail = trailing(c, quad) + 4 * Source::half;
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
template <class Source>
void half_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, const Coefficients& c, bool adds, float* y,
                Upcoming& next) {
  Sums sums;
#pragma GCC unroll 8
  for (int a = 0; a < 8; ++a) {
    sums.head[a] = _mm512_setzero_si512();
    sums.tail[a] = _mm512_set1_epi32(-c.zero_sums[4 * Source::half + a / 2]);
  }
  int quad = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    const int end = quad + part->slots / kQuadChannels;
    at_bits(part->bits, [&](auto bits) {
      add_quads<decltype(bits)::value, Source>(tile, chunk, levels, quad, end, c, sums, next);
    });
    quad = end;
  }
  finish<Source::half>(sums, c, adds, y);
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, bool adds, float* y,
                Upcoming& next) {
  make_coefficients(tile, chunk, levels, c);
  at_halves(tile, [&](auto* source) {
    half_chunk<std::remove_pointer_t<decltype(source)>>(tile, chunk, levels, c, adds, y, next);
  });
}

int collect_lanes(const std::uint8_t* each, const float* x, int size, int bits, std::uint32_t* channels,
                  float* values) {
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(bits));
  __m512i indices = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int count = 0;
  for (int j = 0; j < size; j += 16, indices = _mm512_add_epi32(indices, _mm512_set1_epi32(16))) {
    const __mmask16 there = size - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - j)) - 1);
    const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(there, _mm_maskz_loadu_epi8(there, each + j), wanted);
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

const Kernels kAvx512 = {"avx512", tile_chunk, floats()};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

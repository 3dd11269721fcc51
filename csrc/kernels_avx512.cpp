// AVX-512 with byte dot products (VNNI). Coefficients of 16 bits are split into two signed bytes, so that one unpacked
// byte of weights meets both and the sums are exact.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#include <immintrin.h>

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

// Unpacks a half's 128 codes, four words of eight codes in each lane. codes[i] holds those of words i and i + 2.
template <int Width>
struct Unpack {
  static constexpr int Planes = planes_of(Width);
  static constexpr bool Table = Width == 4 || Width == 2;
  __m512i table, kept;

  explicit Unpack(const Levels& levels) {
    const std::uint8_t* entries = Width == 4 ? levels.table4 : levels.table2;
    table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
    kept = _mm512_set1_epi8(static_cast<char>(0xff << (kMaxWidth - Width)));
  }

  // Eight bytes, of one bit of each of eight codes, the first byte's leading, become the codes' eight bytes.
  static __m512i transposed(__m512i bits) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), bits, 0);
  }

  // `lines`: one channel's in each plane; the half's words are the low or the high 8 bytes of each lane.
  template <bool High>
  void operator()(const __m512i* lines, __m512i* codes) const {
    const auto paired = [](__m512i a, __m512i b) {
      return High ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
    };
    if (Table && Planes == 1) {  // four words' codes in one byte
      const __m512i line = lines[0];
      const __m512i packed = transposed(High ? _mm512_unpackhi_epi64(line, line) : _mm512_unpacklo_epi64(line, line));
      codes[0] = looked_up(_mm512_srlv_epi64(packed, _mm512_set_epi64(2, 6, 2, 6, 2, 6, 2, 6)), 3);
      codes[1] = looked_up(_mm512_srlv_epi64(packed, _mm512_set_epi64(0, 4, 0, 4, 0, 4, 0, 4)), 3);
    } else if (Table) {  // two words' codes in one byte
      const __m512i packed = transposed(paired(lines[0], lines[1]));
      codes[0] = looked_up(_mm512_srli_epi64(packed, 4), 15);
      codes[1] = looked_up(packed, 15);
    } else {
      const __m512i none = _mm512_setzero_si512();
      const __m512i first = paired(lines[0], Planes > 1 ? lines[1] : none);
      const __m512i second = Planes > 2 ? paired(lines[2], Planes > 3 ? lines[3] : none) : none;
      codes[0] = transposed(_mm512_mask_shuffle_epi32(first, 0xaaaa, second, _MM_PERM_CCAA));
      codes[1] = transposed(_mm512_mask_shuffle_epi32(second, 0x5555, first, _MM_PERM_DDBB));
      if (Width % 2) codes[0] = _mm512_and_si512(codes[0], kept);
      if (Width % 2) codes[1] = _mm512_and_si512(codes[1], kept);
    }
  }

  __m512i looked_up(__m512i indices, char mask) const {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(indices, _mm512_set1_epi8(mask)));
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

// Adds quads [begin, end), read at one width, of one half to its sums.
template <int Width, bool Full, int Half>
inline void add_quads(const Tile& tile, const Chunk& chunk, const Levels& levels, int begin, int end,
                      const Coefficients& c, Sums& sums, Upcoming& next) {
  const Unpack<Width> unpack(levels);
  for (int quad = begin; quad < end; ++quad) {
    const std::uint32_t* channels = chunk.channels + 4 * quad;
    __m512i codes[2][4];
    for (int j = 0; j < 4; ++j) {
      __m512i lines[planes_of(Width)], unpacked[2];
      for (int p = 0; p < planes_of(Width); ++p) lines[p] = load_line<Full>(tile.run(p, channels[j]));
      unpack.template operator()<Half == 1>(lines, unpacked);
      codes[0][j] = unpacked[0];
      codes[1][j] = unpacked[1];
    }
    fetch(next);
    const std::int32_t *head = leading(c, quad) + 4 * Half, *tail = trailing(c, quad) + 4 * Half;
    add_quad(codes[0], head, tail, sums.head, sums.tail);
    add_quad(codes[1], head + 2, tail + 2, sums.head + 4, sums.tail + 4);
  }
}

// Adds quads [begin, end) of one half to its sums, which registers hold meanwhile.
template <bool Full, int Half>
void add_run(const Tile& tile, const Chunk& chunk, const Levels& levels, int begin, int end, const Coefficients& c,
             Sums& kept, Upcoming& next) {
  Sums sums = kept;
  int first = 0;
  for (const Part* part = chunk.parts; first < end; ++part) {
    const int last = first + part->slots / 4, from = first > begin ? first : begin, to = last < end ? last : end;
    first = last;
    switch (part->width) {
      case 8:
        add_quads<8, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 7:
        add_quads<7, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 6:
        add_quads<6, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 5:
        add_quads<5, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 4:
        add_quads<4, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 3:
        add_quads<3, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      case 2:
        add_quads<2, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
        break;
      default:
        add_quads<1, Full, Half>(tile, chunk, levels, from, to, c, sums, next);
    }
  }
  kept = sums;
}

constexpr int kRun = 8;  // quads that one half goes through before the other: a cache near by keeps what they read

void finish(const Sums& sums, int half, const Coefficients& c, float* y) {
  for (int a = 0; a < 8; ++a) {
    const int g = 4 * half + a / 2;
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums.head[a], 8), sums.tail[a]);
    const __m512 part =
        _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(c.scale), _mm512_cvtepi32_ps(sum)), _mm512_set1_ps(c.offsets[g]));
    float* out = y + kHalfOutputs * half + 16 * a;
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), part));
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, float* y, Upcoming& next) {
  make_coefficients(tile, chunk, levels, c);
  Sums sums[2];
  for (int half = 0; half < tile.halves; ++half) {
    for (int a = 0; a < 8; ++a) {
      sums[half].head[a] = _mm512_setzero_si512();
      sums[half].tail[a] = _mm512_set1_epi32(-c.zero_sums[4 * half + a / 2]);
    }
  }
  const int quads = chunk.slots / 4;
  for (int begin = 0; begin < quads; begin += kRun) {
    const int end = begin + kRun < quads ? begin + kRun : quads;
    if (tile.halves == 1) {
      add_run<false, 0>(tile, chunk, levels, begin, end, c, sums[0], next);
    } else {
      add_run<true, 0>(tile, chunk, levels, begin, end, c, sums[0], next);
      add_run<true, 1>(tile, chunk, levels, begin, end, c, sums[1], next);
    }
  }
  for (int half = 0; half < tile.halves; ++half) finish(sums[half], half, c, y);
}

// Weights of one channel, 64 codes at a time; see Unpack for their order.
template <int Width>
void expand(const Tile& tile, const Levels& levels, std::uint32_t channel, float* weights) {
  const Unpack<Width> unpack(levels);
  // Four bytes of lane k at 4 m go to lane m at 4 k: then outputs are in order.
  const __m512i in_order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const std::uint8_t* record = tile.record(channel);
  for (int half = 0; half < tile.halves; ++half) {
    __m512i lines[planes_of(Width)], unpacked[2];
    for (int p = 0; p < planes_of(Width); ++p) {
      const std::uint8_t* line = tile.run(p, channel);
      lines[p] = tile.halves == 1 ? load_line<false>(line) : load_line<true>(line);
    }
    if (half) {
      unpack.template operator()<true>(lines, unpacked);
    } else {
      unpack.template operator()<false>(lines, unpacked);
    }
    alignas(64) std::uint8_t codes[kHalfOutputs];
    for (int i = 0; i < 2; ++i) _mm512_store_si512(codes + 64 * i, _mm512_permutexvar_epi32(in_order, unpacked[i]));
    for (int a = 0; a < 8; ++a) {
      const int g = 4 * half + a / 2;
      const __m512 scale = _mm512_set1_ps(levels.largest * factor_of(tile.bases[channel] + record[g]));
      const __m512 zero = _mm512_set1_ps(static_cast<float>(record[kTileGroups + g]) - levels.offset[Width]);
      const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * a)));
      _mm512_storeu_ps(weights + kHalfOutputs * half + 16 * a,
                       _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero)));
    }
  }
}

void expand_lanes(const Tile& tile, const Levels& levels, std::uint32_t channel, int width, float* weights) {
  using Expand = void (*)(const Tile&, const Levels&, std::uint32_t, float*);
  static constexpr Expand kExpand[kMaxWidth + 1] = {nullptr,   expand<1>, expand<2>, expand<3>, expand<4>,
                                                    expand<5>, expand<6>, expand<7>, expand<8>};
  kExpand[width](tile, levels, channel, weights);
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

const Kernels kAvx512 = {"avx512", tile_chunk, expand_lanes, to_bfloat16, floats()};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

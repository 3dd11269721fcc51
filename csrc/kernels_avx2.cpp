// AVX2: codes of four bits meet bytes in pairs, whose sums over half a group fit 16 bits.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include <cstring>

#include "floats.inl"
#include "tiles.inl"

namespace quicksilver {
namespace {

struct Vector {
  using Bytes = __m256i;
  using Floats = __m256;
  static constexpr bool kJoins = false;  // sums of two products with bytes of 8 bits would not fit
  static constexpr int kFloats = 8, kRows = 2;

  static Bytes load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  // Two bits of each: what the first lane's outputs have, and the second's.
  static Bytes load_fields(const std::uint8_t* from) {
    return down_by_lane(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }

  static Bytes repeated(std::uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  static Bytes words(std::int32_t x) { return _mm256_set1_epi32(x); }
  static Bytes quad(const std::int8_t* from) {
    std::int32_t word;
    std::memcpy(&word, from, sizeof word);
    return words(word);
  }
  static Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  static Bytes down4(Bytes x) { return _mm256_srli_epi16(x, 4); }
  static Bytes down2(Bytes x) { return _mm256_srli_epi16(x, 2); }
  static Bytes down_by_lane(Bytes x) { return _mm256_srlv_epi32(x, _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0)); }

  // Codes are below 16: a half's sums of two products with at most 127 stay below 2 ** 15.
  static Bytes dot(Bytes sums, Bytes codes, Bytes x) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x)); }
  static Bytes add_part(Bytes total, Bytes part, int shift) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(part, _mm256_set1_epi16(static_cast<short>(1 << shift))));
  }

  static Floats floats(float x) { return _mm256_set1_ps(x); }
  static Floats to_floats(Bytes x) { return _mm256_cvtepi32_ps(x); }
  static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats times_added(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats times_taken(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
  static Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
  static void store_floats(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  static Floats halves(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Floats bytes(const std::uint8_t* from) {
    return to_floats(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static Floats signed_bytes(const std::uint8_t* from) {
    return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }

  // A tile, in vectors of 8 outputs.
  struct Layout {
    static constexpr int kVectors = 4, kTiles = 1;
    template <int Rows>
    static constexpr int kAtOnce = Rows == 1 ? 2 : 1;
    const std::size_t tile, bytes;

    Layout(int tile, std::size_t stride, bool) : tile(tile), bytes(tile * stride) {}
    std::size_t first_output() const { return tile * kTileOutputs; }
    static constexpr int outputs() { return kTileOutputs; }
    static constexpr int output(int vector) { return kFloats * vector; }
    static void put_in_order(Floats*, int) {}
  };

  struct Interleaved : Layout {
    static constexpr bool kManyRows = true;
    using Layout::Layout;
    template <int First, int Count>
    [[gnu::always_inline]] void load(const Term& term, int quad, const std::uint8_t* plane, Bytes* to) const {
      const std::uint8_t* from = plane + bytes + term.places[kQuadChannels * quad];
      for (int i = 0; i < Count; ++i) to[i] = Vector::load(from + kHighBytes * (First + i));
    }
    template <int First, int Count>
    [[gnu::always_inline]] void load_pairs(const Term& term, int quad, Bytes* to) const {
      const std::uint8_t* from = term.low + (bytes + term.places[kQuadChannels * quad]) / 2;
      for (int i = 0; i < Count; ++i) to[i] = load_fields(from + kHighBytes / 2 * (First + i));
    }
  };

  struct Runs : Layout {
    static constexpr bool kManyRows = false;
    using Layout::Layout;
    template <int First, int Count>
    [[gnu::always_inline]] void load(const Term& term, int quad, const std::uint8_t* plane, Bytes* to) const {
      const std::uint8_t* from = plane + bytes;
      const std::uint32_t* places = term.places + kQuadChannels * quad;
      interleaved<Vector, First, Count>(Vector::load(from + places[0]), Vector::load(from + places[1]),
                               Vector::load(from + places[2]), Vector::load(from + places[3]), to);
    }
    template <int First, int Count>
    [[gnu::always_inline]] void load_pairs(const Term& term, int quad, Bytes* to) const {
      const std::uint8_t* from = term.low + bytes / 2;
      const std::uint32_t* places = term.places + kQuadChannels * quad;
      interleaved<Vector, First, Count>(load_fields(from + places[0] / 2), load_fields(from + places[1] / 2),
                               load_fields(from + places[2] / 2), load_fields(from + places[3] / 2), to);
    }
  };

  static Bytes low_bytes(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
  static Bytes high_bytes(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
  static Bytes low_words(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
  static Bytes high_words(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
};
static_assert(kHalfQuads * 2 * 15 * 127 < 1 << 15, "a half's sums of pairs fit 16 bits");

const Kernels kAvx2 = {"avx2", Vector::kJoins, multiply<Vector>, kFloats};

}  // namespace

const Kernels* avx2_kernels() { return &kAvx2; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

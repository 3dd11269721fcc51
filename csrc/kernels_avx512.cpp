// AVX-512 with byte dot products (VNNI): the bits of both planes meet activations as one number.
#include "kernels.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cstring>

#include "floats.inl"
#include "tiles.inl"

namespace quicksilver {
namespace {

struct Vector {
  using Bytes = __m512i;
  using Floats = __m512;
  static constexpr bool kJoins = true;
  static constexpr int kFloats = 16, kRows = 4;

  static Bytes load(const void* from) { return _mm512_loadu_si512(from); }

  static Bytes repeated(std::uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  static Bytes words(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Bytes quad(const std::int8_t* from) {
    std::int32_t word;
    std::memcpy(&word, from, sizeof word);
    return words(word);
  }
  static Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  // Bits of x where the mask has them, else those of y.
  static Bytes choose(Bytes x, Bytes mask, Bytes y) { return _mm512_ternarylogic_epi64(x, mask, y, 0xe2); }
  static Bytes down4(Bytes x) { return _mm512_srli_epi16(x, 4); }
  static Bytes down2(Bytes x) { return _mm512_srli_epi16(x, 2); }
  static Bytes up4(Bytes x) { return _mm512_slli_epi16(x, 4); }
  static Bytes up2(Bytes x) { return _mm512_slli_epi16(x, 2); }
  // Two bits of each: what the even lanes' outputs have, and the odd ones'.
  static Bytes down_by_lane(Bytes x) {
    return _mm512_srlv_epi32(x, _mm512_set_epi32(4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0));
  }

  static Bytes dot(Bytes sums, Bytes codes, Bytes x) { return _mm512_dpbusd_epi32(sums, codes, x); }
  static Bytes add_part(Bytes total, Bytes part, int shift) {
    return _mm512_add_epi32(total, _mm512_sll_epi32(part, _mm_cvtsi32_si128(shift)));
  }

  static Floats floats(float x) { return _mm512_set1_ps(x); }
  static Floats to_floats(Bytes x) { return _mm512_cvtepi32_ps(x); }
  static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats times_added(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats times_taken(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
  static void store_floats(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  static Floats halves(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Floats bytes(const std::uint8_t* from) {
    return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static Floats signed_bytes(const std::uint8_t* from) {
    return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }

  // A tile, in vectors of 16 outputs.
  struct Interleaved {
    static constexpr int kVectors = 2, kTiles = 1;
    static constexpr bool kManyRows = true;
    template <int Rows>
    static constexpr int kAtOnce = Rows > 2 ? 1 : 2;
    const std::size_t tile, bytes;

    Interleaved(int tile, std::size_t stride, bool) : tile(tile), bytes(tile * stride) {}
    std::size_t first_output() const { return tile * kTileOutputs; }
    static constexpr int outputs() { return kTileOutputs; }
    static constexpr int output(int vector) { return kFloats * vector; }
    static void put_in_order(Floats*, int) {}

    template <int First, int Count>
    [[gnu::always_inline]] void load(const Term& term, int quad, const std::uint8_t* plane, Bytes* to) const {
      const std::uint8_t* from = plane + bytes + term.places[kQuadChannels * quad];
      for (int i = 0; i < Count; ++i) to[i] = Vector::load(from + 2 * kHighBytes * (First + i));
    }
    template <int First, int Count>
    [[gnu::always_inline]] void load_pairs(const Term& term, int quad, Bytes* to) const {
      const std::uint8_t* from = term.low + (bytes + term.places[kQuadChannels * quad]) / 2;
      for (int i = 0; i < Count; ++i) {
        const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kHighBytes * (First + i)));
        const __m512i each_twice = _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0);
        to[i] = down_by_lane(_mm512_permutexvar_epi64(each_twice, _mm512_castsi256_si512(two)));
      }
    }
  };

  // Two tiles side by side, in vectors of 8 outputs of each.
  struct Runs {
    static constexpr int kVectors = 4, kTiles = 2;
    static constexpr bool kManyRows = false;
    template <int Rows>
    static constexpr int kAtOnce = 2;
    const std::size_t tile, bytes;
    const bool lone;

    Runs(int tile, std::size_t stride, bool lone) : tile(tile), bytes(tile * stride), lone(lone) {}
    std::size_t first_output() const { return tile * kTileOutputs; }
    int outputs() const { return lone ? kTileOutputs : 2 * kTileOutputs; }
    static constexpr int output(int vector) { return vector % 2 * kTileOutputs + vector / 2 * kFloats; }
    // Of two vectors with 8 outputs of each tile, makes one of each tile.
    [[gnu::always_inline]] static void put_in_order(Floats* sums, int count) {
      for (int i = 0; i < 2 * count; i += 2) {
        const Floats a = sums[i], b = sums[i + 1];
        sums[i] = _mm512_shuffle_f32x4(a, b, 0x44);
        sums[i + 1] = _mm512_shuffle_f32x4(a, b, 0xee);
      }
    }

    template <int First, int Count>
    [[gnu::always_inline]] void load(const Term& term, int quad, const std::uint8_t* plane, Bytes* to) const {
      const std::uint8_t* from = plane + bytes;
      const std::uint32_t* places = term.places + kQuadChannels * quad;
      const auto channel = [&](int j) {
        const auto of_tile = [&](std::size_t i) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + places[j] + i * term.tile_stride));
        };
        const __m512i first = _mm512_zextsi256_si512(of_tile(0));
        return lone ? first : _mm512_inserti64x4(first, of_tile(1), 1);
      };
      interleaved<Vector, First, Count>(channel(0), channel(1), channel(2), channel(3), to);
    }
    template <int First, int Count>
    [[gnu::always_inline]] void load_pairs(const Term& term, int quad, Bytes* to) const {
      const std::uint8_t* from = term.low + bytes / 2;
      const std::uint32_t* places = term.places + kQuadChannels * quad;
      const auto channel = [&](int j) {
        const auto of_tile = [&](std::size_t i) {
          const std::uint8_t* at = from + places[j] / 2 + i * term.tile_stride / 2;
          return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        };
        const __m512i first = _mm512_zextsi256_si512(of_tile(0));
        return down_by_lane(lone ? first : _mm512_inserti64x4(first, of_tile(1), 1));
      };
      interleaved<Vector, First, Count>(channel(0), channel(1), channel(2), channel(3), to);
    }
  };

  static Bytes low_bytes(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
  static Bytes high_bytes(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
  static Bytes low_words(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
  static Bytes high_words(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
};

const Kernels kAvx512 = {"avx512", Vector::kJoins, multiply<Vector>, kFloats};

}  // namespace

const Kernels* avx512_kernels() { return &kAvx512; }

}  // namespace quicksilver

#else
namespace quicksilver {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace quicksilver
#endif

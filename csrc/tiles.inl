// Included by kernels_*.cpp of vector units: products of tiles, in terms of a vector `V`. Sums within half a group are
// whole numbers; what follows is rounded in one order, the same everywhere.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace quicksilver {
namespace {

// Fetches what is read some tiles after the `tile`-th of so many; to be called for every other one.
[[gnu::always_inline]] inline void fetch(const Ahead& ahead, int tile, int tiles) {
  const Ahead::Runs* runs = &ahead.own;
  tile += kTilesAhead < tiles ? kTilesAhead : tiles;
  if (tile >= tiles) {
    tile -= tiles;
    runs = &ahead.next;
    if (tile >= runs->tiles) return;
  }
  for (const Run* run = runs->begin; run < runs->end; ++run) {
    const char* at = reinterpret_cast<const char*>(run->at) + std::size_t(tile / 2) * run->bytes;
    if (run->bytes == 4 * kLineBytes) {  // units of four channels, mostly
      for (int i = 0; i < 4; ++i) _mm_prefetch(at + i * kLineBytes, _MM_HINT_T1);
    } else {
      for (const char* const end = at + run->bytes; at < end; at += kLineBytes) _mm_prefetch(at, _MM_HINT_T1);
    }
  }
}

// Calls `run` with the plane, known to the compiler.
template <class V, class Run>
[[gnu::always_inline]] inline void at_plane(Plane plane, const Run& run) {
  switch (plane) {
    case Plane::kHigh:
      return run(std::integral_constant<Plane, Plane::kHigh>());
    case Plane::kLow:
      return run(std::integral_constant<Plane, Plane::kLow>());
    case Plane::kPairs:
      return run(std::integral_constant<Plane, Plane::kPairs>());
    case Plane::kBoth:
      if constexpr (V::kJoins) return run(std::integral_constant<Plane, Plane::kBoth>());
      return;
    case Plane::kBothPairs:
      if constexpr (V::kJoins) return run(std::integral_constant<Plane, Plane::kBothPairs>());
  }
}

// Some vectors of the bytes of four channels, interleaved.
template <class V, int First, int Count>
[[gnu::always_inline]] inline void interleaved(typename V::Bytes a, typename V::Bytes b, typename V::Bytes c,
                                               typename V::Bytes d, typename V::Bytes* out) {
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    const auto ab = First + i < 2 ? V::low_bytes(a, b) : V::high_bytes(a, b);
    const auto cd = First + i < 2 ? V::low_bytes(c, d) : V::high_bytes(c, d);
    out[i] = (First + i) % 2 == 0 ? V::low_words(ab, cd) : V::high_words(ab, cd);
  }
}

// Codes of a quad: `Count` vectors from the `First`-th on have the outputs of a layout's lower bits, as many those of
// its upper ones. `L` says how bytes lie in memory: a channel's in a row, or those of four channels interleaved.
template <class V, class L, Plane P, int First, int Count, class Use>
[[gnu::always_inline]] inline void with_codes(const Term& term, const L& at, int quad, typename V::Bytes mask,
                                              const Use& use) {
  using Bytes = typename V::Bytes;
  constexpr bool kPairs = P == Plane::kPairs || P == Plane::kBothPairs;
  Bytes high[Count], low[Count];
  if constexpr (P != Plane::kLow && P != Plane::kPairs) at.template load<First, Count>(term, quad, term.high, high);
  if constexpr (P == Plane::kLow || P == Plane::kBoth) at.template load<First, Count>(term, quad, term.low, low);
  if constexpr (kPairs) at.template load_pairs<First, Count>(term, quad, low);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    if constexpr (P == Plane::kHigh || P == Plane::kLow) {
      const Bytes raw = P == Plane::kHigh ? high[i] : low[i];
      use(i, V::both(raw, mask));
      use(i + Count, V::both(V::down4(raw), mask));
    } else if constexpr (P == Plane::kPairs) {
      use(i, V::both(low[i], mask));
      use(i + Count, V::both(V::down2(low[i]), mask));
    } else if constexpr (P == Plane::kBoth) {
      use(i, V::choose(V::up4(high[i]), V::repeated(0xf0), low[i]));
      use(i + Count, V::choose(V::down4(low[i]), V::repeated(0x0f), high[i]));
    } else {
      const Bytes pair = V::repeated(3), above = V::repeated(0x3c);
      use(i, V::choose(low[i], pair, V::both(V::up2(high[i]), above)));
      use(i + Count, V::choose(V::down2(low[i]), pair, V::both(V::down2(high[i]), above)));
    }
  }
}

// What a group adds to outputs [at, at + 64): sums times scales, less offsets.
template <class V, Steps S, Offsets O>
[[gnu::always_inline]] inline void add_some(const Scales& scales, float sum, const float* sums, int at, float* y) {
  using Floats = typename V::Floats;
  const Floats of_row = V::floats(sum);
#pragma GCC unroll 2
  for (int o = 0; o < kTileOutputs; o += V::kFloats) {
    Floats step;
    if constexpr (S == Steps::kHalf) {
      step = V::halves(static_cast<const std::uint16_t*>(scales.steps) + at + o);
    } else {
      const auto* from = static_cast<const std::uint8_t*>(scales.steps) + at + o;
      step = V::times(S == Steps::kUnsigned ? V::bytes(from) : V::signed_bytes(from), V::halves(scales.block_steps + at + o));
    }
    Floats total = V::times_added(V::load_floats(sums + o), step, V::load_floats(y + o));
    if constexpr (O == Offsets::kHalf) {
      total = V::times_taken(V::halves(static_cast<const std::uint16_t*>(scales.offsets) + at + o), of_row, total);
    } else if constexpr (O != Offsets::kNone) {
      const Floats whole = V::bytes(static_cast<const std::uint8_t*>(scales.offsets) + at + o);
      const Floats times = O == Offsets::kZeros ? step : V::halves(scales.block_offsets + at + o);
      total = V::times_taken(V::times(whole, times), of_row, total);
    }
    V::store_floats(y + o, total);
  }
}

template <class V, Steps S>
[[gnu::always_inline]] inline void add_tile(const Scales& scales, float sum, const float* sums, int at, float* y) {
  switch (scales.offsets_kind) {
    case Offsets::kNone:
      return add_some<V, S, Offsets::kNone>(scales, sum, sums, at, y);
    case Offsets::kHalf:
      return add_some<V, S, Offsets::kHalf>(scales, sum, sums, at, y);
    case Offsets::kUnsigned:
      return add_some<V, S, Offsets::kUnsigned>(scales, sum, sums, at, y);
    case Offsets::kZeros:
      return add_some<V, S, Offsets::kZeros>(scales, sum, sums, at, y);
  }
}

// Adds a tile's sums [64] to y [64], its first output being the matrix's output `at`.
template <class V>
void add_tile(const Scales& scales, float sum, const float* sums, int at, float* y) {
  switch (scales.steps_kind) {
    case Steps::kHalf:
      return add_tile<V, Steps::kHalf>(scales, sum, sums, at, y);
    case Steps::kUnsigned:
      return add_tile<V, Steps::kUnsigned>(scales, sum, sums, at, y);
    case Steps::kSigned:
      return add_tile<V, Steps::kSigned>(scales, sum, sums, at, y);
  }
}

// Adds to totals what a term's half comes to, of `Quads` quads, or of as many as it has where that is 0.
template <class V, class L, Plane P, int Quads, int Rows, int First, int Count>
[[gnu::always_inline]] inline void add_term(const Term& term, const Share* shares, int t, int half, const L& at,
                                            typename V::Bytes (&totals)[Rows][2 * Count]) {
  using Bytes = typename V::Bytes;
  const Bytes mask = V::repeated(Quads ? 15 : term.mask);
  Bytes parts[Rows][2 * Count];
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 2 * Count; ++i) parts[r][i] = V::words(0);
  }
  const auto add_quad = [&](int quad) __attribute__((always_inline)) {
    Bytes x[Rows];
    for (int r = 0; r < Rows; ++r) x[r] = V::quad(shares[r].words[t] + kQuadChannels * quad);
    with_codes<V, L, P, First, Count>(term, at, quad, mask, [&](int i, Bytes codes) __attribute__((always_inline)) {
      for (int r = 0; r < Rows; ++r) parts[r][i] = V::dot(parts[r][i], codes, x[r]);
    });
  };
  if constexpr (Quads != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < Quads; ++i) add_quad(half * Quads + i);
  } else {
    const int first = half ? term.quads[0] : 0, end = first + term.quads[half];
    for (int quad = first; quad < end; ++quad) add_quad(quad);
  }
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 2 * Count; ++i) totals[r][i] = V::add_part(totals[r][i], parts[r][i], term.shift);
  }
}

// Any terms.
struct AnyTerms {
  template <class V, class L, int Rows, int First, int Count>
  [[gnu::always_inline]] static void add(const Term* terms, int num_terms, const Share* shares, int half, const L& at,
                                         typename V::Bytes (&totals)[Rows][2 * Count]) {
    for (int t = 0; t < num_terms; ++t) {
      at_plane<V>(terms[t].plane, [&](auto plane) __attribute__((always_inline)) {
        add_term<V, L, decltype(plane)::value, 0, Rows, First, Count>(terms[t], shares, t, half, at, totals);
      });
    }
  }
};

// Terms of these planes that have all channels of a group.
template <Plane... Planes>
struct WholeTerms {
  template <class V, class L, int Rows, int First, int Count>
  [[gnu::always_inline]] static void add(const Term* terms, int, const Share* shares, int half, const L& at,
                                         typename V::Bytes (&totals)[Rows][2 * Count]) {
    int t = 0;
    ((add_term<V, L, Planes, kHalfQuads, Rows, First, Count>(terms[t], shares, t, half, at, totals), ++t), ...);
  }
};

// What a group comes to for some rows and some of a layout's vectors, which registers hold.
template <class V, class L, class Terms, int Rows, int First, int Count>
[[gnu::always_inline]] inline void sums_of(const Term* terms, int num_terms, const Share* shares, const L& at,
                                           typename V::Floats (&sums)[Rows][2 * Count]) {
  constexpr int kAll = 2 * Count;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    typename V::Bytes totals[Rows][kAll];
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < kAll; ++i) totals[r][i] = V::words(shares[r].begin[half]);
    }
    Terms::template add<V, L, Rows, First, Count>(terms, num_terms, shares, half, at, totals);
    for (int r = 0; r < Rows; ++r) {
      const auto unit = V::floats(shares[r].unit[half]);
      for (int i = 0; i < kAll; ++i) {
        const auto scaled = V::to_floats(totals[r][i]);
        sums[r][i] = half == 0 ? V::times(scaled, unit) : V::times_added(scaled, unit, sums[r][i]);
      }
    }
  }
}

// Adds some rows' products with the tiles of a layout to y [rows, stride]; by way of `room`, but where all scales are
// half-precision steps.
template <class V, class L, class Terms, int Rows, int First = 0>
[[gnu::always_inline]] inline void rows_at(const Term* terms, int num_terms, const Share* shares, const Scales& scales,
                                           bool plain, const L& at, float* y, std::size_t stride, float* room) {
  constexpr int kCount = L::template kAtOnce<Rows>;
  typename V::Floats sums[Rows][2 * kCount];
  sums_of<V, L, Terms, Rows, First, kCount>(terms, num_terms, shares, at, sums);
  for (int r = 0; r < Rows; ++r) L::put_in_order(sums[r], kCount);
  for (int i = 0; i < 2 * kCount; ++i) {
    const int output = L::output(First + i % kCount) + i / kCount * (kTileOutputs / 2);
    if (!plain) {
      for (int r = 0; r < Rows; ++r) V::store_floats(room + r * kTileOutputs * L::kTiles + output, sums[r][i]);
    } else if (output < at.outputs()) {
      const auto step = V::halves(static_cast<const std::uint16_t*>(scales.steps) + at.first_output() + output);
      for (int r = 0; r < Rows; ++r) {
        float* const to = y + r * stride + output;
        V::store_floats(to, V::times_added(sums[r][i], step, V::load_floats(to)));
      }
    }
  }
  if constexpr (First + kCount < L::kVectors) {
    rows_at<V, L, Terms, Rows, First + kCount>(terms, num_terms, shares, scales, plain, at, y, stride, room);
  } else if (!plain) {
    for (int r = 0; r < Rows; ++r) {
      for (int o = 0; o < at.outputs(); o += kTileOutputs) {
        add_tile<V>(scales, shares[r].sum, room + r * kTileOutputs * L::kTiles + o, at.first_output() + o,
                    y + r * stride + o);
      }
    }
  }
}

template <class V, class L, class Terms>
void multiply_terms(const Term* terms, int num_terms, const Share* shares, int num_rows, const Scales& scales,
                    int first, int end, float* y, std::size_t stride, const Ahead& ahead) {
  alignas(64) float room[V::kRows * kTileOutputs * L::kTiles];
  const bool plain = scales.steps_kind == Steps::kHalf && scales.offsets_kind == Offsets::kNone;
  for (int tile = first; tile < end; tile += L::kTiles) {
    if ((tile - first) % 2 == 0) fetch(ahead, tile - first, end - first);
    const L at(tile, terms->tile_stride, end - tile < L::kTiles);
    float* const to = y + at.first_output();
    int r = 0;
    const auto add = [&](auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      for (; r + kRows <= num_rows; r += kRows) {
        rows_at<V, L, Terms, kRows>(terms, num_terms, shares + r, scales, plain, at, to + r * stride, stride, room);
      }
    };
    if constexpr (L::kManyRows) {
      add(std::integral_constant<int, V::kRows>());
      if constexpr (V::kRows > 2) add(std::integral_constant<int, 2>());
    }
    add(std::integral_constant<int, 1>());
  }
}

// The kernel for some terms: those that are met mostly have their own.
template <class V, class L>
auto kernel_for(const Term* terms, int num_terms) {
  bool whole = true;
  for (int t = 0; t < num_terms; ++t) {
    whole &= terms[t].quads[0] == kHalfQuads && terms[t].quads[1] == kHalfQuads && (terms[t].mask & 15) == 15;
  }
  const auto are = [&](Plane first, int count) { return whole && num_terms == count && terms[0].plane == first; };
  if (are(Plane::kHigh, 1)) return multiply_terms<V, L, WholeTerms<Plane::kHigh>>;
  if constexpr (V::kJoins) {
    if (are(Plane::kBoth, 1)) return multiply_terms<V, L, WholeTerms<Plane::kBoth>>;
    if (are(Plane::kBothPairs, 1)) return multiply_terms<V, L, WholeTerms<Plane::kBothPairs>>;
  } else {
    if (are(Plane::kHigh, 2) && terms[1].plane == Plane::kLow) {
      return multiply_terms<V, L, WholeTerms<Plane::kHigh, Plane::kLow>>;
    }
  }
  return multiply_terms<V, L, AnyTerms>;
}

// Interleaves the bytes of each four of a term's channels, which are `Bytes` of each.
template <class Bytes>
void interleave(const Term& term, const std::uint8_t* from, std::uint8_t* to) {
  for (int quad = 0; quad < term.all_quads(); ++quad) {
    Bytes in[kQuadChannels];
    for (int j = 0; j < kQuadChannels; ++j) {
      const std::size_t at = term.places[kQuadChannels * quad + j] * sizeof(Bytes) / kHighBytes;
      std::memcpy(&in[j], from + at, sizeof(Bytes));
    }
    for (int i = 0; i < kQuadChannels; ++i, to += sizeof(Bytes)) {
      Bytes out;
      if constexpr (sizeof(Bytes) == kHighBytes) {
        const auto ab = i < 2 ? _mm256_unpacklo_epi8(in[0], in[1]) : _mm256_unpackhi_epi8(in[0], in[1]);
        const auto cd = i < 2 ? _mm256_unpacklo_epi8(in[2], in[3]) : _mm256_unpackhi_epi8(in[2], in[3]);
        out = i % 2 ? _mm256_unpackhi_epi16(ab, cd) : _mm256_unpacklo_epi16(ab, cd);
      } else {
        const auto ab = i < 2 ? _mm_unpacklo_epi8(in[0], in[1]) : _mm_unpackhi_epi8(in[0], in[1]);
        const auto cd = i < 2 ? _mm_unpacklo_epi8(in[2], in[3]) : _mm_unpackhi_epi8(in[2], in[3]);
        out = i % 2 ? _mm_unpackhi_epi16(ab, cd) : _mm_unpacklo_epi16(ab, cd);
      }
      std::memcpy(to, &out, sizeof out);
    }
  }
}

// Some rows with runs of channels, which are interleaved once for all of them.
template <class V>
void multiply_runs(const Term* terms, int num_terms, const Share* shares, int num_rows, const Scales& scales, int first,
                   int end, float* y, std::size_t stride, const Ahead& ahead) {
  alignas(64) std::uint8_t room[kMaxTerms][2][kGroupChannels * kHighBytes];
  std::uint32_t places[kGroupChannels];
  for (int i = 0; i < kGroupChannels; ++i) places[i] = static_cast<std::uint32_t>(i * kHighBytes);
  const auto run = kernel_for<V, typename V::Interleaved>(terms, num_terms);
  Term laid[kMaxTerms];
  for (int tile = first; tile < end; ++tile) {
    if ((tile - first) % 2 == 0) fetch(ahead, tile - first, end - first);
    for (int t = 0; t < num_terms; ++t) {
      const Term& term = terms[t];
      const std::size_t at = tile * term.tile_stride;
      const bool pairs = term.plane == Plane::kPairs || term.plane == Plane::kBothPairs;
      laid[t] = {term.plane, term.mask, term.shift, room[t][0], room[t][1], 0, true, places,
                 {term.quads[0], term.quads[1]}};
      const bool high = term.plane != Plane::kLow && term.plane != Plane::kPairs;
      if (high) interleave<__m256i>(term, term.high + at, room[t][0]);
      if (term.plane == Plane::kLow || term.plane == Plane::kBoth) interleave<__m256i>(term, term.low + at, room[t][1]);
      if (pairs) interleave<__m128i>(term, term.low + at / 2, room[t][1]);
    }
    run(laid, num_terms, shares, num_rows, scales, tile, tile + 1, y, stride, {});
  }
}

template <class V>
void multiply(const Term* terms, int num_terms, const Share* shares, int num_rows, const Scales& scales, int first,
              int end, float* y, std::size_t stride, const Ahead& ahead) {
  const auto run = terms->interleaved ? kernel_for<V, typename V::Interleaved>(terms, num_terms)
                   : num_rows == 1    ? kernel_for<V, typename V::Runs>(terms, num_terms)
                                      : multiply_runs<V>;
  run(terms, num_terms, shares, num_rows, scales, first, end, y, stride, ahead);
}

}  // namespace
}  // namespace quicksilver

// Included once by floats.inl: what a K/V head's query heads read of its entries, and what is made of it. Entries are
// worked on in blocks, and within them in tiles; a tile's keys or values become floats once for all the heads. The
// order of sums depends on a row's own entries alone. Who works on which block is decided in attention.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sixteen.inl"

namespace quicksilver {
namespace {

// A tile's keys or values as floats, `width` each: where they are kept, or in a room of the tile's own.
struct Rows {
  const float* at[kTileEntries];
};

// Numbers of a row as floats; those from `size` on stay as they are.
template <typename T>
inline void expand(const T* x, const float*, int size, float* y) {
  int d = 0;
  for (; d + kLanes <= size; d += kLanes) put(take(x + d), y + d);
  for (; d < size; ++d) y[d] = value_of(x[d]);
}

// What codes mean; see encode.
inline void expand(const std::int8_t* x, const float* scales, int size, float* y) {
  static_assert(kPairs == kLanes, "a register of codes has one scale");
  const int half = (size + 1) / 2;
  int d = 0;
  for (; d + kPairs <= size - half; d += kPairs) {
    const Sixteen scale = splat(scales[d / kPairs]);
    put(multiply(take(x + d), scale), y + d);
    put(multiply(take(x + half + d), scale), y + half + d);
  }
  for (; d < half; ++d) {
    const float scale = scales[d / kPairs];
    y[d] = value_of(x[d]) * scale;
    if (half + d < size) y[half + d] = value_of(x[half + d]) * scale;
  }
}

// Takes `count` rows, `at(i)` the place of the i-th; the last one stands for those that are missing.
template <typename T, typename At>
inline Rows expanded(const void* base, const float* scales, const Entries& entries, int size, int count, At at,
                     float* room) {
  const int width = padded(size);
  const std::int64_t scale_stride = scales ? entries.scale_stride : 0;
  Rows rows;
  for (int i = 0; i < kTileEntries; ++i) {
    const std::int64_t place = at(std::min(i, count - 1));
    const T* row = static_cast<const T*>(base) + place * entries.stride;
    if (std::is_same<T, float>::value && width == size) {
      rows.at[i] = reinterpret_cast<const float*>(row);
      continue;
    }
    float* own = room + std::min(i, count - 1) * width;
    if (i < count) expand(row, scales + place * scale_stride, size, own);
    rows.at[i] = own;
  }
  return rows;
}

// Fetches some of a head's rows, which are far apart. Inline, since a call that does nothing else would be left out.
template <typename T>
[[gnu::always_inline]] inline void fetch(const RowsAhead& from, const Entries& entries, int size, int begin, int count) {
  const int bytes = size * static_cast<int>(sizeof(T));
  if (!from.rows) return;
  for (int i = begin; i < begin + count; ++i) {
    const char* row = reinterpret_cast<const char*>(static_cast<const T*>(from.rows) + i * entries.stride);
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
    if (from.scales) __builtin_prefetch(from.scales + i * entries.scale_stride, 0, 2);
  }
}

// Products of heads' queries, `width` apart, with a tile's keys: scores [heads], `stride` apart.
template <int heads>
inline void score_heads(const float* queries, int width, const Rows& keys, float* scores, int stride) {
  Sixteen folded[heads][4];
  for (int e = 0; e < 4; ++e) {
    Sixteen sums[heads][4];
    for (int h = 0; h < heads; ++h) {
      for (int j = 0; j < 4; ++j) sums[h][j] = splat(0.0f);
    }
    for (int d = 0; d < width; d += kLanes) {
      const Sixteen key[4] = {take(keys.at[e] + d), take(keys.at[4 + e] + d), take(keys.at[8 + e] + d),
                              take(keys.at[12 + e] + d)};
      for (int h = 0; h < heads; ++h) {
        const Sixteen query = take(queries + h * width + d);
        for (int j = 0; j < 4; ++j) sums[h][j] = add_product(sums[h][j], query, key[j]);
      }
    }
    for (int h = 0; h < heads; ++h) folded[h][e] = fold(sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
  }
  for (int h = 0; h < heads; ++h) put(join(folded[h]), scores + h * stride);
}

// Adds `count` values of a tile, `parts` times sixteen dimensions of them, to heads' sums.
template <int heads, int parts>
inline void weigh_part(const float* weights, int stride, const Rows& values, int count, int begin, float* sums,
                       int sums_stride) {
  Sixteen held[heads][parts];
  for (int h = 0; h < heads; ++h) {
    for (int p = 0; p < parts; ++p) held[h][p] = take(sums + h * sums_stride + begin + p * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    Sixteen value[parts];
    for (int p = 0; p < parts; ++p) value[p] = take(values.at[i] + begin + p * kLanes);
    for (int h = 0; h < heads; ++h) {
      const Sixteen weight = splat(weights[h * stride + i]);
      for (int p = 0; p < parts; ++p) held[h][p] = add_product(held[h][p], weight, value[p]);
    }
  }
  for (int h = 0; h < heads; ++h) {
    for (int p = 0; p < parts; ++p) put(held[h][p], sums + h * sums_stride + begin + p * kLanes);
  }
}

// Calls f(first, how many) for all heads, some at a time; how many is a constant.
template <int some, typename F>
inline void by_heads(int heads, F f) {
  int h = 0;
  for (; h + some <= heads; h += some) f(h, std::integral_constant<int, some>());
  if constexpr (some > 1) {
    if (h < heads) by_heads<some - 1>(heads - h, [&](int first, auto count) { f(h + first, count); });
  }
}

inline void score(const float* queries, int heads, int width, const Rows& keys, float* scores, int stride) {
  by_heads<kHeads>(heads, [&](int h, auto count) {
    score_heads<count()>(queries + h * width, width, keys, scores + h * stride, stride);
  });
}

inline void weigh(const float* weights, int stride, int heads, const Rows& values, int count, int width, float* sums,
                  int sums_stride) {
  by_heads<kHeads>(heads, [&](int h, auto some) {
    const float* of_heads = weights + h * stride;
    float* to = sums + h * sums_stride;
    int d = 0;
    for (; d + kParts * kLanes <= width; d += kParts * kLanes) {
      weigh_part<some(), kParts>(of_heads, stride, values, count, d, to, sums_stride);
    }
    for (; d < width; d += kLanes) weigh_part<some(), 1>(of_heads, stride, values, count, d, to, sums_stride);
  });
}

// Makes scores of products, whole tiles of them; masses are the entries', where they are not one.
template <typename At>
inline void finish_scores(float* scores, int count, const Entries& entries, const Attention& attention, At at) {
  for (int i = 0; i < padded(count); ++i) scores[i] *= attention.scaling;
  for (int i = 0; i < padded(count) && attention.softcap > 0.0f; ++i) {
    scores[i] = hyperbolic_tangent(scores[i] / attention.softcap) * attention.softcap;
  }
  for (int i = 0; i < count && entries.masses; ++i) scores[i] += std::log(static_cast<float>(entries.masses[at(i)]));
  for (int i = count; i < padded(count); ++i) scores[i] = -INFINITY;
}

struct Softened {
  float largest, total;
};

// Makes weights of scores, whole tiles of them, in units of the largest; not one of them where a score is not a number.
inline Softened soften(float* scores, int count) {
  Sixteen highest = splat(-INFINITY), sums = splat(0.0f);
  float lanes[kLanes];
  for (int i = 0; i < count; i += kLanes) highest = larger(take(scores + i), highest);
  put(highest, lanes);
  float largest = lanes[0];
  for (int l = 1; l < kLanes; ++l) largest = std::max(largest, lanes[l]);
  const float from = largest == -INFINITY ? 0.0f : largest;
  for (int i = 0; i < count; ++i) scores[i] = exponential(scores[i] - from);
  for (int i = 0; i < count; i += kLanes) sums = add(sums, take(scores + i));
  put(sums, lanes);
  return {largest, tree_sum(load(lanes))};
}

// Queries with zeros after each, so that whole vectors can be taken.
inline void pad(const float* x, int count, int size, float* y) {
  const int width = padded(size);
  for (int h = 0; h < count; ++h) {
    std::copy_n(x + h * size, size, y + h * width);
    std::fill(y + h * width + size, y + (h + 1) * width, 0.0f);
  }
}

template <typename T>
void attend_block_of(const float* queries, int heads, int size, const Entries& entries, const Attention& attention,
                     int begin, int end, const RowsAhead& ahead, float* room, float* partial) {
  const int width = padded(size), count = end - begin, stride = width + kPartialExtra;
  const RowsAhead values_ahead = {entries.values, entries.value_scales};
  float *asked = room, *scores = asked + heads * width, *own = scores + heads * kBlockEntries;
  std::fill(own, own + kTileEntries * width, 0.0f);
  pad(queries, heads, size, asked);
  const auto some = [&](int i) { return std::min(kTileEntries, count - i); };
  for (int i = 0; i < count; i += kTileEntries) {
    const auto at = [&](int j) { return begin + i + j; };
    const Rows keys = expanded<T>(entries.keys, entries.key_scales, entries, size, some(i), at, own);
    fetch<T>(values_ahead, entries, size, begin + i, some(i));
    score(asked, heads, width, keys, scores + i, kBlockEntries);
  }
  for (int h = 0; h < heads; ++h) {
    float* of_head = scores + h * kBlockEntries;
    finish_scores(of_head, count, entries, attention, [&](int i) { return begin + i; });
    const Softened softened = soften(of_head, padded(count));
    float* sums = partial + h * stride;
    std::fill(sums, sums + width, 0.0f);
    sums[width] = softened.largest;
    sums[width + 1] = softened.total;
  }
  for (int i = 0; i < count; i += kTileEntries) {
    const auto at = [&](int j) { return begin + i + j; };
    const Rows values = expanded<T>(entries.values, entries.value_scales, entries, size, some(i), at, own);
    fetch<T>(ahead, entries, size, i, some(i));
    weigh(scores + i, kBlockEntries, heads, values, some(i), width, partial, stride);
  }
}

// Calls f with a number of the type that entries are kept in.
template <typename F>
inline auto by_kind(Kept kept, F f) {
  if (kept == Kept::kCodes) return f(std::int8_t());
  if (kept == Kept::kBfloat16) return f(Bfloat16());
  return f(float());
}

void attend_block(const float* queries, int heads, int size, const Entries& entries, const Attention& attention,
                  int begin, int end, const RowsAhead& ahead, float* room, float* partial) {
  by_kind(entries.kept, [&](auto kind) {
    attend_block_of<decltype(kind)>(queries, heads, size, entries, attention, begin, end, ahead, room, partial);
  });
}

// Adds a block's partial results to those of the blocks before it.
void join_blocks(int heads, int size, const float* next, float* partial) {
  const int width = padded(size), stride = width + kPartialExtra;
  for (int h = 0; h < heads; ++h, next += stride, partial += stride) {
    const float a = partial[width], b = next[width];
    const float largest = std::max(a, b), from = largest == -INFINITY ? 0.0f : largest;
    const float before = exponential(a - from), after = exponential(b - from);
    for (int d = 0; d < width; ++d) partial[d] = partial[d] * before + next[d] * after;
    partial[width] = largest;
    partial[width + 1] = partial[width + 1] * before + next[width + 1] * after;
  }
}

void finish_blocks(int heads, int size, const float* partial, float* out) {
  const int width = padded(size), stride = width + kPartialExtra;
  for (int h = 0; h < heads; ++h, partial += stride) {
    for (int d = 0; d < size; ++d) out[h * size + d] = partial[d] / partial[width + 1];
  }
}

// Sets weights to zero that, normalised, lie below `limit` and below the largest.
void drop_light(float* weights, int count, float total, float limit) {
  const float least = std::min(limit, 1.0f / total);  // the largest weight is 1 before it is normalised
  for (int i = 0; i < count; ++i) weights[i] = weights[i] / total < least ? 0.0f : weights[i];
}

// Moves the weights that are not zero, and the entries that they are of, to the front; returns how many there are.
int keep_weighty(float* weights, std::int32_t* kept, int count) {
  int left = 0;
  for (int i = 0; i < count; ++i) {
    const float weight = weights[i];
    weights[left] = weight;
    kept[left] = kept[i];
    left += weight != 0.0f;
  }
  return left;
}

template <typename T>
Skipped attend_in_steps(const float* query, int size, const Entries& entries, const Attention& attention, int begin,
                        int end, float* room, std::int32_t* kept, float* out) {
  const int width = padded(size), count = end - begin;
  float *asked = room, *large = asked + width, *sums = large + width, *own = sums + width;
  float* weights = own + kTileEntries * width;
  std::fill(large, weights, 0.0f);
  pad(query, 1, size, asked);
  const float limit = attention.estimate_dims_above * root_mean_square(query, size);
  int later = 0;
  for (int d = 0; d < size; ++d) {
    const bool small = std::fabs(query[d]) < limit;
    large[d] = small ? 0.0f : query[d];
    later += small;
  }
  for (int i = 0; i < count; ++i) kept[i] = begin + i;
  // Of all keys, then, with the whole query, of those that weigh enough by these.
  const auto weigh_keys = [&](const float* by, int keys) {
    for (int i = 0; i < keys; i += kTileEntries) {
      const auto at = [&](int j) { return kept[i + j]; };
      const int some = std::min(kTileEntries, keys - i);
      score(by, 1, width, expanded<T>(entries.keys, entries.key_scales, entries, size, some, at, own), weights + i, 0);
    }
    finish_scores(weights, keys, entries, attention, [&](int i) { return kept[i]; });
    drop_light(weights, keys, soften(weights, padded(keys)).total, attention.skip_below / static_cast<float>(count));
    return keep_weighty(weights, kept, keys);
  };
  const int left = weigh_keys(large, count), read = weigh_keys(asked, left);
  for (int i = 0; i < read; i += kTileEntries) {
    const auto at = [&](int j) { return kept[i + j]; };
    const int some = std::min(kTileEntries, read - i);
    const Rows values = expanded<T>(entries.values, entries.value_scales, entries, size, some, at, own);
    weigh(weights + i, 0, 1, values, some, width, sums, 0);
  }
  const float total = sum(weights, read);
  for (int d = 0; d < size; ++d) out[d] = sums[d] / total;
  return {count - read, std::int64_t{later} * (count - left), left};
}

Skipped attend_in_two_steps(const float* query, int size, const Entries& entries, const Attention& attention,
                            int begin, int end, float* room, std::int32_t* kept, float* out) {
  return by_kind(entries.kept, [&](auto kind) {
    return attend_in_steps<decltype(kind)>(query, size, entries, attention, begin, end, room, kept, out);
  });
}

}  // namespace
}  // namespace quicksilver

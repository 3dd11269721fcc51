#include "product.h"

#include <algorithm>
#include <limits>

#include "isa.h"

namespace quicksilver {
namespace {

constexpr int kParts = 8;           // of a matrix's groups at most, added up one after another
constexpr int kStripTiles = 128;    // whose sums stay in a near cache; a channel's run in them is a page
constexpr int kFewRows = 16;        // for more, outputs are shared among threads instead of inputs
constexpr int kRowsAtOnce = 32;     // of many, whose sums stay in a near cache
constexpr int kTilesAtOnce = 8;
constexpr int kLongUnit = 16;  // channels; the processor reads longer runs ahead by itself, sooner undisturbed

int strips_of(const Matrix& matrix) { return (matrix.num_tiles() + kStripTiles - 1) / kStripTiles; }

int parts_of(const Matrix& matrix) {
  return std::min(matrix.num_groups(), (kParts + strips_of(matrix) - 1) / strips_of(matrix));
}

int first_group_of(const Matrix& matrix, int part) { return matrix.num_groups() * part / parts_of(matrix); }

// The channels of one step: those that share a scale, and the unit of an activation.
int step_of(const Matrix& matrix) { return std::min(matrix.group_size, kGroupChannels); }

int channels_of_step(const Matrix& matrix, int channel) {
  return std::min(step_of(matrix), matrix.num_inputs - channel);
}

// The runs that a group's terms read, plane by plane and unit by unit.
void list_runs(const Matrix& matrix, const GroupTerms& group, int first_tile, std::vector<Run>& runs) {
  runs.clear();
  if (matrix.unit >= kLongUnit) return;
  const auto add = [&](const Term& term, const std::uint8_t* plane, std::size_t divisor) {
    const std::uint32_t* place = term.places;
    for (const std::uint32_t* const end = place + kQuadChannels * term.all_quads(); place < end;) {
      const std::size_t unit = *place - *place % matrix.unit_stride;
      runs.push_back({plane + (unit + first_tile * term.tile_stride) / divisor,
                      static_cast<std::uint32_t>(2 * term.tile_stride / divisor)});
      while (place < end && *place - unit < term.tile_stride) ++place;
    }
  };
  for (int t = 0; t < group.num_terms(); ++t) {
    const Term& term = group.terms()[t];
    const bool both = term.plane == Plane::kBoth || term.plane == Plane::kBothPairs;
    if (both || term.plane == Plane::kHigh) add(term, term.high, 1);
    if (both || term.plane != Plane::kHigh) {
      const bool pairs = term.plane == Plane::kPairs || term.plane == Plane::kBothPairs;
      add(term, term.low, pairs ? 2 : 1);
    }
  }
}

// A walk over a thread's steps, which knows the next one while the one at hand is multiplied.
class Walk {
 public:
  Walk(const Kernels& kernels, const Sharing& sharing, int thread, int num_threads, Workroom& room)
      : kernels_(kernels), sharing_(sharing), thread_(thread), num_threads_(num_threads), room_(room) {}

  void run() {
    const int count = static_cast<int>(sharing_.items.size());
    item_ = count * thread_ / num_threads_;
    last_ = count * (thread_ + 1) / num_threads_;
    if (!has_item()) return;
    channel_ = item().first_group * kGroupChannels;
    build(0);
    for (int current = 0; has_item(); current ^= 1) {
      const Item at = item();
      const GroupTerms& group = room_.terms[current];
      const int tiles = at.end_tile - at.first_tile, num_rows = at.product->num_rows;
      const std::size_t stride = std::size_t(tiles) * kTileOutputs;
      if (channel_ == at.first_group * kGroupChannels) std::fill_n(at.sums, num_rows * stride, 0.0f);
      step();
      Ahead ahead{runs_of(current, tiles), {}};
      if (has_item()) {
        build(current ^ 1);
        ahead.next = runs_of(current ^ 1, item().end_tile - item().first_tile);
      }
      if (group.empty()) continue;
      kernels_.multiply(group.terms(), group.num_terms(), group.shares(), num_rows, group.scales(), at.first_tile,
                        at.end_tile, at.sums - std::ptrdiff_t{at.first_tile} * kTileOutputs, stride, ahead);
    }
  }

 private:
  bool has_item() const { return item_ < last_; }
  const Item& item() const { return sharing_.items[item_]; }

  // Goes to the next channels, or to the next item's first.
  void step() {
    const Matrix& matrix = *item().product->matrix;
    channel_ += step_of(matrix);
    if (channel_ < std::min(item().end_group * kGroupChannels, matrix.num_inputs)) return;
    ++item_;
    if (has_item()) channel_ = item().first_group * kGroupChannels;
  }

  void build(int which) {
    const Product& product = *item().product;
    GroupTerms& terms = room_.terms[which];
    terms.build(kernels_, *product.matrix, product.rows, product.num_rows, channel_,
                channels_of_step(*product.matrix, channel_));
    list_runs(*product.matrix, terms, item().first_tile, room_.runs[which]);
  }

  Ahead::Runs runs_of(int which, int tiles) const {
    const std::vector<Run>& runs = room_.runs[which];
    return {runs.data(), runs.data() + runs.size(), tiles};
  }

  const Kernels& kernels_;
  const Sharing& sharing_;
  int thread_, num_threads_;
  Workroom& room_;
  int item_ = 0, last_ = 0, channel_ = 0;
};

// What a thread reads first of the matrix to come, all channels taken for read: nobody knows yet which will be.
void fetch_first(const std::vector<const Matrix*>& ahead, int thread, int num_threads) {
  constexpr std::size_t kAtOnce = 24 << 10;
  for (const Matrix* matrix : ahead) {
    const int parts = parts_of(*matrix), item = parts * strips_of(*matrix) * thread / num_threads;
    const std::size_t place = matrix->places[std::size_t(first_group_of(*matrix, item % parts)) * kGroupChannels];
    const std::size_t first = place + item / parts * kStripTiles * matrix->tile_stride();
    const int planes = matrix->low ? 2 : 1;
    for (std::size_t at = 0; at < kAtOnce / planes; at += kLineBytes) {
      __builtin_prefetch(matrix->high + first + at, 0, 2);
      if (matrix->bits == 8) __builtin_prefetch(matrix->low + first + at, 0, 2);
    }
    const Scales scales = matrix->scales_at(first_group_of(*matrix, item % parts) * kGroupChannels);
    for (std::size_t at = 0; at < kAtOnce / 8; at += kLineBytes) {
      __builtin_prefetch(static_cast<const std::uint8_t*>(scales.steps) + at, 0, 2);
      if (scales.offsets) __builtin_prefetch(static_cast<const std::uint8_t*>(scales.offsets) + at, 0, 2);
    }
  }
}

// Sums of a row over the parts of a strip, in order, and the bias: outputs [begin, end).
void add_parts(const Item* items, int parts, int row, int begin, int end) {
  const Item& first = *items;
  const Product& product = *first.product;
  const int base = first.first_tile * kTileOutputs;
  const std::size_t stride = std::size_t(first.end_tile - first.first_tile) * kTileOutputs;
  float* const y = product.y + row * product.stride;
  if (!product.rows[row].finite(product.matrix->num_inputs)) {
    std::fill(y + begin, y + end, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  for (int p = 0; p < parts; ++p) {
    const float* sums = items[p].sums + row * stride - base;
    if (p == 0) {
      std::copy(sums + begin, sums + end, y + begin);
    } else {
      for (int o = begin; o < end; ++o) y[o] += sums[o];
    }
  }
  if (product.bias) {
    for (int o = begin; o < end; ++o) y[o] += product.bias[o];
  }
}

void add_all_parts(const Sharing& sharing, int thread, int num_threads) {
  for (std::size_t i = 0; i < sharing.items.size();) {
    const Item& item = sharing.items[i];
    const int parts = parts_of(*item.product->matrix);
    const int first = item.first_tile * kTileOutputs, lines = (item.end_tile - item.first_tile) * kTileOutputs / 16;
    const int last = item.product->matrix->num_outputs;
    const int begin = std::min(first + lines * thread / num_threads * 16, last);
    const int end = std::min(first + lines * (thread + 1) / num_threads * 16, last);
    for (int r = 0; r < item.product->num_rows; ++r) add_parts(sharing.items.data() + i, parts, r, begin, end);
    i += parts;
  }
}

std::size_t sums_of(const Matrix& matrix) { return std::size_t(parts_of(matrix)) * matrix.padded_outputs(); }

// Says what is multiplied next. To be called by one thread, with a barrier before the threads multiply.
void share(const Product* products, int num_products, int num_threads, Sharing& sharing) {
  sharing.products.assign(products, products + num_products);
  sharing.items.clear();
  float* sums = sharing.sums.data();
  for (const Product& product : sharing.products) {
    const Matrix& matrix = *product.matrix;
    for (int strip = 0; strip < strips_of(matrix); ++strip) {
      const int first = strip * kStripTiles, end = std::min(first + kStripTiles, matrix.num_tiles());
      for (int part = 0; part < parts_of(matrix); ++part) {
        sharing.items.push_back(
            {&product, first, end, first_group_of(matrix, part), first_group_of(matrix, part + 1), sums});
        sums += std::size_t(product.num_rows) * (end - first) * kTileOutputs;
      }
    }
  }
  sharing.taken.store(num_threads, std::memory_order_relaxed);
}

// Some rows with some tiles of a matrix: the same sums in the same order as item by item.
void multiply_many(const Kernels& kernels, const Product& product, int first_row, int num_rows, int first_tile,
                   int end_tile, Workroom& room) {
  const Matrix& matrix = *product.matrix;
  const int outputs = (end_tile - first_tile) * kTileOutputs, base = first_tile * kTileOutputs;
  const int held = std::min(outputs, matrix.num_outputs - base);
  for (int part = 0; part < parts_of(matrix); ++part) {
    std::fill_n(room.part.data(), std::size_t(num_rows) * outputs, 0.0f);
    const int stop = std::min(first_group_of(matrix, part + 1) * kGroupChannels, matrix.num_inputs);
    for (int c = first_group_of(matrix, part) * kGroupChannels; c < stop; c += step_of(matrix)) {
      room.terms[0].build(kernels, matrix, product.rows + first_row, num_rows, c, channels_of_step(matrix, c));
      const GroupTerms& group = room.terms[0];
      if (group.empty()) continue;
      kernels.multiply(group.terms(), group.num_terms(), group.shares(), num_rows, group.scales(), first_tile, end_tile,
                       room.part.data() - std::ptrdiff_t{base}, outputs, {});
    }
    for (int r = 0; r < num_rows; ++r) {
      float* const y = product.y + (first_row + r) * product.stride + base;
      const float* sums = room.part.data() + std::size_t(r) * outputs;
      for (int o = 0; o < held; ++o) y[o] = part == 0 ? sums[o] : y[o] + sums[o];
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    float* const y = product.y + (first_row + r) * product.stride + base;
    const bool finite = product.rows[first_row + r].finite(matrix.num_inputs);
    for (int o = 0; o < held; ++o) {
      y[o] = !finite ? std::numeric_limits<float>::quiet_NaN() : product.bias ? y[o] + product.bias[base + o] : y[o];
    }
  }
}

void share_many(const Product* products, int num_products, int num_threads, Sharing& sharing) {
  sharing.products.assign(products, products + num_products);
  sharing.items.clear();
  for (const Product& product : sharing.products) {
    const int tiles = product.matrix->num_tiles();
    const int blocks = std::max((tiles + kTilesAtOnce - 1) / kTilesAtOnce, std::min(tiles, num_threads));
    for (int b = 0; b < blocks; ++b) {
      const int first = tiles * b / blocks, end = tiles * (b + 1) / blocks;
      sharing.items.push_back({&product, first, end, 0, 0, nullptr});
    }
  }
  sharing.taken.store(num_threads, std::memory_order_relaxed);
}

void multiply_items(Sharing& sharing, int thread, Workroom& room) {
  const Kernels& kernels = current_kernels();
  for (int i = thread; i < static_cast<int>(sharing.items.size()); i = sharing.taken.fetch_add(1)) {
    const Item& item = sharing.items[i];
    for (int r = 0; r < item.product->num_rows; r += kRowsAtOnce) {
      multiply_many(kernels, *item.product, r, std::min(kRowsAtOnce, item.product->num_rows - r), item.first_tile,
                    item.end_tile, room);
    }
  }
}

}  // namespace

void reserve(const std::vector<const Matrix*>& matrices, int num_rows, int num_threads, Sharing& sharing,
             std::vector<Workroom>& rooms) {
  std::size_t sums = 0, items = 0;
  for (const Matrix* matrix : matrices) {
    sums += sums_of(*matrix) * std::min(num_rows, kFewRows);
    items += std::max(matrix->num_tiles(), parts_of(*matrix) * strips_of(*matrix));
  }
  if (sharing.sums.size() < sums) sharing.sums.resize(sums);
  sharing.items.reserve(items);
  sharing.products.reserve(matrices.size());
  if (rooms.size() < std::size_t(num_threads)) rooms.resize(num_threads);
  for (Workroom& room : rooms) {
    room.part.resize(std::size_t(kRowsAtOnce) * kTilesAtOnce * kTileOutputs);
    for (std::vector<Run>& runs : room.runs) runs.reserve(4 * kGroupChannels);
    for (GroupTerms& terms : room.terms) terms.reserve(std::min(num_rows, kRowsAtOnce));
  }
}

void multiply(const Product* products, int num_products, Sharing& sharing, const std::vector<const Matrix*>& ahead,
              int thread, int num_threads, Workroom& room, Barrier& barrier) {
  int most = 0;
  for (const Product* product = products; product < products + num_products; ++product) {
    most = std::max(most, product->num_rows);
  }
  const bool many = most > kFewRows;
  if (thread == 0) (many ? share_many : share)(products, num_products, num_threads, sharing);
  barrier.wait();
  if (many) {
    multiply_items(sharing, thread, room);
  } else {
    Walk(current_kernels(), sharing, thread, num_threads, room).run();
    fetch_first(ahead, thread, num_threads);
    barrier.wait();
    add_all_parts(sharing, thread, num_threads);
  }
  barrier.wait();
}

}  // namespace quicksilver

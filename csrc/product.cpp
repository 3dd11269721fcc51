#include "product.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "isa.h"

namespace quicksilver {
namespace {

constexpr int kUnits = 4;       // of a matrix at least, if it has as many blocks: so that threads end together
constexpr int kUnitBlocks = 8;  // of a unit, but for that: sums cost little beside what they are of

// Into how many units each strip is cut.
int units_of_strip(const AnyPrecisionMatrix& matrix) {
  const int blocks = Selection::blocks_of(matrix.num_inputs());
  return std::min(blocks, std::max((kUnits + matrix.num_strips() - 1) / matrix.num_strips(), blocks / kUnitBlocks));
}

// The blocks [begin, end) of a strip's unit.
std::pair<int, int> blocks_of_unit(const AnyPrecisionMatrix& matrix, int unit) {
  const int blocks = Selection::blocks_of(matrix.num_inputs()), units = units_of_strip(matrix);
  return {blocks * unit / units, blocks * (unit + 1) / units};
}

int first_tile(int strip) { return strip * kStripTiles; }
int first_output(int strip) { return first_tile(strip) * kTileOutputs; }
int end_tile(const AnyPrecisionMatrix& matrix, int strip) { return std::min(first_tile(strip + 1), matrix.num_tiles()); }

// A strip's runs of some of a block's channels, to be fetched in so many half quads' time. Quads are read in order,
// which the processor sees by itself, and sooner undisturbed.
Upcoming runs_of(const AnyPrecisionMatrix& matrix, int strip, int block, const std::uint32_t* channels, int slots,
                 const Part* parts, int half_quads) {
  Upcoming next;
  if (matrix.layout() == Layout::kQuads || slots == 0 || half_quads == 0) return next;
  const Tile tile = matrix.tile(first_tile(strip), block);
  next.channels = channels;
  next.end = channels + slots;
  next.part = parts;
  next.slots_left = parts->slots;
  next.num_planes = planes_of(parts->bits);
  std::copy_n(tile.planes, kPlanes, next.planes);
  next.records = tile.records;
  next.stride = tile.stride;
  next.record_stride = tile.record_stride;
  next.run_bytes = std::size_t(matrix.strip_outputs(strip)) / kFields;
  next.run = *channels * tile.stride;
  const std::size_t steps = slots * ((next.run_bytes + kFetchBytes - 1) / kFetchBytes);
  next.rate = static_cast<std::uint32_t>(std::max<std::size_t>(1, (steps * kFetchUnit + half_quads - 1) / half_quads));
  return next;
}

// What the first row reads of a block.
Upcoming upcoming(const Unit& unit, int block, int half_quads) {
  const Chunk chunk = unit.product->rows[0].chunk(block);
  return runs_of(*unit.product->matrix, unit.strip, block, chunk.channels, chunk.slots, chunk.parts, half_quads);
}

// What a thread reads first of the matrices ahead: it begins with the unit of its own number.
Upcoming upcoming(const std::vector<Ahead>& ahead, int thread, int half_quads) {
  static const std::vector<std::uint32_t> all = [] {
    std::vector<std::uint32_t> channels(kChunkChannels);
    std::iota(channels.begin(), channels.end(), 0u);
    return channels;
  }();
  static const Part parts[] = {
      {0, kChunkChannels}, {2, kChunkChannels}, {4, kChunkChannels}, {6, kChunkChannels}, {8, kChunkChannels}};
  int unit = thread;
  for (const auto& [matrix, planes] : ahead) {
    const int units = units_of_strip(*matrix);
    if (unit >= units * matrix->num_strips()) {
      unit -= units * matrix->num_strips();
      continue;
    }
    const int block = blocks_of_unit(*matrix, unit % units).first;
    const int slots = std::min(kChunkChannels, matrix->num_inputs() - block * kChunkChannels);
    return runs_of(*matrix, unit / units, block, all.data(), slots, parts + planes, half_quads);
  }
  return {};
}

// Half quads that a block's products go through.
int half_quads_of(const Unit& unit, int block) {
  int quads = 0;
  for (int r = 0; r < unit.product->num_rows; ++r) quads += unit.product->rows[r].chunk(block).slots / kQuadChannels;
  return quads * (unit.product->matrix->strip_outputs(unit.strip) / kHalfOutputs);
}

// Adds a block's share to y, [rows, stride], of its strip; what a unit adds up by itself begins with its first block.
void run_block(const Unit& unit, int block, float* y, int stride, Upcoming& next, Coefficients& room) {
  const Kernels& kernels = current_kernels();
  const AnyPrecisionMatrix& matrix = *unit.product->matrix;
  const bool adds = !unit.sums || block > unit.begin;
  for (int t = first_tile(unit.strip); t < end_tile(matrix, unit.strip); ++t) {
    const Tile tile = matrix.tile(t, block);
    for (int r = 0; r < unit.product->num_rows; ++r) {
      const Chunk chunk = unit.product->rows[r].chunk(block);
      float* row = y + std::size_t(r) * stride + (t - first_tile(unit.strip)) * kTileOutputs;
      if (chunk.slots) {
        kernels.tile_chunk(tile, chunk, matrix.levels(), room, adds, row, next);
      } else if (!adds) {
        std::fill_n(row, tile.outputs(), 0.0f);
      }
    }
  }
}

// What sums begin with: outputs [begin, end) of one row.
void begin_row(const Product& product, int row, int begin, int end, float* y) {
  if (!product.rows[row].finite(product.matrix->num_inputs())) {
    std::fill_n(y, end - begin, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const int held = product.bias ? std::max(std::min(end, product.matrix->num_outputs()) - begin, 0) : 0;
  std::copy_n(product.bias + (held ? begin : 0), held, y);
  std::fill_n(y + held, end - begin - held, 0.0f);
}

// Where a unit's sums go; where there is no other unit, they begin with the bias.
float* begin_sums(const Unit& unit, int* stride) {
  const Product& product = *unit.product;
  const int first = first_output(unit.strip), outputs = product.matrix->strip_outputs(unit.strip);
  if (unit.sums) {
    *stride = outputs;
    return unit.sums;
  }
  *stride = product.stride;
  float* y = product.y + first;
  for (int r = 0; r < product.num_rows; ++r)
    begin_row(product, r, first, first + outputs, y + std::size_t(r) * *stride);
  return y;
}

// A thread's share of the sums over the units of each strip that has several.
void add_units(const Sharing& sharing, int thread, int num_threads) {
  for (std::size_t u = 0; u < sharing.units.size();) {
    const Unit& unit = sharing.units[u];
    const int units = unit.sums ? units_of_strip(*unit.product->matrix) : 1;
    u += units;
    if (!unit.sums) continue;
    const Product& product = *unit.product;
    const int outputs = product.matrix->strip_outputs(unit.strip), first = first_output(unit.strip);
    const int lines = outputs / kLaneOutputs;
    const int begin = lines * thread / num_threads * kLaneOutputs,
              end = lines * (thread + 1) / num_threads * kLaneOutputs;
    for (int r = 0; r < product.num_rows; ++r) {
      float* y = product.y + std::size_t(r) * product.stride + first;
      begin_row(product, r, first + begin, first + end, y + begin);
      for (int i = 0; i < units; ++i) {
        const float* sums = unit.sums + (std::size_t(i) * product.num_rows + r) * outputs;
        for (int o = begin; o < end; ++o) y[o] += sums[o];
      }
    }
  }
}

// Floats that the sums over a matrix's units take, of each row.
std::size_t sums_of(const AnyPrecisionMatrix& matrix) {
  const int units = units_of_strip(matrix);
  return units > 1 ? std::size_t(units) * matrix.padded_outputs() : 0;
}

// Says what is multiplied next: rows [first, first + kSlice) of the products. To be called by one thread, with a
// barrier before the threads multiply.
void share(const Product* products, int num_products, int first, int num_threads, Sharing& sharing) {
  sharing.products.clear();
  for (const Product* all = products; all < products + num_products; ++all) {
    if (first >= all->num_rows) continue;
    Product part = *all;
    part.rows += first;
    part.y += std::size_t(first) * part.stride;
    part.num_rows = std::min(kSlice, part.num_rows - first);
    sharing.products.push_back(part);
  }
  sharing.units.clear();
  float* sums = sharing.sums.data();
  for (const Product& product : sharing.products) {
    const int units = units_of_strip(*product.matrix);
    for (int strip = 0; strip < product.matrix->num_strips(); ++strip) {
      for (int i = 0; i < units; ++i) {
        const auto [begin, end] = blocks_of_unit(*product.matrix, i);
        sharing.units.push_back({&product, strip, begin, end, units > 1 ? sums : nullptr});
        if (units > 1) sums += std::size_t(product.num_rows) * product.matrix->strip_outputs(strip);
      }
    }
  }
  sharing.taken.store(num_threads, std::memory_order_relaxed);
}

// A thread's part in what is shared.
void multiply_units(Sharing& sharing, const std::vector<Ahead>& ahead, int thread, int num_threads, Coefficients& room,
                    Barrier& barrier) {
  const int count = static_cast<int>(sharing.units.size());
  for (int taken = thread; taken < count;) {
    const Unit& unit = sharing.units[taken];
    int stride;
    float* y = begin_sums(unit, &stride);
    for (int block = unit.begin; block < unit.end; ++block) {
      const int half_quads = half_quads_of(unit, block);
      Upcoming next;
      if (block + 1 < unit.end) {
        next = upcoming(unit, block + 1, half_quads);
      } else {
        taken = sharing.taken.fetch_add(1, std::memory_order_relaxed);
        next = taken < count ? upcoming(sharing.units[taken], sharing.units[taken].begin, half_quads)
                             : upcoming(ahead, thread, half_quads);
      }
      run_block(unit, block, y, stride, next, room);
    }
  }
  barrier.wait();
  add_units(sharing, thread, num_threads);
  barrier.wait();
}

}  // namespace

void reserve(const std::vector<const AnyPrecisionMatrix*>& matrices, int num_rows, Sharing& sharing) {
  std::size_t room = 0, units = 0;
  for (const AnyPrecisionMatrix* matrix : matrices) {
    room += sums_of(*matrix) * std::min(num_rows, kSlice);
    units += std::size_t(units_of_strip(*matrix)) * matrix->num_strips();
  }
  if (sharing.sums.size() < room) sharing.sums.resize(room);
  sharing.units.reserve(units);
  sharing.products.reserve(matrices.size());
}

void multiply(const Product* products, int num_products, Sharing& sharing, const std::vector<Ahead>& ahead, int thread,
              int num_threads, Coefficients& room, Barrier& barrier) {
  static const std::vector<Ahead> nothing;  // these matrices' next rows
  int most = 0;
  for (const Product* product = products; product < products + num_products; ++product) {
    most = std::max(most, product->num_rows);
  }
  for (int first = 0; first < most; first += kSlice) {
    if (thread == 0) share(products, num_products, first, num_threads, sharing);
    barrier.wait();
    const bool last = first + kSlice >= most;
    multiply_units(sharing, last ? ahead : nothing, thread, num_threads, room, barrier);
  }
}

}  // namespace quicksilver

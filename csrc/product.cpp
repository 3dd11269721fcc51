#include "product.h"

#include <algorithm>
#include <limits>

#include "isa.h"

namespace quicksilver {
namespace {

long row_costs(const Product& product) {
  long cost = 0;
  for (int r = 0; r < product.num_rows; ++r) cost += product.rows[r].cost();
  return cost;
}

long total_cost(const std::vector<Product>& products) {
  long cost = 0;
  for (const Product& product : products) cost += row_costs(product) * (product.matrix->padded_outputs() / kHalfOutputs);
  return cost;
}

void begin_row(const Product& product, int tile_index, int row, float* y) {
  const int first = tile_index * kTileOutputs;
  const int width = product.matrix->tile(tile_index).outputs();
  const int held = std::min(width, product.matrix->num_outputs() - first);
  const bool finite = product.rows[row].finite();
  for (int o = 0; o < width; ++o) {
    y[o] = finite ? (product.bias && o < held ? product.bias[first + o] : 0.0f)
                  : std::numeric_limits<float>::quiet_NaN();
  }
}

// What comes after a row's i-th chunk in a tile: the next, or the first of the next row or tile.
Upcoming upcoming(const Product& product, int tile_index, int row, int i) {
  if (++i == product.rows[row].num_chunks()) {
    i = 0;
    if (++row == product.num_rows) {
      row = 0;
      if (++tile_index == product.matrix->num_tiles()) return {};
    }
  }
  if (product.rows[row].num_chunks() == 0) return {};
  const Chunk chunk = product.rows[row].chunk(i);
  return {&product.matrix->tile(tile_index), chunk.channels, chunk.count, planes_of(chunk.width)};
}

// Adds to y, [rows, stride], what the thread's part [begin, end) of a tile's cost gives.
void run_tile(const Product& product, int tile_index, long begin, long end, float* y, int stride, ThreadRoom& room) {
  const Kernels& kernels = current_kernels();
  const Tile& tile = product.matrix->tile(tile_index);
  long at = 0;
  for (int r = 0; r < product.num_rows; ++r) {
    const Selection& row = product.rows[r];
    if (row.finite() && at < end && at + row.cost() * tile.halves > begin) {
      for (int i = 0; i < row.num_chunks(); ++i) {
        const long start = at + row.cost_before(i) * tile.halves;
        if (start < begin || start >= end) continue;
        kernels.tile_chunk(tile, row.chunk(i), product.matrix->levels(), room.coefficients, y + std::size_t(r) * stride,
                           upcoming(product, tile_index, r, i));
      }
    }
    at += row.cost() * tile.halves;
  }
}

void run_part(const std::vector<Product>& products, long begin, long end, bool last, ThreadRoom& room) {
  room.partial_of = nullptr;
  long at = 0;
  for (const Product& product : products) {
    const long rows_cost = row_costs(product);
    for (int t = 0; t < product.matrix->num_tiles(); ++t) {
      const int width = product.matrix->tile(t).outputs();
      const long cost = rows_cost * product.matrix->tile(t).halves;
      const bool starts = at >= begin && (at < end || (last && at == end));  // the second: tiles without any cost
      if (starts) {
        float* y = product.y + std::size_t(t) * kTileOutputs;
        for (int r = 0; r < product.num_rows; ++r) begin_row(product, t, r, y + std::size_t(r) * product.stride);
        run_tile(product, t, begin - at, end - at, y, product.stride, room);
      } else if (at < begin && at + cost > begin) {
        room.partial.assign(std::size_t(product.num_rows) * width, 0.0f);
        room.partial_of = &product;
        room.partial_tile = t;
        run_tile(product, t, begin - at, end - at, room.partial.data(), width, room);
      }
      at += cost;
    }
  }
}

void add_partial(const ThreadRoom& room) {
  const Product& product = *room.partial_of;
  const int width = product.matrix->tile(room.partial_tile).outputs();
  for (int r = 0; r < product.num_rows; ++r) {
    float* y = product.y + std::size_t(r) * product.stride + std::size_t(room.partial_tile) * kTileOutputs;
    const float* part = room.partial.data() + std::size_t(r) * width;
    for (int o = 0; o < width; ++o) y[o] += part[o];
  }
}

}  // namespace

void multiply(const std::vector<Product>& products, int thread, int num_threads, ThreadRoom* rooms, Barrier& barrier) {
  const long cost = total_cost(products);
  run_part(products, cost * thread / num_threads, cost * (thread + 1) / num_threads, thread == num_threads - 1,
           rooms[thread]);
  if (num_threads == 1) return;
  barrier.wait();
  if (thread == 0) {
    for (int t = 1; t < num_threads; ++t) {
      if (rooms[t].partial_of) add_partial(rooms[t]);
    }
  }
  barrier.wait();
}

}  // namespace quicksilver

// Products of rows with nested matrices, shared among threads.
#pragma once

#include <vector>

#include "matrix.h"
#include "pool.h"
#include "selection.h"

namespace quicksilver {

// One matrix, the rows that it meets and where their products go.
struct Product {
  const NestedMatrix* matrix;
  const Selection* rows;  // [num_rows]
  int num_rows;
  float* y;           // [num_rows, stride], stride >= padded_outputs
  int stride;
  const float* bias;  // [outputs], or null
};

// What a thread needs for its part of products; kept from call to call.
struct ThreadRoom {
  Coefficients coefficients;
  std::vector<float> partial;  // of a tile that another thread began
  const Product* partial_of = nullptr;
  int partial_tile = 0;
};

// Computes products together: every thread calls it with the same list. Ends with all threads past the last barrier.
// Reads of `y` beyond the outputs find what padding gives.
void multiply(const std::vector<Product>& products, int thread, int num_threads, ThreadRoom* rooms, Barrier& barrier);

}  // namespace quicksilver

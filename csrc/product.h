// Products of rows with quantized matrices, shared among threads.
#pragma once

#include <atomic>
#include <vector>

#include "matrix.h"
#include "pool.h"
#include "selection.h"

namespace quicksilver {

// One matrix, the rows that it meets and where their products go.
struct Product {
  const AnyPrecisionMatrix* matrix;
  const Selection* rows;  // [num_rows]
  int num_rows;
  float* y;  // [num_rows, stride], stride >= padded_outputs
  int stride;
  const float* bias;  // [outputs], or null
};

// A matrix that the products after these will read, and so many of its planes.
struct Ahead {
  const AnyPrecisionMatrix* matrix;
  int planes;
};

// What one thread multiplies before it takes the next: some blocks of channels of a strip. Units depend on a matrix's
// shape alone, and so do the order and the bits of every sum: neither on threads nor on other rows.
struct Unit {
  const Product* product;
  int strip;
  int begin, end;  // blocks
  float* sums;     // [num_rows, strip's outputs] where the strip has several units, else null
};

// What threads share while they multiply; kept from call to call.
struct Sharing {
  std::vector<Product> products;  // the rows at hand
  std::vector<Unit> units;
  std::vector<float> sums;
  std::atomic<int> taken{0};
};

constexpr int kSlice = 32;  // rows multiplied at a time: the sums of many would take much memory

// Makes room for products of so many rows with these matrices at once. To be called before threads multiply: where
// there is no memory, one of them alone would know.
void reserve(const std::vector<const AnyPrecisionMatrix*>& matrices, int num_rows, Sharing& sharing);

// Multiplies, `kSlice` rows of each product at a time. Every thread calls it, with the same products; it ends with all
// threads past the last barrier. Reads of `y` beyond the outputs find what padding gives. What a thread is expected to
// read first of the matrices ahead is fetched at the end.
void multiply(const Product* products, int num_products, Sharing& sharing, const std::vector<Ahead>& ahead, int thread,
              int num_threads, Coefficients& room, Barrier& barrier);

}  // namespace quicksilver

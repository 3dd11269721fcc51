// Products of rows with quantized matrices, shared among threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "matrix.h"
#include "operand.h"
#include "pool.h"
#include "terms.h"

namespace quicksilver {

// One matrix, the rows that it meets and where their products go.
struct Product {
  const Matrix* matrix;
  const Operand* rows;  // [num_rows]
  int num_rows;
  float* y;            // [num_rows, stride], stride >= outputs
  std::size_t stride;
  const float* bias;  // [outputs], or null
};

// What one thread multiplies before it takes the next: some groups of channels for some tiles of outputs. Which groups
// are added up together depends on a matrix's shape alone, and so do the order and the bits of every sum: neither on
// threads nor on other rows.
struct Item {
  const Product* product;
  int first_tile, end_tile;
  int first_group, end_group;  // of 32 channels
  float* sums;                 // [rows, tiles * 64]
};

// What a thread works with; kept from call to call.
struct Workroom {
  GroupTerms terms[2];  // of the group at hand and of the next
  std::vector<Run> runs[2];
  std::vector<float> part;
};

// What threads share while they multiply; kept from call to call.
struct Sharing {
  std::vector<Product> products;
  std::vector<Item> items;
  std::vector<float> sums;
  std::atomic<int> taken{0};
};

// Makes room for products of so many rows, or of fewer, with these matrices at once. To be called before threads multiply: where
// there is no memory, one of them alone would know.
void reserve(const std::vector<const Matrix*>& matrices, int num_rows, int num_threads, Sharing& sharing,
             std::vector<Workroom>& rooms);

// Every thread calls it, with the same products; it ends with all threads past the last barrier. Matrices ahead are
// those that the next products read.
void multiply(const Product* products, int num_products, Sharing& sharing, const std::vector<const Matrix*>& ahead,
              int thread, int num_threads, Workroom& room, Barrier& barrier);

}  // namespace quicksilver

// Who attends to what: a layer's rows, heads and blocks of entries, shared out among threads. A row's blocks lie at
// fixed places and are joined in their order, whoever worked on them: its bits are the same however work is shared.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "floats.h"

namespace quicksilver {

// Heads of a model's attention.
struct Heads {
  int queries, kv, size;

  int group() const { return queries / kv; }
};

// A row that asks.
struct Asking {
  const float* queries;  // [heads, head_dim]
  float* out;            // likewise
  Entries entries;       // of the first K/V head, from the sequence's first one on
  int first, end;        // what the row sees of them
};

class AttentionShare {
 public:
  // By one thread, before any attends: for so many rows, which see entries before `most`.
  void prepare(const Heads& heads, int rows, int most, int threads);

  // A thread's share; all threads are given the same rows.
  Skipped attend(const FloatKernels& kernels, const Attention& attention, const std::vector<Asking>& rows, int thread);

 private:
  struct Room {
    std::vector<float> floats;
    std::vector<std::int32_t> kept;
  };

  float* room(int thread, std::size_t floats);
  void attend_alone(const FloatKernels& kernels, const Attention& attention, const Asking& row, int head, int thread);
  void attend_together(const FloatKernels& kernels, const Attention& attention, const std::vector<Asking>& rows,
                       int thread);
  Skipped attend_in_two_steps(const FloatKernels& kernels, const Attention& attention, const std::vector<Asking>& rows,
                              int thread);

  Heads heads_{};
  int threads_ = 1, most_blocks_ = 0;
  std::vector<Room> rooms_;                   // of each thread
  std::vector<float> partials_;               // [rows, K/V heads, most blocks] of rows that threads share
  std::unique_ptr<std::atomic<int>[]> done_;  // [rows, K/V heads] blocks that are done; 0 again when all are
  std::size_t num_done_ = 0;
};

}  // namespace quicksilver

#include "attention.h"

#include <algorithm>

namespace quicksilver {
namespace {

constexpr std::uintptr_t kLine = 64;

// The entries of a K/V head.
Entries of_head(Entries entries, int head, int size) {
  const std::size_t offset = std::size_t(head) * size * bytes_of(entries.kept);
  entries.keys = static_cast<const char*>(entries.keys) + offset;
  entries.values = static_cast<const char*>(entries.values) + offset;
  if (entries.key_scales) entries.key_scales += head * scales_of(size);
  if (entries.value_scales) entries.value_scales += head * scales_of(size);
  return entries;
}

RowsAhead keys_from(const Entries& entries, int place) {
  const std::int64_t bytes = place * entries.stride * static_cast<std::int64_t>(bytes_of(entries.kept));
  return {static_cast<const char*>(entries.keys) + bytes,
          entries.key_scales ? entries.key_scales + place * entries.scale_stride : nullptr};
}

// What a row sees of its blocks.
struct Blocks {
  int first, end;

  int begin_of(int block) const { return std::max(first, (first / kBlockEntries + block) * kBlockEntries); }
  int end_of(int block) const { return std::min(end, (first / kBlockEntries + block + 1) * kBlockEntries); }
  int count() const { return (end + kBlockEntries - 1) / kBlockEntries - first / kBlockEntries; }
};

}  // namespace

void AttentionShare::prepare(const Heads& heads, int rows, int most, int threads) {
  heads_ = heads;
  threads_ = threads;
  rooms_.resize(std::max<std::size_t>(rooms_.size(), threads));
  if (rows >= 2 * threads) return;  // each row has a thread
  most_blocks_ = Blocks{0, most}.count();
  const std::size_t shared = std::size_t(rows) * heads.kv;
  if (num_done_ < shared) {
    done_.reset(new std::atomic<int>[shared]());
    num_done_ = shared;
  }
  const std::size_t floats = shared * most_blocks_ * partial_floats(heads.group(), heads.size);
  if (partials_.size() < floats) partials_.resize(floats + floats / 4);
}

// A thread's room, from the beginning of a line of the cache on.
float* AttentionShare::room(int thread, std::size_t floats) {
  std::vector<float>& own = rooms_[thread].floats;
  if (own.size() < floats + kLine / sizeof(float)) own.resize(floats + floats / 4 + kLine / sizeof(float));
  const auto at = reinterpret_cast<std::uintptr_t>(own.data());
  return own.data() + (kLine - at % kLine) % kLine / sizeof(float);
}

Skipped AttentionShare::attend(const FloatKernels& kernels, const Attention& attention, const std::vector<Asking>& rows,
                               int thread) {
  if (attention.skip_below > 0.0f) return attend_in_two_steps(kernels, attention, rows, thread);
  if (static_cast<int>(rows.size()) < 2 * threads_) {
    attend_together(kernels, attention, rows, thread);
    return {};
  }
  for (std::size_t i = thread; i < rows.size(); i += threads_) {
    for (int h = 0; h < heads_.kv; ++h) attend_alone(kernels, attention, rows[i], h, thread);
  }
  return {};
}

// All blocks of a row for one K/V head.
void AttentionShare::attend_alone(const FloatKernels& kernels, const Attention& attention, const Asking& row, int head,
                                  int thread) {
  const int group = heads_.group(), size = heads_.size;
  const Blocks blocks{row.first, row.end};
  const Entries entries = of_head(row.entries, head, size);
  const std::size_t at = std::size_t(head) * group * size, floats = partial_floats(group, size);
  float* all = room(thread, 2 * floats + block_room(group, size));
  float *next = all + floats, *working = next + floats;
  for (int b = 0; b < blocks.count(); ++b) {
    const int first = blocks.begin_of(b), last = blocks.end_of(b);
    const RowsAhead ahead = last < row.end ? keys_from(entries, last) : RowsAhead{};
    kernels.attend_block(row.queries + at, group, size, entries, attention, first, last, ahead, working,
                         b == 0 ? all : next);
    if (b > 0) kernels.join_blocks(group, size, next, all);
  }
  kernels.finish_blocks(group, size, all, row.out + at);
}

// Threads share all blocks of a few rows; the last one to be done with a row's joins them.
void AttentionShare::attend_together(const FloatKernels& kernels, const Attention& attention,
                                     const std::vector<Asking>& rows, int thread) {
  const int group = heads_.group(), size = heads_.size;
  const std::size_t floats = partial_floats(group, size);
  float* working = room(thread, block_room(group, size));
  std::int64_t tasks = 0, task = 0;
  for (const Asking& row : rows) tasks += std::int64_t{Blocks{row.first, row.end}.count()} * heads_.kv;
  const std::int64_t begin = tasks * thread / threads_, end = tasks * (thread + 1) / threads_;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Asking& row = rows[i];
    const Blocks blocks{row.first, row.end};
    for (int b = 0; b < blocks.count(); ++b) {
      for (int h = 0; h < heads_.kv; ++h, ++task) {  // neighbours' entries are neighbours
        if (task < begin || task >= end) continue;
        const std::size_t shared = i * heads_.kv + h, at = std::size_t(h) * group * size;
        float* all = partials_.data() + shared * most_blocks_ * floats;
        const int first = blocks.begin_of(b), last = blocks.end_of(b);
        RowsAhead ahead{};
        if (h + 1 < heads_.kv) {
          ahead = keys_from(of_head(row.entries, h + 1, size), first);
        } else if (last < row.end) {
          ahead = keys_from(row.entries, last);
        }
        const Entries entries = of_head(row.entries, h, size);
        kernels.attend_block(row.queries + at, group, size, entries, attention, first, last, ahead, working,
                             all + b * floats);
        if (done_[shared].fetch_add(1, std::memory_order_acq_rel) + 1 < blocks.count()) continue;
        done_[shared].store(0, std::memory_order_relaxed);
        for (int next = 1; next < blocks.count(); ++next) kernels.join_blocks(group, size, all + next * floats, all);
        kernels.finish_blocks(group, size, all, row.out + at);
      }
    }
  }
}

Skipped AttentionShare::attend_in_two_steps(const FloatKernels& kernels, const Attention& attention,
                                            const std::vector<Asking>& rows, int thread) {
  const std::int64_t tasks = std::int64_t(rows.size()) * heads_.queries;
  const std::int64_t begin = tasks * thread / threads_, end = tasks * (thread + 1) / threads_;
  Skipped skipped{};
  for (std::int64_t task = begin; task < end; ++task) {
    const Asking& row = rows[task / heads_.queries];
    const int head = static_cast<int>(task % heads_.queries), count = row.end - row.first;
    std::vector<std::int32_t>& kept = rooms_[thread].kept;
    if (kept.size() < std::size_t(count)) kept.resize(count + count / 4);
    const std::size_t at = std::size_t(head) * heads_.size;
    skipped += kernels.attend_in_two_steps(
        row.queries + at, heads_.size, of_head(row.entries, head / heads_.group(), heads_.size), attention, row.first,
        row.end, room(thread, two_steps_room(heads_.size, count)), kept.data(), row.out + at);
  }
  return skipped;
}

}  // namespace quicksilver

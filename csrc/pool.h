// The threads that kernels share: one pool a process, beside PyTorch's own. Either's threads wait awake for a while
// after their work, and take the processors from the other's meanwhile.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace quicksilver {

// Lets `count` threads wait for one another, again and again; they spin, since stages are short.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// What comes after a run: another soon, for which workers wait awake, or PyTorch's work, for which they make room.
enum class Next { kRun, kOthers };

class Pool {
 public:
  static Pool& shared();

  // Runs task(thread, barrier) on `threads` threads, the caller's among them as thread 0; one run at a time. A task
  // must not throw, since the others wait for it at barriers: an exception, which can only be a lack of memory, ends
  // the process.
  void run(int threads, const std::function<void(int, Barrier&)>& task, Next next = Next::kRun);

 private:
  Pool() = default;  // never destroyed
  void grow(int workers);
  void work(int thread, unsigned seen);

  std::mutex one_run_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int num_workers_ = 0;  // detached
  const std::function<void(int, Barrier&)>* task_ = nullptr;
  Barrier* barrier_ = nullptr;
  int active_ = 0;
  std::atomic<Next> next_{Next::kRun};
  std::atomic<unsigned> round_{0};
  std::atomic<int> running_{0};
};

}  // namespace quicksilver

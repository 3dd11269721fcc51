#include "pool.h"

#include <pthread.h>

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace quicksilver {
namespace {

constexpr int kSpinsBeforeYield = 4096;
constexpr auto kSpinTime = std::chrono::microseconds(500);  // how long a worker waits awake for the next run

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

Pool*& instance() {
  static Pool* pool = nullptr;
  return pool;
}

std::mutex& instance_mutex() {
  static std::mutex mutex;
  return mutex;
}

void forget_in_child() {  // threads do not survive a fork; the old pool is left alone, its memory with it
  instance() = nullptr;
}

}  // namespace

void Barrier::wait() {
  if (count_ == 1) return;
  const unsigned phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

Pool& Pool::shared() {
  std::lock_guard<std::mutex> lock(instance_mutex());
  if (instance() == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_in_child);
    (void)registered;
    instance() = new Pool;  // never deleted: workers may outlive static destruction
  }
  return *instance();
}

void Pool::grow(int workers) {
  for (; num_workers_ < workers; ++num_workers_) {
    std::thread(&Pool::work, this, num_workers_ + 1, round_.load()).detach();
  }
}

void Pool::run(int threads, const std::function<void(int, Barrier&)>& task, Next next) {
  Barrier barrier(threads);
  const auto part = [&]() noexcept { task(0, barrier); };
  if (threads <= 1) {
    if (next == Next::kOthers) next_.store(next, std::memory_order_relaxed);
    part();
    return;
  }
  std::lock_guard<std::mutex> only(one_run_);
  grow(threads - 1);
  running_.store(num_workers_, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    barrier_ = &barrier;
    active_ = threads;
    next_.store(next, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  part();
  for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void Pool::work(int thread, unsigned seen) {
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpinTime;
    for (int spins = 1; round_.load(std::memory_order_acquire) == seen; ++spins) {
      if (next_.load(std::memory_order_relaxed) == Next::kOthers) break;
      pause();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
    }
    seen = round_.load(std::memory_order_acquire);
    if (thread < active_) (*task_)(thread, *barrier_);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace quicksilver

// Where a run's time goes, as its first thread sees it; barriers count to the stage before them.
#pragma once

#include <array>
#include <chrono>

namespace quicksilver {

enum Stage {
  kNorming,      // norms, activations, what sublayers add
  kSelecting,    // inputs of matrices rounded to codes
  kMultiplying,  // matrices
  kEntering,     // norms and rotations of queries and keys, entries written
  kAttending,
  kStages
};

struct StageTimes {
  using Clock = std::chrono::steady_clock;

  bool on = false;
  std::array<double, kStages> seconds{};
  Clock::time_point last{};

  void begin() {
    if (on) last = Clock::now();
  }
  void end(Stage stage) {
    if (!on) return;
    const Clock::time_point now = Clock::now();
    seconds[stage] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace quicksilver

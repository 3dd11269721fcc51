// Included by kernels_*.cpp of processors that can be told what to read ahead.
#include <immintrin.h>

#include "kernels.h"

namespace quicksilver {
namespace {

// Goes on to the next run, if there is one.
inline void next_run(Upcoming& next) {
  while (++next.stream > kPlanes || next.slot >= next.streams[next.stream].slots) {
    next.stream = -1;
    if (++next.slot >= next.slots) {
      next.step = 0;
      return;
    }
  }
  const Upcoming::Stream& stream = next.streams[next.stream];
  next.at = stream.base + next.channels[next.slot] * stream.stride;
  next.end = next.at + stream.bytes;
}

// Fetches a step of what is coming. Inlined: a call would empty the vector registers.
inline void fetch(Upcoming& next) {
  for (int i = 0; i < next.step; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(next.at), _MM_HINT_T1);
    next.at += 64;
    if (next.at >= next.end) next_run(next);
  }
}

}  // namespace
}  // namespace quicksilver

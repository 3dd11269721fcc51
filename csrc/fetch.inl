// Included by kernels_*.cpp of processors that can be told what to read ahead.
#include <immintrin.h>

#include "kernels.h"

namespace quicksilver {
namespace {

// Always inlined: GCC takes a function that only fetches for one without effect, and leaves out calls of it.
[[gnu::always_inline]] inline void fetch_line(const std::uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

[[gnu::always_inline]] inline void fetch_lines(const std::uint8_t* at) {
  fetch_line(at);
  fetch_line(at + kLineBytes);
}

inline void next_channel(Upcoming& next) {
  next.line = 0;
  if (++next.channels == next.end) {
    next.rate = next.due = 0;
    return;
  }
  if (--next.slots_left == 0) {
    next.slots_left = (++next.part)->slots;
    next.num_planes = planes_of(next.part->bits);
  }
  next.run = *next.channels * next.stride;
}

// Past the end of a run, of an odd number of lines, lies the next channel's, which is mostly read too.
inline void fetch_step(Upcoming& next) {
  const std::size_t tile = next.line / kLineBytes, at = next.run + next.line, at_twice = next.run + at;
  if (tile % 4 == 0) {  // a line holds four tiles' records
    fetch_line(next.records + *next.channels * next.record_stride + tile * kRecordBytes);
  }
  fetch_lines(next.planes[0] + at);
  if (next.num_planes > 1) {
    fetch_lines(next.planes[1] + at);
    if (next.num_planes > 2) {
      fetch_lines(next.planes[2] + at_twice);  // Tile::stride_in
      if (next.num_planes > 3) fetch_lines(next.planes[3] + at_twice);
    }
  }
  next.line += kFetchBytes;
  if (next.line >= next.run_bytes) next_channel(next);
}

// Fetches what is due while half a quad is multiplied.
inline void fetch(Upcoming& next) {
  next.due += next.rate;
  while (next.due >= kFetchUnit) {
    next.due -= kFetchUnit;
    fetch_step(next);
  }
}

}  // namespace
}  // namespace quicksilver

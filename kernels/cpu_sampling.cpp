// The largest logit of each row and where it stands first: one pass over memory, blocks are searched again in L1.
#include "cpu.h"

#include <math.h>

namespace quire {
namespace {

constexpr long kSearched = 2048;  // logits of a block: 8 KiB

// Largest of `count` > 0 numbers; NaN if there is one.
inline float largest(const float* x, long count) {
  Vec top = broadcast(-INFINITY), nan = {};
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = load(x + i);
    top = v > top ? v : top;
    nan = v != v ? v : nan;
  }
  float best = max_lanes(nan != nan ? nan : top);
  for (; i < count; i++) best = x[i] > best || x[i] != x[i] ? x[i] : best;
  return best;
}

inline void search_row(const float* x, long width, float* value, int64_t* index) {
  float best = -INFINITY;
  long block = 0;
  for (long start = 0; start < width; start += kSearched) {
    const float here = largest(x + start, width - start < kSearched ? width - start : kSearched);
    if (here != here) {
      *value = here, *index = 0;
      return;
    }
    if (here > best) best = here, block = start;
  }
  *value = best;
  while (x[block] != best) block++;
  *index = block;
}

}  // namespace
}  // namespace quire

// values [rows], indices [rows] of x [rows, width], rows x_stride elements apart; index 0 where the value is NaN.
extern "C" void quire_row_maxima(const float* x, float* values, int64_t* indices, long x_stride, long rows, long width,
                                 int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++) quire::search_row(x + row * x_stride, width, values + row, indices + row);
}

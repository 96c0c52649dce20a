// The likeliest token of each row, and one drawn from each. Finding a maximum is one pass over memory: the block that
// holds it is searched again in L1.
#include "cpu_rows.h"

namespace quire {
namespace {

constexpr long kSearched = 2048;  // logits of a block: 8 KiB

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

// tokens [rows] drawn from the softmax of x [rows, width], contiguous, by the noise of (seed, position).
extern "C" void quire_draw_rows(const float* x, const int64_t* seeds, const int64_t* positions, int64_t* tokens,
                                long rows, long width, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++)
    tokens[row] = quire::draw_row(x + row * width, width, quire::NoiseKey(seeds[row], positions[row]));
}

// The likeliest token of each row, and one drawn from each.
#include "cpu_rows.h"

// values [rows], indices [rows] of x [rows, width], rows x_stride elements apart; index 0 where the value is NaN.
extern "C" void quire_row_maxima(const float* x, float* values, int64_t* indices, long x_stride, long rows, long width,
                                 int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++) values[row] = quire::likeliest(x + row * x_stride, width, indices + row);
}

// tokens [rows] drawn from the softmax of x [rows, width], contiguous, by the noise of (seed, position).
extern "C" void quire_draw_rows(const float* x, const int64_t* seeds, const int64_t* positions, int64_t* tokens,
                                long rows, long width, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++)
    tokens[row] = quire::draw_row(x + row * width, width, quire::NoiseKey(seeds[row], positions[row]));
}

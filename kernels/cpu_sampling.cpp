// The likeliest token of each row, and one drawn from each.
#include "cpu_rows.h"

#include <cmath>

// Of x [rows, width], rows x_stride elements apart: the likeliest token of each, 0 where a number is NaN, and whether the
// largest number is finite.
extern "C" void quire_survey_rows(const float* x, int64_t* tokens, int64_t* finite, long x_stride, long rows, long width,
                                  int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++)
    finite[row] = std::isfinite(quire::likeliest(x + row * x_stride, width, tokens + row));
}

// tokens [rows] drawn from the softmax of x [rows, width], contiguous, by the noise of (seed, position).
extern "C" void quire_draw_rows(const float* x, const int64_t* seeds, const int64_t* positions, int64_t* tokens,
                                long rows, long width, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++)
    tokens[row] = quire::draw_row(x + row * width, width, quire::NoiseKey(seeds[row], positions[row]));
}

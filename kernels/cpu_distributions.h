// One row of logits after temperature, top-k, top-p and min-p: for whoever draws from it at once.
#pragma once
#include <stdint.h>

#include <vector>

namespace quire {

struct Cuts {
  float temperature, top_p, floor;  // floor: logarithm of min-p
  long top_k;                       // < 1: none
};

// What a row is cut with; from row to row the memory stays.
struct CutBuffers {
  std::vector<uint64_t> keys;
  std::vector<float> values;
};

// y [width]: scaled logits of x [width], which may be the same row; NaN where x is not finite.
void shape_row(const float* x, float* y, long width, const Cuts& cuts, CutBuffers& buffers);

}  // namespace quire

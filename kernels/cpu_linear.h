// What a linear layer is, for the two ways of computing it.
#pragma once
#include "cpu.h"

namespace quire {

constexpr long kMostBlock = 512;  // rows that are gone through per tile of weights

template <class T>
struct Layer {
  const T* x;
  const T* weight;
  const T* bias;      // [out] or null
  const T* residual;  // [rows, out] or null
  T* y;
  float* wide_y;  // null, or where the result goes as float32 (still rounded to T first)
  long x_stride, residual_stride, y_stride;
  long rows, in, out;  // gated: out is half the number of weight rows
};

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

}  // namespace quire

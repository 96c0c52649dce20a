// The elementwise steps between the matrices: RMSNorm, and (norm and) rotary embedding of query and key heads in place.
// Each row is one pass over memory; roundings are those of the library's modelling code.
#include "cpu_kernels.h"

#include <math.h>

namespace quire {
namespace {

constexpr long kSerialElements = 1 << 14;  // below, waking the other threads costs more than it saves

// y = T(x / rms(x)) * weight over `width` elements; y may be x.
template <class T>
inline void normalise(const T* x, const T* weight, T* y, long width, float epsilon) {
  const long whole = width - width % kLanes;
  const int rest = width - whole;
  Vec squares = {};
  for (long i = 0; i < whole; i += kLanes) {
    Vec v = load(x + i);
    squares += v * v;
  }
  if (rest) {
    Vec v = load_some(x + whole, rest);
    squares += v * v;
  }
  const float scale = 1.0f / sqrtf(sum_lanes(squares) / width + epsilon);
  for (long i = 0; i < whole; i += kLanes) store(y + i, rounded<T>(load(x + i) * scale) * load(weight + i));
  if (rest)
    store_some(y + whole, rounded<T>(load_some(x + whole, rest) * scale) * load_some(weight + whole, rest), rest);
}

template <class T>
void norm_rows(const T* x, const T* weight, T* y, long x_stride, long rows, long width, float epsilon, int threads) {
#pragma omp parallel for num_threads(rows* width < kSerialElements ? 1 : threads)
  for (long row = 0; row < rows; row++)
    normalise(x + row * x_stride, weight, y + row * width, width, epsilon);
}

// Rotate the pairs (i, i + half) of one head; every product is rounded to T before the sum.
template <class T>
inline void rotate_head(T* head, const T* cos, const T* sin, long half) {
  for (long i = 0; i < half; i += kLanes) {
    const int count = half - i < kLanes ? half - i : kLanes;
    const bool whole = count == kLanes;
    T *low = head + i, *high = head + half + i;
    const Vec c = whole ? load(cos + i) : load_some(cos + i, count);
    const Vec s = whole ? load(sin + i) : load_some(sin + i, count);
    const Vec a = whole ? load(low) : load_some(low, count);
    const Vec b = whole ? load(high) : load_some(high, count);
    const Vec first = rounded<T>(a * c) - rounded<T>(b * s), second = rounded<T>(b * c) + rounded<T>(a * s);
    store_some(low, first, count);
    store_some(high, second, count);
  }
}

template <class T>
void rotate_rows(T* heads, const T* cos, const T* sin, const T* weight, long row_stride, long rows, long num_heads,
                 long width, long half, float epsilon, int threads) {
#pragma omp parallel for num_threads(rows* num_heads* width < kSerialElements ? 1 : threads)
  for (long row = 0; row < rows; row++)
    for (long h = 0; h < num_heads; h++) {
      T* head = heads + row * row_stride + h * width;
      if (weight) normalise(head, weight + h * width, head, width, epsilon);
      rotate_head(head, cos + row * half, sin + row * half, half);
    }
}

}  // namespace
}  // namespace quire

using quire::bf16;

// y [rows, width] (contiguous) = rms_norm(x) * weight; x rows x_stride elements apart.
extern "C" void quire_rms_norm(const void* x, const void* weight, void* y, long x_stride, long rows, long width,
                               float epsilon, int is_bf16, int threads) {
  if (is_bf16)
    quire::norm_rows((const bf16*)x, (const bf16*)weight, (bf16*)y, x_stride, rows, width, epsilon, threads);
  else
    quire::norm_rows((const float*)x, (const float*)weight, (float*)y, x_stride, rows, width, epsilon, threads);
}

// heads [rows, num_heads, width], rows row_stride elements apart, in place: rms_norm with weight [num_heads, width] if
// not null, then rotation of the leading 2 * half elements by cos, sin [rows, half].
extern "C" void quire_rotate(void* heads, const void* cos, const void* sin, const void* weight, long row_stride,
                             long rows, long num_heads, long width, long half, float epsilon, int is_bf16,
                             int threads) {
  if (is_bf16)
    quire::rotate_rows((bf16*)heads, (const bf16*)cos, (const bf16*)sin, (const bf16*)weight, row_stride, rows,
                       num_heads, width, half, epsilon, threads);
  else
    quire::rotate_rows((float*)heads, (const float*)cos, (const float*)sin, (const float*)weight, row_stride, rows,
                       num_heads, width, half, epsilon, threads);
}

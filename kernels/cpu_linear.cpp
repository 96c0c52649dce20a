// Linear layers over the plain weight matrix [out, in] as the checkpoint stores it: nothing is re-packed, per call or at
// all, and an embedding can be the output head at the same time. Where the CPU has tile registers, bfloat16 goes to
// cpu_linear_tiles.h.
//
// Both operands are contiguous along `in`, so everything is dot products. A tile of 4 rows x 4 outputs keeps 16 sums in
// registers and needs 8 loads per 16 multiplications. One or two rows take more outputs instead (1 x 16, 2 x 8), so
// that there are always enough independent sums to hide the latency; that case is bound by reading the weights once,
// which the hardware prefetcher does well because consecutive outputs are consecutive memory.
#include "cpu_linear.h"
#include "cpu_kernels.h"
#include "cpu_linear_tiles.h"

#include <omp.h>

namespace quire {
namespace {

constexpr long kRowBlockBytes = 384 << 10;  // rows that are gone through per weight tile stay in a core's L2
constexpr long kLeastBlock = 64;  // rows of such a block, a multiple of the tile
constexpr long kChunkBytes = 2 << 10;  // of a row, multiplied at a time: 4 weight rows take 8 KiB of L1
constexpr long kAhead = 16 << 10;      // bytes of weights that are asked for before their turn: memory answers late
constexpr long kSerialWork = 1 << 15;  // multiplications below which waking the other threads costs more

template <class T>
inline void store_tile(T* p, long stride, Vec v, int rows, int per_row, int columns) {
  T lanes[kLanes];
  store(lanes, v);
  for (int r = 0; r < rows; r++) memcpy(p + r * stride, lanes + r * per_row, columns * sizeof(T));
}

// Bias and rounding of one tile; lanes behind the last output hold anything.
template <class T, int ROWS>
inline Vec finish(const Layer<T>& l, Vec sums, long weight_row, int columns) {
  if (l.bias) {
    constexpr int COLUMNS = kLanes / ROWS;
    T lanes[kLanes] = {};
    for (int r = 0; r < ROWS; r++) memcpy(lanes + r * COLUMNS, l.bias + weight_row, columns * sizeof(T));
    sums += load(lanes);
  }
  return rounded<T>(sums);
}

// What becomes of the sums of one tile: bias, silu(gate) * up, residual, store. `up` is read only if GATED.
template <class T, int ROWS, bool GATED>
inline void finish_tile(const Layer<T>& l, Vec v, Vec up, long row, int count, long n, int columns) {
  constexpr int COLUMNS = kLanes / ROWS;
  v = finish<T, ROWS>(l, v, n, columns);
  if (GATED) v = rounded<T>(silu(v)) * finish<T, ROWS>(l, up, l.out + n, columns);
  if (l.residual) {
    const T* old = l.residual + row * l.residual_stride + n;
    T lanes[kLanes] = {};
    for (int r = 0; r < count; r++) memcpy(lanes + r * COLUMNS, old + r * l.residual_stride, columns * sizeof(T));
    v += load(lanes);
  }
  if (l.wide_y)
    store_tile(l.wide_y + row * l.y_stride + n, l.y_stride, v, count, COLUMNS, columns);
  else
    store_tile(l.y + row * l.y_stride + n, l.y_stride, v, count, COLUMNS, columns);
}

// Outputs first .. first + kLanes - 1 (as far as they exist) of the groups of ROWS rows from `row` to `end`. The last
// group may be incomplete: its last row is computed again in place of the missing ones.
//
// For each chunk of the inputs, a tile of weights (L1) meets all rows (streaming from L2) before the next chunk's turn;
// the sums of a tile wait in `sums`. Chunks are added up in the same order whatever the number of rows.
template <class T, int ROWS, bool GATED>
inline void compute(const Layer<T>& l, long row, long end, long first, Vec* sums) {
  constexpr int COLUMNS = kLanes / ROWS, PER_GROUP = GATED ? 2 : 1;
  constexpr long CHUNK = kChunkBytes / sizeof(T);
  const long groups = (end - row + ROWS - 1) / ROWS, stop = first + kLanes < l.out ? first + kLanes : l.out;
  for (long n = first; n < stop; n += COLUMNS) {
    const int columns = stop - n < COLUMNS ? stop - n : COLUMNS;
    for (long start = 0; start < l.in; start += CHUNK) {
      const long length = l.in - start < CHUNK ? l.in - start : CHUNK;
      const T *gates[COLUMNS], *ups[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) {
        gates[c] = l.weight + (c < columns ? n + c : l.out - 1) * l.in + start;
        ups[c] = gates[c] + l.out * l.in;
      }
      const long slice = (COLUMNS * length * (long)sizeof(T) / groups + 63) / 64 * 64;
      for (long g = 0; g < groups; g++) {
        // Outputs follow each other in memory, so what comes kAhead later is the next tiles' weights.
        prefetch((const char*)gates[0] + kAhead + g * slice, slice);
        if (GATED) prefetch((const char*)ups[0] + kAhead + g * slice, slice);
        const T* rows[ROWS];
        for (long r = 0; r < ROWS; r++) {
          const long own = row + g * ROWS + r;
          rows[r] = l.x + (own < end ? own : end - 1) * l.x_stride + start;
        }
        Vec* sum = sums + g * PER_GROUP;
        const Vec part = dot_tile<T, ROWS>(rows, gates, length);
        sum[0] = start ? sum[0] + part : part;
        if (GATED) {
          const Vec other = dot_tile<T, ROWS>(rows, ups, length);
          sum[1] = start ? sum[1] + other : other;
        }
      }
    }
    for (long g = 0; g < groups; g++) {
      const long own = row + g * ROWS;
      const int count = end - own < ROWS ? end - own : ROWS;
      const Vec* sum = sums + g * PER_GROUP;
      finish_tile<T, ROWS, GATED>(l, sum[0], sum[PER_GROUP - 1], own, count, n, columns);
    }
  }
}

template <class T, bool GATED>
inline void compute_rows(const Layer<T>& l, long row, long end, long first, Vec* sums) {
  const long rest = (end - row) % kTileRows;
  const long whole = rest <= 2 ? end - rest : end;
  if (whole > row) compute<T, kTileRows, GATED>(l, row, whole, first, sums);
  if (rest == 1) compute<T, 1, GATED>(l, whole, end, first, sums);
  if (rest == 2) compute<T, 2, GATED>(l, whole, end, first, sums);
}

template <class T, bool GATED>
void run(const Layer<T>& l, int threads) {
  const long tiles = (l.out + kLanes - 1) / kLanes;
  long block = kRowBlockBytes / (l.in * (long)sizeof(T)) / kTileRows * kTileRows;
  block = block < kLeastBlock ? kLeastBlock : block > kMostBlock ? kMostBlock : block;
  if (l.rows * l.in * l.out < kSerialWork) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    Vec sums[2 * kMostBlock / kTileRows];
    // Contiguous shares of the weights: each thread streams its own part of memory.
    const long share = omp_get_thread_num(), shares = omp_get_num_threads();
    const long begin = tiles * share / shares, end = tiles * (share + 1) / shares;
    for (long row = 0; row < l.rows; row += block) {
      const long last = row + block < l.rows ? row + block : l.rows;
      for (long tile = begin; tile < end; tile++) compute_rows<T, GATED>(l, row, last, tile * kLanes, sums);
    }
  }
}

template <class T>
void dispatch(const void* x, const void* weight, const void* bias, const void* residual, void* y, long x_stride,
              long residual_stride, long y_stride, long rows, long in, long out, bool gated, bool wide, int threads) {
  Layer<T> l{(const T*)x, (const T*)weight, (const T*)bias, (const T*)residual, (T*)y, wide ? (float*)y : nullptr,
             x_stride,    residual_stride,  y_stride,       rows,               in,    out};
#if defined(QUIRE_TILES)
  if constexpr (sizeof(T) == sizeof(bf16)) {
    if (rows * in * out < kSerialWork) threads = 1;
    if (rows && fits_tiles(l)) return gated ? run_tiles<true>(l, threads) : run_tiles<false>(l, threads);
  }
#endif
  return gated ? run<T, true>(l, threads) : run<T, false>(l, threads);
}

}  // namespace
}  // namespace quire

// y = x W^T (+ bias) (+ residual), or gated: y = silu(x G^T) * (x U^T) with weight = G over U. Strides in elements.
// Roundings to T: after the bias, after silu, and of the result.
extern "C" void quire_linear(const void* x, const void* weight, const void* bias, const void* residual, void* y,
                             long x_stride, long residual_stride, long y_stride, long rows, long in, long out,
                             int is_bf16, int gated, int wide, int threads) {
  auto call = is_bf16 ? quire::dispatch<quire::bf16> : quire::dispatch<float>;
  call(x, weight, bias, residual, y, x_stride, residual_stride, y_stride, rows, in, out, gated, wide, threads);
}

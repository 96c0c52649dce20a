// Sums of queries and of their outer products. The contract stands in kernels/query_moments.py. Sums go over the rows in
// fixed groups, whatever the threads.
#include "cpu_tiles.h"

namespace quire {
namespace {

constexpr long kSlice = 256;  // rows whose turned numbers wait in cache

struct Queries {
  const bf16* query;
  const float *cos, *sin;  // [n, half]
  float *total, *outer;    // [H, D] and [H, D, D]
  long stride, rows, heads, width, half;
};

// out [width] = one row of one head, turned.
inline void turn_row(const Queries& q, long row, long head, float* out) {
  const bf16* from = q.query + row * q.stride + head * q.width;
  const float *cos = q.cos + row * q.half, *sin = q.sin + row * q.half;
  for (long i = 0; i < q.width; i += kLanes) store(out + i, load(from + i));
  for (long i = 0; i < q.half; i++) {
    const float a = out[i], b = out[i + q.half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + q.half] = b * cos[i] + a * sin[i];
  }
}

#if defined(QUIRE_TILES)

// right[block][group]: 16 pairs of rows x 16 columns of a slice, left[..]: the same, rows and columns exchanged.
void pack_slice(const Queries& q, long head, long first, long count, float* turned, __m512i* left, __m512i* right) {
  const long blocks = q.width / kTile, groups = kSlice / kTileInputs;
  float* total = q.total + head * q.width;
  for (long group = 0; group < groups; group++)
    for (long pair = 0; pair < kTile; pair++) {
      for (long i = 0; i < 2; i++) {
        const long row = group * kTileInputs + 2 * pair + i;
        if (row < count)
          turn_row(q, first + row, head, turned + i * q.width);
        else
          memset(turned + i * q.width, 0, q.width * sizeof(float));
      }
      for (long block = 0; block < blocks; block++) {
        const Vec a = load(turned + block * kTile), b = load(turned + q.width + block * kTile);
        store(total + block * kTile, load(total + block * kTile) + (a + b));
        right[(block * groups + group) * kTile + pair] = (__m512i)(bf16_bits(a) >> 16 | (bf16_bits(b) & 0xffff0000u));
      }
    }
  memcpy(left, right, blocks * groups * kTile * sizeof(__m512i));
  for (long i = 0; i < blocks * groups; i++) transpose_words(left + i * kTile);
}

// outer += left x right for all pairs of blocks that are not below the diagonal, then below it as above.
void multiply_slice(const Queries& q, long head, const __m512i* left, const __m512i* right) {
  const long blocks = q.width / kTile, groups = kSlice / kTileInputs, row = q.width * sizeof(float);
  float* outer = q.outer + head * q.width * q.width;
  for (long i = 0; i < blocks; i += 2)
    for (long j = i; j < blocks; j += 2) {
      float *top = outer + i * kTile * q.width + j * kTile, *bottom = top + kTile * q.width;
      _tile_loadd(0, top, row);
      _tile_loadd(1, top + kTile, row);
      _tile_loadd(2, bottom, row);
      _tile_loadd(3, bottom + kTile, row);
      for (long group = 0; group < groups; group++) {
        _tile_loadd(4, left + (i * groups + group) * kTile, 64);
        _tile_loadd(5, left + ((i + 1) * groups + group) * kTile, 64);
        _tile_loadd(6, right + (j * groups + group) * kTile, 64);
        _tile_loadd(7, right + ((j + 1) * groups + group) * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, top, row);
      _tile_stored(1, top + kTile, row);
      _tile_stored(2, bottom, row);
      _tile_stored(3, bottom + kTile, row);
    }
}

void add_head_tiles(const Queries& q, long head) {
  static thread_local KeptMemory memory;
  const long size = q.width / kTile * (kSlice / kTileInputs) * kTile;
  __m512i* left = (__m512i*)memory.get(2 * size * sizeof(__m512i) + 2 * q.width * sizeof(float));
  __m512i* right = left + size;
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) config.set(tile, kTile, 64);
  config.use();
  for (long first = 0; first < q.rows; first += kSlice) {
    const long count = q.rows - first < kSlice ? q.rows - first : kSlice;
    pack_slice(q, head, first, count, (float*)(right + size), left, right);
    multiply_slice(q, head, left, right);
  }
  _tile_release();
}

#endif

// The same on vector registers.
void add_head(const Queries& q, long head) {
  static thread_local KeptMemory memory;
  float* turned = (float*)memory.get(q.width * sizeof(float));
  float *total = q.total + head * q.width, *outer = q.outer + head * q.width * q.width;
  for (long row = 0; row < q.rows; row++) {
    turn_row(q, row, head, turned);
    for (long i = 0; i < q.width; i += kLanes) {
      store(total + i, load(total + i) + load(turned + i));
      store(turned + i, rounded<bf16>(load(turned + i)));
    }
    for (long i = 0; i < q.width; i++)
      for (long j = i / kLanes * kLanes; j < q.width; j += kLanes) {
        float* to = outer + i * q.width + j;
        store(to, load(to) + load(turned + j) * turned[i]);
      }
  }
}

}  // namespace
}  // namespace quire

// mean [H, D] and covariance [H, D, D] of `count` rows with these sums.
extern "C" void quire_moments_of(const float* total, const float* outer, float* mean, float* covariance, long heads,
                                 long width, long count, int threads) {
  const float share = 1.0f / count;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long head = 0; head < heads; head++) {
    float* own = mean + head * width;
    for (long i = 0; i < width; i++) own[i] = total[head * width + i] * share;
    for (long i = 0; i < width; i++) {
      const long row = (head * width + i) * width;
      for (long j = 0; j < width; j++) covariance[row + j] = outer[row + j] * share - own[i] * own[j];
    }
  }
}

// total [H, D] and outer [H, D, D] += the rows of query [n, H, D] turned by cos, sin [n, half]. D a multiple of 32.
extern "C" void quire_add_moments(const quire::bf16* query, const float* cos, const float* sin, float* total,
                                  float* outer, long stride, long rows, long heads, long width, long half,
                                  int threads) {
  const quire::Queries q{query, cos, sin, total, outer, stride, rows, heads, width, half};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) {
#if defined(QUIRE_TILES)
    if (quire::tiles_granted())
      quire::add_head_tiles(q, head);
    else
#endif
      quire::add_head(q, head);
    float* own = outer + head * width * width;
    for (long i = 0; i < width; i++)
      for (long j = 0; j < i; j++) own[i * width + j] = own[j * width + i];
  }
}

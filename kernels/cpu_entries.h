// What the kernels that score cache entries share: entries read where they lie, and their products with a few columns.
#pragma once
#include "cpu_tiles.h"

#include <math.h>

namespace quire {

constexpr long kRun = 16;     // entries that are read as one piece; rows of a tile register
constexpr long kRuns = 4;     // runs that are multiplied at a time
constexpr long kInputs = 32;  // numbers that the tile registers multiply at once

inline long whole(long count, long size) { return (count + size - 1) / size * size; }

inline Vec sqrt(Vec v) {
#if defined(QUIRE_AVX512)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; i++) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// The lesser; b if either is NaN, as `max`.
inline Vec least(Vec a, Vec b) {
#if defined(QUIRE_AVX512)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// 2 * kLanes numbers in two vectors: in an order of its own, the same each time, that of fewest instructions.
struct Pair {
  Vec first, second;
};
inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
inline Pair load_pair(const bf16* p) {
  const BitVec bits = read<BitVec>(p);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}

// kernels/paged_rows.py: entry e of a head is row e % size of page table[head][e / size].
struct Pages {
  const void* base;
  const int32_t* table;
  long stride, table_stride, size;  // numbers from page to page, from head to head; entries of a page
};

// Logical positions of one head's entries, which ascend.
class Positions {
 public:
  Positions(const Pages& pages, long head, long length)
      : base_((const int32_t*)pages.base), table_(pages.table + head * pages.table_stride), stride_(pages.stride),
        size_(pages.size), length_(length) {}

  int32_t operator[](long entry) const { return base_[table_[entry / size_] * stride_ + entry % size_]; }

  // The first entry at `position` or behind it.
  long from(int32_t position) const {
    long low = 0, high = length_;
    while (low < high) {
      const long middle = (low + high) / 2;
      (*this)[middle] < position ? low = middle + 1 : high = middle;
    }
    return low;
  }

 private:
  const int32_t *base_, *table_;
  long stride_, size_, length_;
};

// The entries of one head, each `width` numbers.
template <class T>
class Entries {
 public:
  Entries(const Pages& pages, long head, long length, long width)
      : base_((const T*)pages.base), table_(pages.table + head * pages.table_stride), stride_(pages.stride),
        size_(pages.size), length_(length), width_(width) {}

  // kRun rows side by side from entry `first` on, a multiple of kRun: as they lie where a page holds them all, else
  // copied into `room`. What follows the last entry is arbitrary. Asks for the rows behind them unless they are near.
  const T* run(long first, T* room, bool near = false) const {
    const long offset = first % size_, ahead = first + kRun;
    if (!near && ahead < length_) prefetch(at(ahead), kRun * width_ * sizeof(T));
    if (offset + kRun <= size_) return at(first);
    const long end = first + kRun < length_ ? first + kRun : length_;
    for (long e = first; e < end; e++) memcpy(room + (e - first) * width_, at(e), width_ * sizeof(T));
    return room;
  }

  // kRuns runs from entry `first` on, with `room` for as many; behind the last entry the first run stands in.
  void runs(long first, T* room, bool near, const T** runs) const {
    for (long r = 0; r < kRuns; r++)
      runs[r] = r && first + r * kRun >= length_ ? runs[0] : run(first + r * kRun, room + r * kRun * width_, near);
  }

  // rows[i] = entry first + i, for count entries.
  void rows(long first, long count, const T** rows) const {
    const T* page = nullptr;
    for (long i = 0, offset = size_; i < count; i++, offset++) {
      if (offset >= size_) offset = (first + i) % size_, page = at(first + i) - offset * width_;
      rows[i] = page + offset * width_;
    }
  }

 private:
  const T* at(long entry) const { return base_ + table_[entry / size_] * stride_ + entry % size_ * width_; }

  const T* base_;
  const int32_t* table_;
  long stride_, size_, length_, width_;
};

#if defined(QUIRE_TILES)
// Tiles 0 to 3: sums; 4 and 5: entries; 6: columns.
inline void configure_scores() {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) config.set(tile, kTile, 64);
  config.use();
}
#endif

// kLanes columns that many entries are multiplied with; where there are tile registers, in the order that they read.
template <class T>
class Columns {
 public:
  static bool tiled(long width) {
#if defined(QUIRE_TILES)
    return sizeof(T) == sizeof(bf16) && width % kTileInputs == 0 && tiles_granted();
#else
    return false;
#endif
  }
  static size_t bytes(long width) { return tiled(width) ? width * kLanes * sizeof(T) : kLanes * sizeof(T*); }

  // `memory` holds bytes(width), on a line of the cache; columns that are null count as zeros, but are never stored.
  Columns(void* memory, long width) : memory_(memory), width_(width), tiled_(tiled(width)) {}

  // As many numbers of the columns as will be multiplied.
  void set(const T* const* columns, long inputs) {
    if (!tiled_) {
      memcpy(memory_, columns, kLanes * sizeof(T*));
      return;
    }
    uint32_t* packed = (uint32_t*)memory_;
    for (long pair = 0; pair < inputs / 2; pair++)
      for (long c = 0; c < kLanes; c++) {
        uint32_t both = 0;
        if (columns[c]) memcpy(&both, columns[c] + 2 * pair, sizeof both);
        packed[pair * kLanes + c] = both;
      }
  }

  // sums [kRun][kLanes] of each of kRuns runs, added to what is there if `add`. Only the first `inputs` numbers of rows
  // and columns count: a multiple of kInputs, or the width.
  void multiply(const T* const* runs, long inputs, float* sums, bool add) const {
#if defined(QUIRE_TILES)
    if constexpr (sizeof(T) == sizeof(bf16)) {
      if (tiled_) return multiply_tiles(runs, inputs, sums, add);
    }
#endif
    const T* columns[kLanes];
    memcpy(columns, memory_, sizeof columns);
    for (int c = 0; c < kLanes; c++)
      if (!columns[c]) columns[c] = runs[0];  // of no use to anybody, but finite work
    for (long e = 0; e < kRuns * kRun; e++) {
      const T* row = runs[e / kRun] + e % kRun * width_;
      const Vec v = dot_tile<T, 1>(&row, columns, inputs);
      store(sums + e * kLanes, add ? load(sums + e * kLanes) + v : v);
    }
  }

 private:
#if defined(QUIRE_TILES)
  // Four sums that do not wait for each other.
  void multiply_tiles(const T* const* runs, long inputs, float* sums, bool add) const {
    static_assert(kRuns == 4 && kRun == kTile);
    const char* packed = (const char*)memory_;
    const long row = width_ * sizeof(T), next = kTile * kLanes;
    if (add) {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + next, 64);
      _tile_loadd(2, sums + 2 * next, 64);
      _tile_loadd(3, sums + 3 * next, 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (long i = 0; i < inputs; i += kTileInputs) {
      _tile_loadd(6, packed + i * 32, 64);
      _tile_loadd(4, runs[0] + i, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, runs[1] + i, row);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, runs[2] + i, row);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, runs[3] + i, row);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + next, 64);
    _tile_stored(2, sums + 2 * next, 64);
    _tile_stored(3, sums + 3 * next, 64);
  }
#endif

  void* memory_;
  long width_;
  bool tiled_;
};

// The tile registers are set up for as long as this lives.
template <class T>
class TileUse {
 public:
  explicit TileUse(long width) : used_(Columns<T>::tiled(width)) {
#if defined(QUIRE_TILES)
    if (used_) configure_scores();
#endif
  }
  ~TileUse() {
#if defined(QUIRE_TILES)
    if (used_) _tile_release();
#endif
  }

 private:
  bool used_;
};

// Numbers too small for a full mantissa count as zero for as long as this lives: what far entries get of a sharp softmax
// is such a number, and each would cost the processor a hundred cycles.
class FlushTiny {
 public:
#if defined(__x86_64__)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// out[i] = the sum of the lanes of sums[i].
inline void sum_rows(const float* sums, long count, float* out) {
  Vec rows[kLanes];
  long e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (int i = 0; i < kLanes; i++) rows[i] = load(sums + (e + i) * kLanes);
    store(out + e, transpose_sum(rows));
  }
  for (; e < count; e++) out[e] = sum_lanes(load(sums + e * kLanes));
}

}  // namespace quire

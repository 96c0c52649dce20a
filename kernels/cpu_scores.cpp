// What pruning policies compute over all entries of a layer: attention from a few rows, expected attention, LagKV's
// ranks. The contracts stand in kernels/attention_columns.py, quadratic_form.py and lag_ranks.py. Everything is a fixed function of its arguments, whatever the threads.
#include "cpu_tiles.h"

#include <math.h>

namespace quire {
namespace {

constexpr long kEntryBlock = 256;  // entries whose sums stay in L1 while blocks of columns take their turns

#if defined(QUIRE_TILES)
// Tiles 0 and 1: sums; 4 and 5: entries; 6: columns.
inline void configure_scores(long entries) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) config.set(tile, tile == 6 ? kTile : entries, 64);
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

  void set(const T* const* columns) {
    if (!tiled_) {
      memcpy(memory_, columns, kLanes * sizeof(T*));
      return;
    }
    uint32_t* packed = (uint32_t*)memory_;
    for (long pair = 0; pair < width_ / 2; pair++)
      for (long c = 0; c < kLanes; c++) {
        uint32_t both = 0;
        if (columns[c]) memcpy(&both, columns[c] + 2 * pair, sizeof both);
        packed[pair * kLanes + c] = both;
      }
  }

  // sums [count][kLanes] of entries [count][width], `stride` apart; added to what is there if `add`.
  void multiply(const T* entries, long stride, long count, float* sums, bool add) const {
#if defined(QUIRE_TILES)
    if constexpr (sizeof(T) == sizeof(bf16)) {
      if (tiled_) return multiply_tiles(entries, stride, count, sums, add);
    }
#endif
    const T* columns[kLanes];
    memcpy(columns, memory_, sizeof columns);
    for (int c = 0; c < kLanes; c++)
      if (!columns[c]) columns[c] = entries;  // of no use to anybody, but finite work
    for (long e = 0; e < count; e++) {
      const T* row = entries + e * stride;
      const Vec v = dot_tile<T, 1>(&row, columns, width_);
      store(sums + e * kLanes, add ? load(sums + e * kLanes) + v : v);
    }
  }

 private:
#if defined(QUIRE_TILES)
  void multiply_tiles(const T* entries, long stride, long count, float* sums, bool add) const {
    const char* packed = (const char*)memory_;
    const long row = stride * sizeof(T), steps = width_ / kTileInputs;
    long e = 0;
    for (; e + 2 * kTile <= count; e += 2 * kTile) {
      float* out = sums + e * kLanes;
      const T* at = entries + e * stride;
      _tile_zero(0);
      _tile_zero(1);
      if (add) {
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + kTile * kLanes, 64);
      }
      for (long s = 0; s < steps; s++) {
        _tile_loadd(6, packed + s * 1024, 64);
        _tile_loadd(4, at + s * kTileInputs, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, at + kTile * stride + s * kTileInputs, row);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, out, 64);
      _tile_stored(1, out + kTile * kLanes, 64);
    }
    while (e < count) {
      const long some = count - e < kTile ? count - e : kTile;
      float* out = sums + e * kLanes;
      configure_scores(some);
      _tile_zero(0);
      if (add) _tile_loadd(0, out, 64);
      for (long s = 0; s < steps; s++) {
        _tile_loadd(6, packed + s * 1024, 64);
        _tile_loadd(4, entries + e * stride + s * kTileInputs, row);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, out, 64);
      configure_scores(kTile);
      e += some;
    }
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
    if (used_) configure_scores(kTile);
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

struct Attention {
  const void *query, *keys;
  const int32_t *positions, *query_positions;
  const int64_t* lengths;
  const float* sinks;
  float* output;
  long query_stride, key_stride, position_stride, rows, heads, kv_heads, entries, width, parts;
  float scale, softcap;
  int greatest;  // instead of the sum
};

// Columns first .. first + kLanes - 1 of a kv head's rows x group; `total` [length][kLanes] takes their probabilities.
template <class T>
void add_block(const Attention& a, long head, long first, const Columns<T>& block, float* logits, float* total) {
  const long group = a.heads / a.kv_heads, count = a.rows * group, length = a.lengths[head];
  const int32_t* positions = a.positions + head * a.position_stride;
  int32_t seen[kLanes];
  float sinks[kLanes];
  int32_t least = INT32_MAX;
  for (long c = 0; c < kLanes; c++) {
    const long column = first + c < count ? first + c : count - 1;
    seen[c] = a.query_positions[column / group];
    sinks[c] = a.sinks ? a.sinks[head * group + column % group] : -INFINITY;
    least = seen[c] < least ? seen[c] : least;
  }
  block.multiply((const T*)a.keys + head * a.key_stride, a.width, length, logits, false);
  const IntVec visible = read<IntVec>(seen);
  const Vec none = broadcast(-INFINITY), sink = load(sinks);
  Vec top = sink;
  for (long e = 0; e < length; e++) {
    Vec x = load(logits + e * kLanes) * a.scale;
    if (a.softcap > 0) x = tanh(x / a.softcap) * a.softcap;
    if (positions[e] > least) x = broadcast_int(positions[e]) > visible ? none : x;
    store(logits + e * kLanes, x);
    top = max(top, x);
  }
  top = top == none ? Vec{} : top;
  Vec sum = exp(sink - top);
  for (long e = 0; e < length; e++) {
    const Vec p = exp(load(logits + e * kLanes) - top);
    store(logits + e * kLanes, p);
    sum += p;
  }
  float shares[kLanes];
  store(shares, sum > 0.0f ? 1.0f / sum : sum != sum ? sum : Vec{});
  for (long c = 0; c < kLanes; c++) shares[c] = first + c < count ? shares[c] : 0.0f;
  const Vec share = load(shares);
  for (long e = 0; e < length; e++) {
    const Vec old = load(total + e * kLanes), p = load(logits + e * kLanes) * share;
    store(total + e * kLanes, a.greatest ? max(old, p) : old + p);
  }
}

// One of the `parts` of a kv head's columns.
template <class T>
void attend_part(const Attention& a, long head, long part) {
  static thread_local KeptMemory memory;
  const long group = a.heads / a.kv_heads, count = a.rows * group, blocks = (count + kLanes - 1) / kLanes;
  const long length = a.lengths[head], size = a.entries * kLanes;
  float* logits = (float*)memory.get(2 * size * sizeof(float) + Columns<T>::bytes(a.width));
  float* total = logits + size;
  memset(total, 0, length * kLanes * sizeof(float));
  Columns<T> columns(total + size, a.width);
  const TileUse<T> use(a.width);
  for (long block = blocks * part / a.parts; block < blocks * (part + 1) / a.parts; block++) {
    const T* rows[kLanes];
    for (long c = 0; c < kLanes; c++) {
      const long column = block * kLanes + c, row = column / group, own = head * group + column % group;
      rows[c] = column < count ? (const T*)a.query + row * a.query_stride + own * a.width : nullptr;
    }
    columns.set(rows);
    add_block(a, head, block * kLanes, columns, logits, total);
  }
  float* out = a.output + (head * a.parts + part) * a.entries;
  if (a.greatest)
    for (long e = 0; e < length; e++) out[e] = max_lanes(load(total + e * kLanes));
  else
    sum_rows(total, length, out);
  for (long e = length; e < a.entries; e++) out[e] = 0.0f;
}

struct Moments {
  const bf16* keys;
  const float *linear, *square;  // [H, D] and [H, D, D], symmetric
  float* output;                 // [H, E]
  long key_stride, heads, kv_heads, entries, width;
};

// k.(C k + b) of all entries for one query head. C is a sum of two bfloat16 matrices: 16 bits of each number.
void expect_head(const Moments& m, long head) {
  static thread_local KeptMemory memory;
  const long width = m.width, blocks = width / kLanes, block_bytes = Columns<bf16>::bytes(width);
  const float *linear = m.linear + head * width, *square = m.square + head * width * width;
  char* at = (char*)memory.get(2 * width * width * sizeof(bf16) + 2 * blocks * block_bytes +
                               2 * kEntryBlock * kLanes * sizeof(float));
  bf16 *high = (bf16*)at, *low = high + width * width;
  char* packed = (char*)(low + width * width);
  float *sums = (float*)(packed + 2 * blocks * block_bytes), *total = sums + kEntryBlock * kLanes;
  for (long i = 0; i < width * width; i += kLanes) {
    const Vec v = load(square + i);
    store(high + i, v);
    store(low + i, v - load(high + i));
  }
  const TileUse<bf16> use(width);
  for (long i = 0; i < 2 * blocks; i++) {
    const bf16* rows[kLanes];
    for (long c = 0; c < kLanes; c++) rows[c] = (i % 2 ? low : high) + (i / 2 * kLanes + c) * width;
    Columns<bf16>(packed + i * block_bytes, width).set(rows);
  }
  const bf16* keys = m.keys + head / (m.heads / m.kv_heads) * m.key_stride;
  for (long first = 0; first < m.entries; first += kEntryBlock) {
    const long count = m.entries - first < kEntryBlock ? m.entries - first : kEntryBlock;
    const bf16* part = keys + first * width;
    memset(total, 0, count * kLanes * sizeof(float));
    for (long block = 0; block < blocks; block++) {
      Columns<bf16>(packed + 2 * block * block_bytes, width).multiply(part, width, count, sums, false);
      Columns<bf16>(packed + (2 * block + 1) * block_bytes, width).multiply(part, width, count, sums, true);
      const Vec b = load(linear + block * kLanes);
      for (long e = 0; e < count; e++) {
        const Vec k = load(part + e * width + block * kLanes);
        store(total + e * kLanes, load(total + e * kLanes) + (load(sums + e * kLanes) + b) * k);
      }
    }
    sum_rows(total, count, m.output + head * m.entries + first);
  }
}

// [size] += softmax over a partition of its entries' deviations over channels, normalised by the next partition's range.
template <class T>
void add_spread(const T* states, long size, long width, float least_range, float* ranges, float* spread, float* sum) {
  float *low = ranges, *slope = ranges + width;
  const T* next = states + size * width;
  for (long c = 0; c < width; c += kLanes) {
    Vec least = load(next + c), greatest = least;
    for (long e = 1; e < size; e++) {
      const Vec x = load(next + e * width + c);
      least = x < least ? x : least, greatest = x > greatest ? x : greatest;
    }
    store(low + c, least);
    store(slope + c, 1.0f / max(greatest - least, broadcast(least_range)));
  }
  float top = -INFINITY, total = 0;
  for (long e = 0; e < size; e++) {
    Vec mean = {}, squares = {};
    for (long c = 0; c < width; c += kLanes) mean += (load(states + e * width + c) - load(low + c)) * load(slope + c);
    const float middle = sum_lanes(mean) / width;
    for (long c = 0; c < width; c += kLanes) {
      const Vec x = (load(states + e * width + c) - load(low + c)) * load(slope + c) - middle;
      squares += x * x;
    }
    spread[e] = sqrtf(sum_lanes(squares) / (width - 1));
    top = spread[e] > top ? spread[e] : top;
  }
  for (long e = 0; e < size; e += kLanes) {
    const Vec p = exp(load(spread + e) - top);
    store(spread + e, p);
    total += sum_lanes(p);
  }
  for (long e = 0; e < size; e++) sum[e] += spread[e] / total;
}

// How many of the others are less, or as large and older, as a share of the size.
inline void rank(const float* scores, long size, float* out) {
  for (long e = 0; e < size; e++) {
    IntVec below = {};
    for (long i = 0; i < size; i += kLanes) below += load(scores + i) < broadcast(scores[e]);
    int32_t lanes[kLanes], count = 0;
    memcpy(lanes, &below, sizeof lanes);
    for (int i = 0; i < kLanes; i++) count -= lanes[i];
    for (long i = 0; i < e; i++) count += scores[i] == scores[e];
    out[e] = (float)count / size;
  }
}

template <class T>
void rank_lag(const void* keys, const void* values, float* out, long key_stride, long value_stride, long heads,
              long parts, long size, long width, float least_range, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) {
    for (long part = 0; part < parts - 1; part++) {
      static thread_local KeptMemory memory;
      float* ranges = (float*)memory.get((2 * width + 2 * size) * sizeof(float));
      float *spread = ranges + 2 * width, *sum = spread + size;
      memset(sum, 0, size * sizeof(float));
      const long at = part * size * width;
      add_spread((const T*)keys + head * key_stride + at, size, width, least_range, ranges, spread, sum);
      add_spread((const T*)values + head * value_stride + at, size, width, least_range, ranges, spread, sum);
      rank(sum, size, out + (head * (parts - 1) + part) * size);
    }
  }
}

}  // namespace
}  // namespace quire

using quire::bf16;

// output [K, parts, E]: probability that the columns (rows x group) of a part give each entry, added up or the greatest.
extern "C" void quire_attention_columns(const void* query, const void* keys, const int32_t* positions,
                                         const int32_t* query_positions, const int64_t* lengths, const float* sinks,
                                         float* output, long query_stride, long key_stride, long position_stride,
                                         long rows, long heads, long kv_heads, long entries, long width, long parts,
                                         float scale, float softcap, int greatest, int is_bf16, int threads) {
  const quire::Attention a{query, keys, positions, query_positions, lengths, sinks, output, query_stride, key_stride,
                           position_stride, rows, heads, kv_heads, entries, width, parts, scale, softcap, greatest};
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (long head = 0; head < kv_heads; head++)
    for (long part = 0; part < parts; part++)
      is_bf16 ? quire::attend_part<bf16>(a, head, part) : quire::attend_part<float>(a, head, part);
}

// output [H, E] = k.(C k + b) for the keys [K, E, D] in bfloat16, D a multiple of 32.
extern "C" void quire_quadratic_form(const void* keys, const float* linear, const float* square, float* output,
                                     long key_stride, long heads, long kv_heads, long entries, long width,
                                     int threads) {
  const quire::Moments m{(const bf16*)keys, linear, square, output, key_stride, heads, kv_heads, entries, width};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) quire::expect_head(m, head);
}

// output [K, parts - 1, size]: ranks in [0, 1) inside all partitions but the last. D and size multiples of 16.
extern "C" void quire_lag_ranks(const void* keys, const void* values, float* output, long key_stride,
                                long value_stride, long heads, long parts, long size, long width, float least_range,
                                int is_bf16, int threads) {
  (is_bf16 ? quire::rank_lag<bf16> : quire::rank_lag<float>)(keys, values, output, key_stride, value_stride, heads,
                                                             parts, size, width, least_range, threads);
}

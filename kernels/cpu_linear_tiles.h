// Linear layers in bfloat16 on the tile registers of recent Xeons (AMX): products of 16 outputs x 16 rows x 32 inputs.
//
// The weights are the first operand and are read as they lie. The second operand, the rows of x, is packed once per call
// so that each pair of inputs of 16 rows lies together; one row needs no packing at all. A tile of results holds 16
// outputs x 16 rows, is rounded in that order and transposed as pairs of bfloat16. A result is one sum over the inputs
// in ascending order, whatever the number of rows, so one row and five hundred give the same bits.
#pragma once
#include "cpu_linear_results.h"

#if defined(QUIRE_TILES)
#include <omp.h>

namespace quire {

// Inputs of 32 weight rows that stay in L1 (28 KiB) while all rows pass by. 256 was 9% faster at 4864 inputs, where each
// weight row lies on memory pages of its own, and 448 was 6% faster at 896.
constexpr long kInputChunk = 448, kLongInputChunk = 256, kLongInputs = 2048;
constexpr long kPackedBytes = 1 << 20;   // packed rows that stay in L2 meanwhile
constexpr long kPackAhead = 256;          // inputs of a row that are asked for before they are packed
constexpr long kLeastRows = 128;         // but as many rows share one reading of the weights

// Whether a layer is computed here: a question of the weights alone, never of the rows.
template <class T>
inline bool fits_tiles(const Layer<T>& l) {
  return sizeof(T) == 2 && l.in % kTileInputs == 0 && l.out >= kTile && tiles_granted();
}

// Inputs begin .. begin + 31 of `count` rows: packed[pair][row] holds two inputs of a row; `wide` rows per pair.
inline void pack_tile(const bf16* x, long stride, long count, long wide, uint32_t* packed) {
  if (wide < kTile) {
    for (long r = 0; r < wide; r++)
      for (long pair = 0; pair < kTileInputs / 2; pair++) packed[pair * wide + r] = read<uint32_t>(x + r * stride + 2 * pair);
    return;
  }
  __m512i v[16];
  for (long r = 0; r < kTile; r++) {
    v[r] = r < count ? read<__m512i>(x + r * stride) : __m512i{};
    if (r < count) __builtin_prefetch(x + r * stride + kPackAhead, 0, 3);
  }
  transpose_words(v);
  for (long pair = 0; pair < kTileInputs / 2; pair++) memcpy(packed + pair * kTile, v + pair, sizeof v[0]);
}

// One call's operands as the tile loops see them.
struct TileJob {
  Layer<bf16> layer;
  char* packed;         // rows of the current block
  long group_bytes;     // of one group of 16 packed rows
  long step_bytes;      // of 32 inputs of a group
  long row, count;      // the current block of rows
  long wide;            // rows of a group: 16, or all rows if they are fewer
};

// One member's share of packing the current block.
inline void pack_rows(const TileJob& job, long steps, long member, long members) {
  const Layer<bf16>& l = job.layer;
  const long tiles = job.count > 0 ? (job.count + kTile - 1) / kTile * steps : 0;
  for (long i = tiles * member / members; i < tiles * (member + 1) / members; i++) {
    const long first = i / steps * kTile;
    pack_tile(l.x + (job.row + first) * l.x_stride + i % steps * kTileInputs, l.x_stride, job.count - first, job.wide,
              (uint32_t*)(job.packed + i * job.step_bytes));
  }
}

// sums += weights x rows over `steps` x 32 inputs for one or two groups of rows: tiles 0, 1 (group x0), 2, 3 (x1). At
// each step asks for `bytes` of what is to come at next0 and at next1, and if gated takes `pace` steps of the
// results due.
template <bool PAIR, bool GATED>
inline void multiply_tiles(const char* w0, const char* w1, long stride, const char* x0, const char* x1, long row_bytes,
                           long steps, const char* next0, const char* next1, long bytes, Results<GATED>& due,
                           long pace) {
  // With little to compute memory is the limit: a request per 256 bytes makes the hardware fetch the lines between, and
  // leaves room for the loads of this step. With two groups asking for every line was 4% faster at the 0.5B sizes.
  constexpr long kAskedEvery = PAIR ? 64 : 256;
  for (long step = 0; step < steps; step++) {
    _tile_loadd(4, w0, stride);
    if (PAIR)
      _tile_stream_loadd(6, x0, row_bytes);  // many rows would drive the weights out of L1
    else
      _tile_loadd(6, x0, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w1, stride);
    _tile_dpbf16ps(1, 5, 6);
    if (PAIR) {
      _tile_stream_loadd(7, x1, row_bytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    prefetch(next0, bytes, kAskedEvery);
    prefetch(next1, bytes, kAskedEvery);
    if (GATED) due.advance(pace);
    next0 += bytes, next1 += bytes;
    w0 += 64, w1 += 64;
    x0 += 16 * row_bytes, x1 += 16 * row_bytes;
  }
}

// Take up the sums of earlier inputs, if there are any.
inline void load_sums(const TileSums* sums, bool pair, bool started) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (!started) return;
  _tile_loadd(0, sums[0], 64);
  _tile_loadd(1, sums[1], 64);
  if (!pair) return;
  _tile_loadd(2, sums[2], 64);
  _tile_loadd(3, sums[3], 64);
}

inline void store_sums(TileSums* sums, bool pair) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if (!pair) return;
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// All rows of the block times one panel; sums [groups][2] wait between chunks of the inputs. If gated, the results of the
// panel before are finished meanwhile, and those of this one are due afterwards.
template <bool GATED>
inline void compute_panel(const TileJob& job, const Panel& panel, const Panel& next, TileSums* sums,
                          Results<GATED>& due) {
  const Layer<bf16>& l = job.layer;
  const long stride = l.in * sizeof(bf16), row_bytes = 4 * job.wide, groups = (job.count + kTile - 1) / kTile;
  // Chunks of one size; two groups of rows use each weight only once.
  const long most = groups <= 2 ? l.in : l.in > kLongInputs ? kLongInputChunk : kInputChunk;
  const long chunks = (l.in + most - 1) / most;
  const long chunk = (l.in / kTileInputs + chunks - 1) / chunks * kTileInputs;
  // The next panel's weights, 1 KiB per step of each tile, are asked for in equal parts by the pairs of groups.
  const long pairs = (groups + 1) / 2, ahead = (kTile + pairs - 1) / pairs * 64;
  const long turns = pairs * (l.in / kTileInputs), pace = (Results<GATED>::steps(groups) + turns - 1) / turns;
  for (long start = 0; start < l.in; start += chunk) {
    const long length = l.in - start < chunk ? l.in - start : chunk, steps = length / kTileInputs;
    const char *w0 = panel.weight[0] + start * sizeof(bf16), *w1 = panel.weight[1] + start * sizeof(bf16);
    for (long g = 0; g < groups; g += 2) {
      TileSums* sum = sums + 2 * g;
      const bool pair = g + 1 < groups;
      const char* x0 = job.packed + g * job.group_bytes + start / kTileInputs * job.step_bytes;
      const char* x1 = x0 + job.group_bytes;
      const long asked = start * kTile * sizeof(bf16) + g / 2 * steps * ahead;
      const long bytes = g / 2 * ahead < kTile * 64 ? ahead : 0;
      const char *next0 = next.weight[0] + asked, *next1 = next.weight[1] + asked;
      load_sums(sum, pair, start);
      if (pair)
        multiply_tiles<true>(w0, w1, stride, x0, x1, row_bytes, steps, next0, next1, bytes, due, pace);
      else
        multiply_tiles<false>(w0, w1, stride, x0, x0, row_bytes, steps, next0, next1, bytes, due, pace);
      store_sums(sum, pair);
      if (GATED || start + length < l.in) continue;
      const long row = g * kTile, rest = job.count - row;  // these take a fifth of the time of gated ones
      due.begin(panel, sum, job.row + row, rest < 2 * kTile ? rest : 2 * kTile);
      due.finish();
    }
  }
  if (!GATED) return;
  due.finish();
  due.begin(panel, sums, job.row, job.count);
}

// Tiles 0 .. 3 hold sums, 4 and 5 weights, 6 and 7 rows.
inline void configure_linear(long wide) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) config.set(tile, kTile, tile == 4 || tile == 5 ? 64 : 4 * wide);
  config.use();
}

// How the rows are cut: a share per team of threads, whose members divide the outputs among themselves, and of each
// share a block of rows at a time.
struct RowShares {
  long teams, members, rows, block;

  RowShares(const Layer<bf16>& l, long threads) : teams(1) {
    for (long n = 2; n <= threads; n++)
      if (threads % n == 0 && l.rows / n >= kLeastRows) teams = n;
    members = threads / teams;
    rows = ((l.rows + teams - 1) / teams + kTile - 1) / kTile * kTile;
    const long fitting = kPackedBytes / (l.in * (long)sizeof(bf16)) / (2 * kTile) * (2 * kTile);
    block = fitting < kLeastRows ? kLeastRows : fitting;
    block = block > rows ? rows : block;
  }

  // Rows of all teams' blocks, with as many threads or fewer.
  static long most_rows(const Layer<bf16>& l, long threads) {
    const long fitting = kPackedBytes / (l.in * (long)sizeof(bf16)), block = fitting < kLeastRows ? kLeastRows : fitting;
    const long possible = l.rows / kLeastRows, teams = possible < 1 ? 1 : possible < threads ? possible : threads;
    const long rows = whole_tiles(l.rows + (teams - 1) * kTile);
    return teams * block < rows ? teams * whole_tiles(block) : rows;
  }

 private:
  static long whole_tiles(long rows) { return (rows + kTile - 1) / kTile * kTile; }
};

template <bool GATED>
void run_tiles(const Layer<bf16>& l, int threads) {
  static thread_local KeptMemory packed_memory;
  const long outputs = (GATED ? 1 : 2) * kTile, panels = (l.out + outputs - 1) / outputs;
  const long wide = l.rows < kTile ? l.rows : kTile, steps = l.in / kTileInputs, group_bytes = steps * 64 * wide;
  const bool lone = l.rows == 1;  // lies as it would be packed
  char* const packed =
      lone ? (char*)l.x : (char*)packed_memory.get(RowShares::most_rows(l, threads) / kTile * group_bytes);
#pragma omp parallel num_threads(threads)
  {
    const RowShares shares(l, omp_get_num_threads());  // may be fewer than were asked for
    const long groups = shares.block / kTile;
    static thread_local KeptMemory sums_memory;
    TileSums* sums = (TileSums*)sums_memory.get(2 * groups * 2 * sizeof(TileSums));
    const long team = omp_get_thread_num() / shares.members, member = omp_get_thread_num() % shares.members;
    const long begin = panels * member / shares.members, end = panels * (member + 1) / shares.members;
    const long first = team * shares.rows, last = first + shares.rows < l.rows ? first + shares.rows : l.rows;
    configure_linear(wide);
    Results<GATED> due(l);
    for (long row = first; row < first + shares.rows; row += shares.block) {
      const long count = last - row < shares.block ? last - row : shares.block;  // not above 0: others still work
      const TileJob job{l, packed + team * groups * group_bytes, group_bytes, 64 * wide, row, count, wide};
      if (row > first) {  // all have read the block before
#pragma omp barrier
      }
      if (!lone) {
        pack_rows(job, steps, member, shares.members);
#pragma omp barrier
      }
      for (long i = begin; i < end && count > 0; i++) {
        const Panel panel = panel_at<GATED>(l, i), next = panel_at<GATED>(l, i + 1 < end ? i + 1 : i);
        compute_panel(job, panel, next, sums + i % 2 * groups * 2, due);
      }
      due.finish();
    }
    _tile_release();
  }
}

}  // namespace quire
#endif

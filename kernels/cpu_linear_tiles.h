// Linear layers in bfloat16 on the tile registers of recent Xeons (AMX): products of 16 outputs x 16 rows x 32 inputs.
//
// The weights are the first operand and are read as they lie. The second operand, the rows of x, is packed once per call
// so that each pair of inputs of 16 rows lies together; one row needs no packing at all. A tile of results holds 16
// outputs x 16 rows, is rounded in that order and transposed as pairs of bfloat16. A result is one sum over the inputs
// in ascending order, whatever the number of rows, so one row and five hundred give the same bits.
#pragma once
#include "cpu_linear.h"
#include "cpu_tiles.h"

#if defined(QUIRE_TILES)
#include <omp.h>

namespace quire {

constexpr long kInputChunk = 256;        // inputs of 32 weight rows that stay in L1 (32 KiB) while all rows pass by
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

// Two tiles of weight rows: those of outputs n .. n + 15 and n + 16 .. n + 31, or gate and up of outputs n .. n + 15.
struct Panel {
  const char* weight[2];
  long output[2];
  __mmask16 stored[2];  // columns of each tile that this panel writes
};

// The last tile is moved back to end with the outputs; what another tile has computed already is not stored.
template <bool GATED>
inline Panel panel_at(const Layer<bf16>& l, long index) {
  Panel panel;
  for (int i = 0; i < 2; i++) {
    const long wanted = GATED ? index * kTile : (2 * index + i) * kTile;
    const long n = wanted + kTile <= l.out ? wanted : l.out - kTile;
    const long done = wanted - n < kTile ? wanted - n : kTile;
    panel.output[i] = n;
    panel.stored[i] = (__mmask16)(0xffff << done);
    panel.weight[i] = (const char*)(l.weight + (n + (GATED && i ? l.out : 0)) * l.in);
  }
  return panel;
}

// sums += weights x rows over `steps` x 32 inputs for one or two groups of rows: tiles 0, 1 (group x0), 2, 3 (x1). At
// each step asks for `bytes` of what is to come at next0 and at next1.
template <bool PAIR>
inline void multiply_tiles(const char* w0, const char* w1, long stride, const char* x0, const char* x1, long row_bytes,
                           long steps, const char* next0, const char* next1, long bytes) {
  // With little to compute memory is the limit: a request per 256 bytes makes the hardware fetch the lines between, and
  // leaves room for the loads of this step. With two groups asking for every line was 4% faster at the 0.5B sizes.
  constexpr long kAskedEvery = PAIR ? 64 : 256;
  for (long step = 0; step < steps; step++) {
    _tile_loadd(4, w0, stride);
    _tile_loadd(6, x0, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w1, stride);
    _tile_dpbf16ps(1, 5, 6);
    if (PAIR) {
      _tile_loadd(7, x1, row_bytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    prefetch(next0, bytes, kAskedEvery);
    prefetch(next1, bytes, kAskedEvery);
    next0 += bytes, next1 += bytes;
    w0 += 64, w1 += 64;
    x0 += 16 * row_bytes, x1 += 16 * row_bytes;
  }
}

typedef float TileSums[kTile][kTile];  // [output][row]

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

// Rows of 32 results in bfloat16: lane pair p of rows[r] holds results 2 p and 2 p + 1 of row r.
template <bool GATED>
inline void round_tiles(const Layer<bf16>& l, const Panel& panel, const TileSums* sums, __m512i* rows) {
  alignas(64) float bias[2][kTile] = {};
  for (int i = 0; l.bias && i < 2; i++) store(bias[i], load(l.bias + panel.output[i] + (GATED && i ? l.out : 0)));
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  auto sum = [&](int tile, int output) { return load(sums[tile][output]) + bias[tile][output]; };
  for (int pair = 0; pair < 16; pair++) {
    const int output = 2 * pair % kTile;
    Vec v[2] = {};
    for (int i = 0; i < 2; i++) {
      if (!GATED)
        v[i] = sum(pair / 8, output + i);
      else if (pair < 8)
        v[i] = rounded<bf16>(silu(rounded<bf16>(sum(0, output + i)))) * rounded<bf16>(sum(1, output + i));
    }
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    rows[pair] = _mm512_permutexvar_epi16(interleave, (__m512i)both);
  }
  transpose_words(rows);
}

// 16 results of one row in bfloat16. One by one, 4 rows take as long as 16 together, or 6 where SiLU has its share.
template <bool GATED>
inline __m256i round_row(const Layer<bf16>& l, const Panel& panel, const TileSums* sums, long row, int tile) {
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(kTile));
  auto sum = [&](int i) {
    const Vec v = (Vec)_mm512_i32gather_ps(places, &sums[i][0][row], sizeof(float));
    return l.bias ? v + load(l.bias + panel.output[i] + (GATED && i ? l.out : 0)) : v;
  };
  const Vec v = GATED ? rounded<bf16>(silu(rounded<bf16>(sum(0)))) * rounded<bf16>(sum(1)) : sum(tile);
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
}

// Residual and store of a row's results in one tile.
inline void store_results(const Layer<bf16>& l, const Panel& panel, long row, int tile, __m256i results) {
  const long n = panel.output[tile];
  if (l.residual || l.wide_y) {
    Vec v = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(results), 16);
    if (l.residual) v += load(l.residual + row * l.residual_stride + n);
    if (l.wide_y) {
      _mm512_mask_storeu_ps(l.wide_y + row * l.y_stride + n, panel.stored[tile], (__m512)v);
      return;
    }
    results = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  }
  _mm256_mask_storeu_epi16(l.y + row * l.y_stride + n, panel.stored[tile], results);
}

// Bias, activation, residual and store of one group of rows.
template <bool GATED>
inline void finish_group(const TileJob& job, const Panel& panel, const TileSums* sums, long row, long count) {
  const Layer<bf16>& l = job.layer;
  constexpr int kTiles = GATED ? 1 : 2;
  if (count <= (GATED ? 6 : 4)) {
    for (long r = 0; r < count; r++)
      for (int i = 0; i < kTiles; i++) store_results(l, panel, row + r, i, round_row<GATED>(l, panel, sums, r, i));
    return;
  }
  __m512i rows[16];
  round_tiles<GATED>(l, panel, sums, rows);
  for (long r = 0; r < count; r++)
    for (int i = 0; i < kTiles; i++) {
      const __m256i results = i ? _mm512_extracti64x4_epi64(rows[r], 1) : _mm512_castsi512_si256(rows[r]);
      store_results(l, panel, row + r, i, results);
    }
}

// All rows of the block times one panel; sums [groups][2] wait between chunks of the inputs.
template <bool GATED>
inline void compute_panel(const TileJob& job, const Panel& panel, const Panel& next, TileSums* sums) {
  const Layer<bf16>& l = job.layer;
  const long stride = l.in * sizeof(bf16), row_bytes = 4 * job.wide, groups = (job.count + kTile - 1) / kTile;
  const long chunk = groups > 2 ? kInputChunk : l.in;  // two groups of rows use each weight only once
  // The next panel's weights, 1 KiB per step of each tile, are asked for in equal parts by the pairs of groups.
  const long pairs = (groups + 1) / 2, ahead = (kTile + pairs - 1) / pairs * 64;
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
        multiply_tiles<true>(w0, w1, stride, x0, x1, row_bytes, steps, next0, next1, bytes);
      else
        multiply_tiles<false>(w0, w1, stride, x0, x0, row_bytes, steps, next0, next1, bytes);
      store_sums(sum, pair);
      if (start + length < l.in) continue;
      for (long group = g; group < g + 2 && group < groups; group++) {
        const long rest = job.count - group * kTile;
        finish_group<GATED>(job, panel, sums + 2 * group, job.row + group * kTile, rest < kTile ? rest : kTile);
      }
    }
  }
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
};

template <bool GATED>
void run_tiles(const Layer<bf16>& l, int threads) {
  static thread_local KeptMemory packed_memory;
  char* packed = nullptr;
  const long outputs = (GATED ? 1 : 2) * kTile, panels = (l.out + outputs - 1) / outputs;
  const long wide = l.rows < kTile ? l.rows : kTile, steps = l.in / kTileInputs, group_bytes = steps * 64 * wide;
#pragma omp parallel num_threads(threads)
  {
    const RowShares shares(l, omp_get_num_threads());  // may be fewer than were asked for
    const long groups = shares.block / kTile;
#pragma omp master
    packed = (char*)packed_memory.get(shares.teams * groups * group_bytes);
#pragma omp barrier
    static thread_local KeptMemory sums_memory;
    TileSums* sums = (TileSums*)sums_memory.get(groups * 2 * sizeof(TileSums));
    const long team = omp_get_thread_num() / shares.members, member = omp_get_thread_num() % shares.members;
    const long begin = panels * member / shares.members, end = panels * (member + 1) / shares.members;
    const long first = team * shares.rows, last = first + shares.rows < l.rows ? first + shares.rows : l.rows;
    configure_linear(wide);
    for (long row = first; row < first + shares.rows; row += shares.block) {
      const long count = last - row < shares.block ? last - row : shares.block;  // not above 0: others still work
      const TileJob job{l, packed + team * groups * group_bytes, group_bytes, 64 * wide, row, count, wide};
      pack_rows(job, steps, member, shares.members);
#pragma omp barrier
      for (long i = begin; i < end && count > 0; i++)
        compute_panel<GATED>(job, panel_at<GATED>(l, i), panel_at<GATED>(l, i + 1 < end ? i + 1 : i), sums);
#pragma omp barrier
    }
    _tile_release();
  }
}

}  // namespace quire
#endif

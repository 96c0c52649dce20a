// What becomes of the sums of the tile registers: bias, activation, rounding, residual and store.
//
// Behind a gated layer of 900 inputs the vector units have half as much to do as the tile registers. So its results are
// finished in small steps between the products of the next panel, and the processor works on both at the same time.
#pragma once
#include "cpu_linear.h"
#include "cpu_tiles.h"

#if defined(QUIRE_TILES)
namespace quire {

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

typedef float TileSums[kTile][kTile];  // [output][row]

// Results that are due, of one panel and some rows. They are finished before the next begin; the sums stay in place until
// then.
template <bool GATED>
class Results {
 public:
  explicit Results(const Layer<bf16>& l) : layer_(l) {}

  // Those of `count` rows from `row` on; `sums` [groups][2].
  void begin(const Panel& panel, const TileSums* sums, long row, long count) {
    panel_ = panel, sums_ = sums, row_ = row, left_ = count, pair_ = 0;
    for (int i = 0; layer_.bias && i < 2; i++)
      store(bias_[i], load(layer_.bias + panel.output[i] + (GATED && i ? layer_.out : 0)));
  }

  // Steps of a panel that has `groups` of rows, at most.
  static long steps(long groups) { return groups * kPairs; }

  void advance(long steps) {
    for (; steps > 0 && left_ > 0; steps--) step();
  }

  void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int kPairs = GATED ? kTile / 2 : kTile;  // pairs of results of a row
  // Row by row, 4 rows take as long as 16 together, or 6 where SiLU has its share.
  static constexpr long kFew = GATED ? 6 : 4;

  // A group of rows; if gated, two of its outputs, and with the last two, or if there are few rows, the stores.
  __attribute__((noinline)) void step() {
    const long count = left_ < kTile ? left_ : kTile;
    if (count <= kFew) {
      for (long r = 0; r < count; r++)
        for (int i = 0; i < (GATED ? 1 : 2); i++) store_row(r, i, round_row(r, i));
    } else if (GATED) {
      rows_[pair_] = round_pair(pair_);
      if (++pair_ < kPairs) return;
      store_group(rows_, count);
    } else {
      __m512i rows[kTile];
#pragma GCC unroll 16
      for (int pair = 0; pair < kPairs; pair++) rows[pair] = round_pair(pair);
      store_group(rows, count);
    }
    sums_ += 2, row_ += kTile, left_ -= count, pair_ = 0;
  }

  // silu(gate) * up, all rounded.
  static Vec gate(Vec gate, Vec up) { return rounded<bf16>(silu(rounded<bf16>(gate))) * rounded<bf16>(up); }

  // Lane pair r: results 2 pair and 2 pair + 1 of row r, of those in both tiles.
  __m512i round_pair(int pair) const {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int output = 2 * pair % kTile, tile = 2 * pair / kTile;
    auto sum = [&](int t, int o) { return load(sums_[t][o]) + bias_[t][o]; };
    Vec v[2];
    for (int i = 0; i < 2; i++)
      v[i] = GATED ? gate(sum(0, output + i), sum(1, output + i)) : sum(tile, output + i);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    return _mm512_permutexvar_epi16(interleave, (__m512i)both);
  }

  void store_group(__m512i* rows, long count) const {
    transpose_words(rows);
    for (long r = 0; r < count; r++) {
      store_row(r, 0, _mm512_castsi512_si256(rows[r]));
      if (!GATED) store_row(r, 1, _mm512_extracti64x4_epi64(rows[r], 1));
    }
  }

  // 16 results of one row of the group.
  __m256i round_row(long row, int tile) const {
    const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(kTile));
    auto sum = [&](int t) {
      return (Vec)_mm512_i32gather_ps(places, &sums_[t][0][row], sizeof(float)) + load(bias_[t]);
    };
    return (__m256i)_mm512_cvtneps_pbh((__m512)(GATED ? gate(sum(0), sum(1)) : sum(tile)));
  }

  void store_row(long r, int tile, __m256i results) const {
    const Layer<bf16>& l = layer_;
    const long n = panel_.output[tile], row = row_ + r;
    if (l.residual || l.wide_y) {
      Vec v = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(results), 16);
      if (l.residual) v += load(l.residual + row * l.residual_stride + n);
      if (l.wide_y) {
        _mm512_mask_storeu_ps(l.wide_y + row * l.y_stride + n, panel_.stored[tile], (__m512)v);
        return;
      }
      results = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    }
    _mm256_mask_storeu_epi16(l.y + row * l.y_stride + n, panel_.stored[tile], results);
  }

  const Layer<bf16> layer_;
  Panel panel_;
  const TileSums* sums_ = nullptr;  // of the group whose turn it is
  long row_ = 0, left_ = 0;         // its first row; rows from there on
  int pair_ = 0;                    // of the group, the next
  alignas(64) float bias_[2][kTile] = {};
  __m512i rows_[kTile] = {};
};

}  // namespace quire
#endif

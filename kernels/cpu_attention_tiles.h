// Scores and weighted sums of values in bfloat16 on tile registers, for the blocks of cpu_attention.h.
//
// Scores: 16 keys, as they lie in their page, times 16 packed queries; the tile [entries][rows] is transposed. Sums:
// weights times the values of 32 entries, whose pairs are interleaved first. A weight counts as two numbers in bfloat16,
// itself rounded and what rounding took away, so that 16 of its bits take part. Each row's sums go over the entries in
// fixed groups, whatever the other rows are.
#pragma once
#include "cpu_attention.h"
#include "cpu_tiles.h"

namespace quire {

#if defined(QUIRE_TILES)

// What a thread needs to compute one tile of queries: its packed queries and room for a block.
class TileWork {
 public:
  // Whether the tile registers can be used: a question of shapes alone, never of the batch.
  static bool fits(const Args& a) {
    return a.page_size % kTile == 0 && a.width % kTileInputs == 0 && a.value_width % kTile == 0 && tiles_granted();
  }

  TileWork(const Args& a, const Tile<bf16>& tile) : args_(a), tile_(tile) {
    static thread_local KeptMemory memory;
    groups_ = (tile.rows + kTile - 1) / kTile;
    const int shares = kBlock / kTile + tile.rows;
    share_ = (kBlock + shares - 1) / shares;
    query_ = (__m512i*)memory.get(kRows * a.width * sizeof(bf16) + kBlock * a.width * sizeof(bf16));
    values_ = query_ + kRows * a.width / kTileInputs;
    for (long g = 0; g < groups_; g++)
      for (long d = 0; d < a.width; d += kTileInputs) {
        __m512i* packed = query_ + (g * a.width + d) / 2;
        for (long r = 0; r < kTile; r++)
          packed[r] = g * kTile + r < tile.rows ? read<__m512i>(tile.query[g * kTile + r] + d) : __m512i{};
        transpose_words(packed);
      }
    TileConfig config;  // 0: scores; 4: keys or values; 5: queries or values; 1: sums; 2, 3, 6, 7: weights
    const int rows = tile.rows < kTile ? tile.rows : kTile;
    for (int t = 0; t < 8; t++) config.set(t, t == 0 || t == 4 || t == 5 ? kTile : rows, 64);
    config.use();
  }
  TileWork(const TileWork&) = delete;
  ~TileWork() { _tile_release(); }

  // scores[row][entry] of the whole block; asks for the next block's keys.
  void score(const Block<bf16>& block, const Block<bf16>& next, float (*scores)[kBlock]) const {
    const long stride = args_.width * sizeof(bf16);
    alignas(64) __m512i products[kBlock / kTile][kTile];
    for (long g = 0; g < groups_; g++) {
      const __m512i* query = query_ + g * args_.width / 2;
      for (int e = 0; e < block.count; e += kTile) {
        _tile_zero(0);
        for (long d = 0; d < args_.width; d += kTileInputs) {
          _tile_loadd(4, block.key[e] + d, stride);
          _tile_loadd(5, query + d / 2, 64);
          _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, products[e / kTile], 64);
        if (g == 0) ask_keys(next, e / kTile);
      }
      const long first = g * kTile, rows = tile_.rows - first < kTile ? tile_.rows - first : kTile;
      for (int e = 0; e < block.count; e += kTile) {  // apart, so that no tile waits for the one before
        __m512i* product = products[e / kTile];
        transpose_words(product);
        for (long r = 0; r < rows; r++) memcpy(scores[first + r] + e, product + r, sizeof product[0]);
      }
    }
  }

  // Asks for a share of the next block's keys, after the weights of a row were computed.
  void weighed(const Block<bf16>& next, int row) const { ask_keys(next, kBlock / kTile + row); }

  // sum[row][column] += weights x values of the block; asks for the next block's values. Overwrites the weights.
  void accumulate(const Block<bf16>& block, const Block<bf16>& next, float (*scores)[kBlock], float* sum,
                  long padded) const {
    const long steps = (block.count + kTileInputs - 1) / kTileInputs;
    interleave_values(block, next, steps);
    for (int r = 0; r < tile_.rows; r++) split_weights(scores[r]);
    for (long g = 0; g < groups_; g++) {
      const char* weights = (const char*)scores[g * kTile];
      _tile_loadd(2, weights, sizeof scores[0]);
      _tile_loadd(3, weights + 64, sizeof scores[0]);
      _tile_loadd(6, weights + 128, sizeof scores[0]);
      _tile_loadd(7, weights + 192, sizeof scores[0]);
      float* rows = sum + g * kTile * padded;
      for (long c = 0; c < args_.value_width; c += kTile) {
        const __m512i* values = values_ + c * kBlock / kTileInputs;
        _tile_loadd(1, rows + c, padded * sizeof(float));
        _tile_loadd(4, values, 64);
        _tile_dpbf16ps(1, 2, 4);
        _tile_dpbf16ps(1, 6, 4);
        if (steps > 1) {
          _tile_loadd(5, values + kTile, 64);
          _tile_dpbf16ps(1, 3, 5);
          _tile_dpbf16ps(1, 7, 5);
        }
        _tile_stored(1, rows + c, padded * sizeof(float));
      }
    }
  }

 private:
  // The next block's keys in equal shares, one with each tile of scores and one with each row.
  void ask_keys(const Block<bf16>& next, int share) const {
    for (int e = share * share_; e < (share + 1) * share_; e++) prefetch_entry(next, e, 0, args_.width);
  }

  // kBlock weights become as many in bfloat16, then the remainders.
  static void split_weights(float* weights) {
    __m512bh parts[2 * kBlock / kTileInputs];
    for (int e = 0; e < kBlock; e += kTileInputs) {
      const Vec low = load(weights + e), high = load(weights + e + kTile);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      const Vec low_part = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)both)), 16);
      const Vec high_part = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)both, 1)), 16);
      parts[e / kTileInputs] = both;
      parts[(kBlock + e) / kTileInputs] = _mm512_cvtne2ps_pbh((__m512)(high - high_part), (__m512)(low - low_part));
    }
    memcpy(weights, parts, sizeof parts);
  }

  // values_[column / 16][entry / 2]: 16 columns of two entries, alternating; zero behind the last entry, whatever its
  // page holds there.
  void interleave_values(const Block<bf16>& block, const Block<bf16>& next, long steps) const {
    const long offset = args_.page_size * args_.width;
    const __m512i quads = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    for (int e = 0; e < steps * kTileInputs; e += 2) {
      const bf16 *first = block.key[e] + offset, *second = block.key[e + 1] + offset;
      for (long c = 0; c < args_.width; c += kTileInputs) {
        const __m512i zero = {};
        const __m512i a = _mm512_permutexvar_epi64(quads, e < block.count ? read<__m512i>(first + c) : zero);
        const __m512i b = _mm512_permutexvar_epi64(quads, e + 1 < block.count ? read<__m512i>(second + c) : zero);
        __m512i* to = values_ + c * kBlock / kTileInputs + e / 2;
        to[0] = _mm512_unpacklo_epi16(a, b);
        to[kBlock / 2] = _mm512_unpackhi_epi16(a, b);
      }
      prefetch_entry(next, e, offset, args_.width);
      prefetch_entry(next, e + 1, offset, args_.width);
    }
  }

  const Args& args_;
  const Tile<bf16>& tile_;
  long groups_;       // of 16 rows
  int share_;         // keys that are asked for at a time
  __m512i* query_;    // [groups][width / 32][16]: two dims of 16 rows
  __m512i* values_;
};

#endif

}  // namespace quire

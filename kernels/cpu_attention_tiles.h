// Scores and weighted sums of values in bfloat16 on tile registers, for the blocks of cpu_attention.h.
//
// Scores: 16 keys, as they lie in their page, times 16 packed queries; the product [entries][rows] is transposed. Sums:
// weights times the values of 32 entries, whose pairs are interleaved first, 32 columns at a time so that they stay in
// L1. A weight counts as two numbers in bfloat16, its first eight bits and the rest rounded to as many, so that 16 of
// its bits take part. Each row's sums go over the entries in fixed groups, whatever the other rows are. For few rows, as in
// decoding, whose lanes LaneWork of cpu_attention_lanes.h would leave empty.
#pragma once
#include "cpu_attention.h"
#include "cpu_tiles.h"

namespace quire {

#if defined(QUIRE_TILES)

constexpr long kAskedAfter = 8;  // entries whose values are interleaved between two requests for the next block

// The upper half of each weight's bits, and what it leaves: both in the upper halves of the lanes, with anything below.
inline void split_weight(Vec weight, BitVec& upper, BitVec& rest) {
  upper = (BitVec)weight & 0xffff0000u;
  rest = (BitVec)(weight - (Vec)upper) + 0x8000u;  // to the nearest
}

// packed[rows / 16][width / 32][16]: two dims of 16 rows; rows behind the last are zero.
inline void pack_queries(const Tile<bf16>& tile, long width, __m512i* packed) {
  for (long first = 0; first < tile.rows; first += kTile)
    for (long d = 0; d < width; d += kTileInputs, packed += kTile) {
      for (long r = 0; r < kTile; r++)
        packed[r] = first + r < tile.rows ? read<__m512i>(tile.query[first + r] + d) : __m512i{};
      transpose_words(packed);
    }
}

// What a thread needs to compute one tile of queries: its packed queries and room for a block.
class TileWork {
 public:
  static constexpr int kTogether = 1;  // rows whose sums lie in one piece

  // Whether the tile registers can be used: a question of shapes alone, never of the batch.
  static bool fits(const Args& a) {
    return a.page_size % kTile == 0 && a.width % kTileInputs == 0 && a.value_width % kTile == 0 && tiles_granted();
  }

  TileWork(const Args& a, const Tile<bf16>& tile) : args_(a), tile_(tile) {
    static thread_local KeptMemory memory;
    groups_ = (tile.rows + kTile - 1) / kTile;
    query_ = (__m512i*)memory.get(kRows * a.width * sizeof(bf16) + kBlock * kTileInputs * sizeof(bf16));
    values_ = (__m512i(*)[2][kTile])(query_ + kRows * a.width / kTileInputs);
    pack_queries(tile, a.width, query_);
    TileConfig config;  // 0: scores; 1: keys; 2: queries; then 0 .. 3: values; 4, 5: sums; 6, 7: weights
    const int rows = tile.rows < kTile ? tile.rows : kTile;
    for (int t = 0; t < 8; t++) config.set(t, t < 4 ? kTile : rows, 64);
    config.use();
  }
  TileWork(const TileWork&) = delete;
  ~TileWork() { _tile_release(); }

  // scores[row][entry] of the whole block; asks for a fifth of the next block.
  void score(const Block<bf16>& block, Block<bf16>& next, float (*scores)[kBlock]) const {
    const long stride = args_.width * sizeof(bf16), share = next.bytes * kTile / kBlock / 5;
    alignas(64) __m512i products[kBlock / kTile][kTile];
    for (long g = 0; g < groups_; g++) {
      const __m512i* query = query_ + g * args_.width / 2;
      for (int e = 0; e < block.count; e += kTile) {
        _tile_zero(0);
        for (long d = 0; d < args_.width; d += kTileInputs) {
          _tile_loadd(1, block.key[e] + d, stride);
          _tile_loadd(2, query + d / 2, 64);
          _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, products[e / kTile], 64);
        if (g == 0) next.ask(share);
      }
      const long first = g * kTile, rows = tile_.rows - first < kTile ? tile_.rows - first : kTile;
      for (int e = 0; e < block.count; e += kTile) {  // apart, so that no tile waits for the one before
        __m512i* product = products[e / kTile];
        rows <= 4 ? transpose_four(product) : rows <= 8 ? transpose_eight(product) : transpose_words(product);
        for (long r = 0; r < rows; r++) memcpy(scores[first + r] + e, product + r, sizeof product[0]);
      }
    }
  }

  // Asks for a row's share of another fifth, after its weights were computed.
  void weighed(Block<bf16>& next) const { next.ask(next.bytes / 5 / tile_.rows); }

  // sum[row][place] += weights x values of the block; asks for the rest of the next block. Overwrites the weights.
  void accumulate(const Block<bf16>& block, Block<bf16>& next, float (*scores)[kBlock], float* sum, long padded) const {
    const long stride = padded * sizeof(float);
    const bool both = block.count > kTileInputs;
    for (int r = 0; r < tile_.rows; r++) split_weights(scores[r]);
    for (long c = 0; c < args_.value_width; c += kTileInputs, sum += kTileInputs) {
      interleave_values(block, c, next);
      _tile_loadd(0, values_[0][0], 64);
      _tile_loadd(1, values_[0][1], 64);
      _tile_loadd(2, values_[1][0], 64);
      _tile_loadd(3, values_[1][1], 64);
      for (long g = 0; g < groups_; g++) {
        const char* weights = (const char*)scores[g * kTile];
        float* sums = sum + g * kTile * padded;
        _tile_loadd(4, sums, stride);
        _tile_loadd(5, sums + kTile, stride);
        _tile_loadd(6, weights, sizeof scores[0]);
        _tile_dpbf16ps(4, 6, 0);
        _tile_dpbf16ps(5, 6, 1);
        _tile_loadd(7, weights + 128, sizeof scores[0]);
        _tile_dpbf16ps(4, 7, 0);
        _tile_dpbf16ps(5, 7, 1);
        if (both) {
          _tile_loadd(6, weights + 64, sizeof scores[0]);
          _tile_dpbf16ps(4, 6, 2);
          _tile_dpbf16ps(5, 6, 3);
          _tile_loadd(7, weights + 192, sizeof scores[0]);
          _tile_dpbf16ps(4, 7, 2);
          _tile_dpbf16ps(5, 7, 3);
        }
        _tile_stored(4, sums, stride);
        _tile_stored(5, sums + kTile, stride);
      }
    }
  }

  void add(const Block<bf16>& block, Block<bf16>& next, Sight sight, State state) const {
    add_rows(args_, tile_, *this, block, next, sight, state);
  }

  static void merge(State whole, State part, int rows, long padded) { merge_rows(whole, part, rows, padded); }

  // Sums from the order of `interleave_values` into that of the columns.
  static void straighten(State state, int rows, long padded) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    for (float *sum = state.sum, *end = sum + rows * padded; sum < end; sum += kTileInputs) {
      const __m512i first = read<__m512i>(sum), second = read<__m512i>(sum + kTile);
      store(sum, (Vec)_mm512_permutex2var_epi64(first, low, second));
      store(sum + kTile, (Vec)_mm512_permutex2var_epi64(first, high, second));
    }
  }

 private:
  // `transpose_words` as far as the first 4 rows go: a quarter of the shuffles.
  static void transpose_four(__m512i* v) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int i = 0; i < 4; i++) {
      __m512i four = _mm512_castsi128_si512(read<__m128i>(v + 4 * i));
      four = _mm512_inserti32x4(four, read<__m128i>(v + 4 * i + 1), 1);
      four = _mm512_inserti32x4(four, read<__m128i>(v + 4 * i + 2), 2);
      v[i] = _mm512_inserti32x4(four, read<__m128i>(v + 4 * i + 3), 3);
    }
    transpose_lanes(v);
    for (int r = 0; r < 4; r++) v[r] = _mm512_permutexvar_epi32(order, v[r]);
  }

  // And as far as the first 8 do.
  static void transpose_eight(__m512i* v) {
    const __m512i low = _mm512_set_epi32(27, 19, 26, 18, 25, 17, 24, 16, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    for (int i = 0; i < 8; i++)
      v[i] = _mm512_inserti64x4(read<__m512i>(v + 2 * i), read<__m256i>(v + 2 * i + 1), 1);
    transpose_lanes(v);
    transpose_lanes(v + 4);
    for (int r = 0; r < 4; r++) {
      const __m512i first = v[r], second = v[4 + r];
      v[r] = _mm512_permutex2var_epi32(first, low, second);
      v[4 + r] = _mm512_permutex2var_epi32(first, high, second);
    }
  }

  // kBlock weights become as many in bfloat16, then the remainders.
  static void split_weights(float* weights) {
    alignas(64) static constexpr uint16_t kUpper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i order = read<__m512i>(kUpper);
    __m512i parts[2 * kBlock / kTileInputs];
    for (int e = 0; e < kBlock; e += kTileInputs) {
      BitVec upper[2], rest[2];
      split_weight(load(weights + e), upper[0], rest[0]);
      split_weight(load(weights + e + kTile), upper[1], rest[1]);
      parts[e / kTileInputs] = _mm512_permutex2var_epi16((__m512i)upper[0], order, (__m512i)upper[1]);
      parts[(kBlock + e) / kTileInputs] = _mm512_permutex2var_epi16((__m512i)rest[0], order, (__m512i)rest[1]);
    }
    memcpy(weights, parts, sizeof parts);
  }

  // Values of columns column .. column + 31, if they exist: the cache has whole groups of 32, whatever those behind the
  // last column hold. values_[entry / 32][place / 16][entry % 32 / 2]: 16 columns of two entries, alternating; zero behind
  // the last entry, whatever its page holds there. The first 16 places get every other group of four columns: the
  // instruction's order, put right by `straighten`.
  void interleave_values(const Block<bf16>& block, long column, Block<bf16>& next) const {
    const long offset = args_.page_size * args_.width + column;
    auto value = [&](int e) { return e < block.count ? read<__m512i>(block.key[e] + offset) : __m512i{}; };
    auto pair = [&](int e, __m512i a, __m512i b) {
      values_[e / kTileInputs][0][e % kTileInputs / 2] = _mm512_unpacklo_epi16(a, b);
      values_[e / kTileInputs][1][e % kTileInputs / 2] = _mm512_unpackhi_epi16(a, b);
    };
    const long share = next.bytes * kAskedAfter * kTileInputs / (kBlock * args_.value_width);
    int e = 0;
    for (; e + 1 < block.count; e += 2) {
      if (e % kAskedAfter == 0) next.ask(share);
      pair(e, read<__m512i>(block.key[e] + offset), read<__m512i>(block.key[e + 1] + offset));
    }
    for (; e < kBlock; e += 2) pair(e, value(e), value(e + 1));
  }

  const Args& args_;
  const Tile<bf16>& tile_;
  long groups_;     // of 16 rows
  __m512i* query_;  // [groups][width / 32][16]: two dims of 16 rows
  __m512i (*values_)[2][kTile];
};

#endif

}  // namespace quire

// Scores and weighted sums of values of many rows in bfloat16, for the blocks of cpu_attention.h: prompts.
//
// 16 rows lie in the lanes of a vector from the scores to the sums. A product of 16 keys and 16 packed queries is
// [entries][rows] already, so nothing is transposed and no lanes are folded: the largest score and the mass are those
// of vectors. Two entries' weights, side by side, are the right operand of values^T x weights; a block's values are
// transposed once for all rows of a tile. Each sum has the order that TileWork gives it.
#pragma once
#include "cpu_attention_tiles.h"

namespace quire {

#if defined(QUIRE_TILES)

// What a thread needs to compute one tile of queries: its packed queries and room for a block.
class LaneWork {
 public:
  static constexpr int kTogether = kTile;  // rows whose sums lie in one piece

  // Whether so many rows make up for transposing the values, which takes the longer the more dims they have.
  static bool pays(const Args& a, int rows) { return 4 * rows > a.width; }

  LaneWork(const Args& a, const Tile<bf16>& tile) : args_(a), tile_(tile), groups_((tile.rows + kTile - 1) / kTile) {
    static thread_local KeptMemory memory;
    query_ = (__m512i*)memory.get((kRows + kBlock) * a.width * sizeof(bf16));
    values_ = query_ + kRows * a.width / kTileInputs;
    pack_queries(tile, a.width, query_);
    for (int r = 0; r < groups_ * kTile; r++) position_[r] = tile.position[r < tile.rows ? r : tile.rows - 1];
    TileConfig config;  // 0 .. 3: scores or sums; 4, 5: queries or weights; 6, 7: keys or values
    for (int t = 0; t < 8; t++) config.set(t, kTile, 64);
    config.use();
  }
  LaneWork(const LaneWork&) = delete;
  ~LaneWork() { _tile_release(); }

  // The block's part in a state; asks for all of the next block.
  void add(const Block<bf16>& block, Block<bf16>& next, Sight sight, State state) const {
    transpose_values(block);
    const long padded = padded_width(args_);
    int32_t first[kTiles], last[kTiles];
    for (int t = 0; t < kTiles; t++) {
      const IntVec at = read<IntVec>(block.position + t * kTile);
      first[t] = min_lane(at), last[t] = max_lane(at);
    }
    for (long g = 0; g < groups_; g++) {
      next.ask(next.bytes / groups_);
      const IntVec rows = read<IntVec>(position_ + g * kTile);
      const int32_t oldest = min_lane(rows), newest = max_lane(rows);
      int tiles = kTiles;  // of entries: none behind them is seen by any row
      while (tiles && first[tiles - 1] > newest) tiles--;
      if (!tiles) continue;
      bool masked = sight.hidden || args_.window;
      for (int t = 0; t < tiles; t++) masked |= last[t] > oldest;
      score(g, block, tiles);
      const Vec scale = broadcast(late_scale(args_));
      if (masked || args_.softcap != 0 || args_.scale <= 0) restrict_scores(g, block, sight, tiles);
      State group = {state.top + g * kTile, state.mass + g * kTile, state.sum + g * kTile * padded};
      weigh(tiles, scale, group, padded);
      accumulate(tiles, group.sum);
    }
  }

  // As `merge_rows`, with rows in lanes.
  static void merge(State whole, State part, int rows, long padded) {
    for (int r = 0; r < rows; r += kTile) {
      const Vec other = load(part.top + r), before = load(whole.top + r);
      const IntVec none = other == -INFINITY;
      if (_mm512_test_epi32_mask((__m512i)none, (__m512i)none) == 0xffff) continue;
      const Vec high = none ? before : other < before ? before : other;
      const Vec scales = none ? broadcast(1) : exp(before - high), gains = none ? Vec{} : exp(other - high);
      float *sum = whole.sum + r * padded, *more = part.sum + r * padded;
      for (long i = 0; i < padded * kTile; i += kTile)
        store(sum + i, folded(load(sum + i), scales, load(more + i), gains));
      store(whole.mass + r, folded(load(whole.mass + r), scales, load(part.mass + r), gains));
      store(whole.top + r, high);
    }
  }

  // Sums from [rows / 16][padded][16] into [rows][padded].
  static void straighten(State state, int rows, long padded) {
    static thread_local KeptMemory memory;
    float* turned = (float*)memory.get(kTile * padded * sizeof(float));
    for (long first = 0; first < rows; first += kTile) {
      float* sum = state.sum + first * padded;
      for (long c = 0; c < padded; c += kTile) {
        __m512i square[kTile];
        memcpy(square, sum + c * kTile, sizeof square);
        transpose_words(square);
        for (long r = 0; r < kTile; r++) memcpy(turned + r * padded + c, square + r, sizeof square[0]);
      }
      memcpy(sum, turned, kTile * padded * sizeof(float));
    }
  }

 private:
  static constexpr int kTiles = kBlock / kTile, kSteps = kBlock / kTileInputs;

  // scores_[entry] of the rows of group g, for the first `tiles` tiles of entries.
  void score(long g, const Block<bf16>& block, int tiles) const {
    const long stride = args_.width * sizeof(bf16);
    const __m512i* query = query_ + g * args_.width / 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long d = 0; d < args_.width; d += kTileInputs) {
      _tile_loadd(4, query + d / 2, 64);
      _tile_loadd(6, block.key[0] + d, stride);
      _tile_dpbf16ps(0, 6, 4);
      if (tiles == 1) continue;
      _tile_loadd(7, block.key[kTile] + d, stride);
      _tile_dpbf16ps(1, 7, 4);
      if (tiles == 2) continue;
      _tile_loadd(6, block.key[2 * kTile] + d, stride);
      _tile_dpbf16ps(2, 6, 4);
      if (tiles == 3) continue;
      _tile_loadd(7, block.key[3 * kTile] + d, stride);
      _tile_dpbf16ps(3, 7, 4);
    }
    _tile_stored(0, scores_[0], 64);
    if (tiles > 1) _tile_stored(1, scores_[kTile], 64);
    if (tiles > 2) _tile_stored(2, scores_[2 * kTile], 64);
    if (tiles > 3) _tile_stored(3, scores_[3 * kTile], 64);
  }

  // Scale and softcap as far as `late_scale` does not, and mask: what a row does not see is -inf.
  void restrict_scores(long g, const Block<bf16>& block, Sight sight, int tiles) const {
    const IntVec latest = read<IntVec>(position_ + g * kTile);
    const IntVec earliest = args_.window ? latest - args_.window : broadcast_int(INT32_MIN);
    uint64_t seen[kTile];
    for (long r = 0; r < kTile; r++) {
      const long row = g * kTile + r < tile_.rows ? g * kTile + r : tile_.rows - 1;
      seen[r] = sight.hidden ? seen_entries(tile_.visible[row], tile_.plain_end, sight.begin) : ~0ull;
    }
    for (int e = 0; e < tiles * kTile; e++) {
      const IntVec at = broadcast_int(block.position[e]);
      IntVec sees = (at <= latest) & (at > earliest);
      if (sight.hidden) {
        uint32_t bits = 0;
        for (long r = 0; r < kTile; r++) bits |= (seen[r] >> e & 1) << r;
        sees &= lane_bits(bits);
      }
      store(scores_[e], sees ? early_score(args_, load(scores_[e])) : broadcast(-INFINITY));
    }
  }

  // Scores become weights_; updates the rows' largest scores and masses and shrinks their earlier sums.
  void weigh(int tiles, Vec scale, State group, long padded) const {
    Vec best[4];
    for (int i = 0; i < 4; i++) best[i] = broadcast(-INFINITY);
    for (int e = 0; e < tiles * kTile; e += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) best[i] = max(load(scores_[e + i]), best[i]);
    const Vec top = load(group.top), found = max(max(best[0], best[1]), max(best[2], best[3])) * scale;
    const Vec high = found < top ? top : found;
    const IntVec none = high == -INFINITY;  // nothing is visible, or NaN alone; beside numbers it comes out as a weight
    const Vec total = tiles == kTiles ? weigh_tiles<kTiles>(scale, none ? Vec{} : high)
                      : tiles == 3    ? weigh_tiles<3>(scale, none ? Vec{} : high)
                      : tiles == 2    ? weigh_tiles<2>(scale, none ? Vec{} : high)
                                      : weigh_tiles<1>(scale, none ? Vec{} : high);
    store(group.top, none ? total != total ? total : top : high);
    const IntVec same = none | (top == high), unchanged = same | (top == -INFINITY);  // zeros stay zeros
    const Vec shrink = same ? broadcast(1) : exp(top - high);
    store(group.mass, load(group.mass) * shrink + total);
    if (_mm512_test_epi32_mask((__m512i)unchanged, (__m512i)unchanged) == 0xffff) return;
    for (long i = 0; i < padded * kTile; i += kTile) store(group.sum + i, load(group.sum + i) * shrink);
  }

  // Returns the sums of the weights, added up as `weigh_row` does: first over tiles, then in halves.
  template <int TILES>
  Vec weigh_tiles(Vec scale, Vec high) const {
    Vec totals[kTile];
    for (int e = 0; e < kTile; e += 2) {
      Vec even = {}, odd = {};
#pragma GCC unroll 4
      for (int t = 0; t < TILES; t++) {
        const Vec first = exp_weight(below(load(scores_[t * kTile + e]), scale, high));
        const Vec second = exp_weight(below(load(scores_[t * kTile + e + 1]), scale, high));
        even += first, odd += second;
        BitVec upper[2], rest[2];
        split_weight(first, upper[0], rest[0]);
        split_weight(second, upper[1], rest[1]);
        const int place = (t % 2 * kTile + e) / 2;
        weights_[t / 2][0][place] = pair(upper[0], upper[1]);
        weights_[t / 2][1][place] = pair(rest[0], rest[1]);
      }
      totals[e] = even, totals[e + 1] = odd;
    }
    if constexpr (TILES % 2 != 0)
      for (int place = kTile / 2; place < kTile; place++)
        weights_[TILES / 2][0][place] = weights_[TILES / 2][1][place] = __m512i{};
    for (int half = kTile / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) totals[i] += totals[i + half];
    return totals[0];
  }

  // The upper halves of the lanes of two vectors, alternating.
  static __m512i pair(BitVec first, BitVec second) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
  }

  // sums[column][row] += values^T x weights_.
  void accumulate(int tiles, float* sums) const {
    asm volatile("" ::: "memory");  // older compilers do not know that loads of tiles read what was stored before
    const int steps = tiles > 2 ? 2 : 1;
    long c = 0;
    for (; c + 4 * kTile <= args_.value_width; c += 4 * kTile) accumulate_columns<4>(c, steps, sums + c * kTile);
    const long left = (args_.value_width - c) / kTile;
    if (left == 3) accumulate_columns<3>(c, steps, sums + c * kTile);
    if (left == 2) accumulate_columns<2>(c, steps, sums + c * kTile);
    if (left == 1) accumulate_columns<1>(c, steps, sums + c * kTile);
  }

  template <int COLUMNS>
  void accumulate_columns(long column, int steps, float* sums) const {
    _tile_loadd(0, sums, 64);
    if (COLUMNS > 1) _tile_loadd(1, sums + kTile * kTile, 64);
    if (COLUMNS > 2) _tile_loadd(2, sums + 2 * kTile * kTile, 64);
    if (COLUMNS > 3) _tile_loadd(3, sums + 3 * kTile * kTile, 64);
    for (int step = 0; step < steps; step++) {
      const __m512i* values = values_ + step * args_.width + column;
      _tile_loadd(4, weights_[step][0], 64);
      _tile_loadd(5, weights_[step][1], 64);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(0, 6, 5);
      if (COLUMNS > 1) {
        _tile_loadd(7, values + kTile, 64);
        _tile_dpbf16ps(1, 7, 4);
        _tile_dpbf16ps(1, 7, 5);
      }
      if (COLUMNS > 2) {
        _tile_loadd(6, values + 2 * kTile, 64);
        _tile_dpbf16ps(2, 6, 4);
        _tile_dpbf16ps(2, 6, 5);
      }
      if (COLUMNS > 3) {
        _tile_loadd(7, values + 3 * kTile, 64);
        _tile_dpbf16ps(3, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
    _tile_stored(0, sums, 64);
    if (COLUMNS > 1) _tile_stored(1, sums + kTile * kTile, 64);
    if (COLUMNS > 2) _tile_stored(2, sums + 2 * kTile * kTile, 64);
    if (COLUMNS > 3) _tile_stored(3, sums + 3 * kTile * kTile, 64);
  }

  // values_[entry / 32][column]: 32 entries of it; zero behind the last entry, whatever its page holds there.
  void transpose_values(const Block<bf16>& block) const {
    const long offset = args_.page_size * args_.width;
    for (int step = 0; step < kSteps; step++)
      for (long c = 0; c < args_.value_width; c += kTileInputs) {
        auto value = [&](int e) {
          return e < block.count ? read<__m512i>(block.key[e] + offset + c) : __m512i{};
        };
        __m512i low[kTile], high[kTile];  // of each quarter of the columns the first four, the others
        for (int i = 0; i < kTile; i++) {
          const __m512i first = value(step * kTileInputs + 2 * i), second = value(step * kTileInputs + 2 * i + 1);
          low[i] = _mm512_unpacklo_epi16(first, second), high[i] = _mm512_unpackhi_epi16(first, second);
        }
        transpose_words(low);
        transpose_words(high);
        __m512i* columns = values_ + step * args_.width + c;
        for (int i = 0; i < kTile; i++) {
          columns[i / 4 * 8 + i % 4] = low[i];
          columns[i / 4 * 8 + i % 4 + 4] = high[i];
        }
      }
  }

  const Args& args_;
  const Tile<bf16>& tile_;
  long groups_;       // of 16 rows
  __m512i* query_;    // as `pack_queries` has them
  __m512i* values_;
  int32_t position_[kRows];
  alignas(64) mutable float scores_[kBlock][kTile];
  alignas(64) mutable __m512i weights_[kSteps][2][kTile];  // [..][upper, rest][pair of entries]
};

#endif

}  // namespace quire

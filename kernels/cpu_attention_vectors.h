// Scores and weighted sums of values of any type and shape on vector registers, for the blocks of cpu_attention.h.
#pragma once
#include "cpu_attention.h"

namespace quire {

// Raw dot products of rows row .. row + ROWS - 1 (as far as the tile has them) with the whole block; the first rows ask
// for half of the next block.
template <class T, int ROWS>
inline void score_rows(const Tile<T>& tile, int row, const Block<T>& block, Block<T>& next, long width,
                       float (*scores)[kBlock]) {
  constexpr int COLUMNS = kLanes / ROWS;
  const T* queries[ROWS];
  const int count = tile.rows - row < ROWS ? tile.rows - row : ROWS;
  for (int r = 0; r < ROWS; r++) queries[r] = tile.query[row + (r < count ? r : count - 1)];
  for (int e = 0; e < block.count; e += COLUMNS) {
    if (row == 0) next.ask(COLUMNS * width * sizeof(T));
    float lanes[kLanes];
    store(lanes, dot_tile<T, ROWS>(queries, block.key + e, width));
    for (int r = 0; r < count; r++) memcpy(scores[row + r] + e, lanes + r * COLUMNS, COLUMNS * sizeof(float));
  }
}

template <class T>
inline void score_block(const Tile<T>& tile, const Block<T>& block, Block<T>& next, long width,
                        float (*scores)[kBlock]) {
  int row = 0;
  for (; row + kTileRows <= tile.rows; row += kTileRows) score_rows<T, kTileRows>(tile, row, block, next, width, scores);
  if (tile.rows - row == 1)
    score_rows<T, 1>(tile, row, block, next, width, scores);
  else if (tile.rows - row == 2)
    score_rows<T, 2>(tile, row, block, next, width, scores);
  else if (tile.rows > row)
    score_rows<T, kTileRows>(tile, row, block, next, width, scores);
}

// sum[r][column ..] += weights x values for ROWS rows and VECTORS vectors of columns, held in registers meanwhile. If
// `ahead`, ask for as much of the next block.
template <class T, int ROWS, int VECTORS>
inline void accumulate(const Block<T>& block, Block<T>& next, bool ahead, long value_offset,
                       float (*scores)[kBlock], float* sum, long padded) {
  Vec acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) acc[r][v] = load(sum + r * padded + v * kLanes);
  for (int e = 0; e < block.count; e++) {
    const T* value = block.key[e] + value_offset;
    if (ahead) next.ask(VECTORS * kLanes * sizeof(T));
    Vec values[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) values[v] = load(value + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) acc[r][v] += scores[r][e] * values[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) store(sum + r * padded + v * kLanes, acc[r][v]);
}

template <class T, int ROWS>
inline void accumulate_rows(const Args& a, const Block<T>& block, Block<T>& next, bool ahead,
                            float (*scores)[kBlock], float* sum, long padded) {
  // As many sums as half of the registers hold: with few rows there must be more columns, or additions wait for each
  // other.
  constexpr int WIDE = kLanes / (ROWS < 2 ? 2 : ROWS), NARROW = kLanes / 4;
  const long offset = a.page_size * a.width, stop = padded < a.width ? padded : a.width;
  long column = 0;
  for (; column + WIDE * kLanes <= stop; column += WIDE * kLanes)
    accumulate<T, ROWS, WIDE>(block, next, ahead, offset + column, scores, sum + column, padded);
  for (; column + NARROW * kLanes <= stop; column += NARROW * kLanes)
    accumulate<T, ROWS, NARROW>(block, next, ahead, offset + column, scores, sum + column, padded);
  for (; column + kLanes <= stop && column < a.value_width; column += kLanes)
    accumulate<T, ROWS, 1>(block, next, ahead, offset + column, scores, sum + column, padded);
  if (column < a.value_width) {  // a head dim that is no multiple of the vector
    for (int e = 0; e < block.count; e++) {
      const Vec value = load_some(block.key[e] + offset + column, a.width - column);
      for (int r = 0; r < ROWS; r++) {
        float* at = sum + r * padded + column;
        store(at, load(at) + scores[r][e] * value);
      }
    }
  }
}

// How scores and sums of a tile are computed on vector registers, as far as there are no tile registers.
template <class T>
class VectorWork {
 public:
  static constexpr int kTogether = 1;  // rows whose sums lie in one piece

  VectorWork(const Args& a, const Tile<T>& tile) : args_(a), tile_(tile) {}

  // scores[row][entry] of the whole block; asks for a part of the next block.
  void score(const Block<T>& block, Block<T>& next, float (*scores)[kBlock]) const {
    score_block(tile_, block, next, args_.width, scores);
  }

  // After the weights of a row: nothing, the other two ask for all of the next block.
  void weighed(Block<T>&) const {}

  // sum[row][column] += weights x values of the block; asks for the rest of the next block.
  void accumulate(const Block<T>& block, Block<T>& next, float (*scores)[kBlock], float* sum, long padded) const {
    int row = 0;
    for (; row + 4 <= tile_.rows; row += 4)
      accumulate_rows<T, 4>(args_, block, next, row == 0, scores + row, sum + row * padded, padded);
    for (; row + 2 <= tile_.rows; row += 2)
      accumulate_rows<T, 2>(args_, block, next, row == 0, scores + row, sum + row * padded, padded);
    if (row < tile_.rows)
      accumulate_rows<T, 1>(args_, block, next, row == 0, scores + row, sum + row * padded, padded);
  }

  // The block's part in a state.
  void add(const Block<T>& block, Block<T>& next, Sight sight, State state) const {
    add_rows(args_, tile_, *this, block, next, sight, state);
  }

  // whole = whole and part together; a part without visible entries changes nothing.
  static void merge(State whole, State part, int rows, long padded) { merge_rows(whole, part, rows, padded); }

  // Puts the finished sums, in whatever order, into that of [rows][padded].
  static void straighten(State, int, long) {}

 private:
  const Args& args_;
  const Tile<T>& tile_;
};

}  // namespace quire

// One tile of query heads against the entries of their kv head, see cpu_attention.cpp for how tiles are made.
#pragma once
#include "cpu.h"

#include <math.h>

namespace quire {

constexpr int kRows = 128;   // queries of a tile: 16 tokens of groups of 8, so that verifying drafts reads the cache once
constexpr int kBlock = 64;   // entries whose scores wait in cache: kRows * kBlock * 4 = 32 KiB
constexpr long kPart = 256;  // entries of a part: one read of 64 KiB at head dim 128 in bfloat16

struct Args {
  const void *query, *key, *value;  // [T, H, D], [T, K, D], [T, K, Dv]; heads contiguous, rows a stride apart
  void* pool;                       // [P, 2, B, D]
  int32_t* entry_positions;         // [P, B]
  const int32_t *page_table, *kept, *query_start;
  const int64_t* positions;
  const int64_t* visible;  // [T] or null: masks of new rows, see attention.py
  const float* sinks;      // [H] or null
  void* output;            // [T, H, Dv] contiguous
  long query_stride, key_stride, value_stride;
  long table_sequence, table_head, kept_sequence;  // strides; a head's kept lengths are adjacent
  long sequences, heads, kv_heads, width, value_width, page_size;
  float scale, softcap;  // softcap 0: none
  int32_t window;  // 0: none
};

// Running softmax of a tile: per row the largest score, the sum of weights and the weighted sum of values.
struct State {
  float* top;
  float* mass;
  float* sum;  // [rows][padded]
};

// Floats per row of sums: whole groups of the four vectors that are held in registers.
inline long padded_width(const Args& a) { return (a.value_width + 4 * kLanes - 1) / (4 * kLanes) * (4 * kLanes); }

// A tile: rows item .. item + rows - 1 of the (token, group member) pairs of one sequence and kv head.
template <class T>
struct Tile {
  const T* query[kRows];
  int32_t position[kRows];
  int head[kRows];  // query head
  long token[kRows];
  uint64_t visible[kRows];  // mask of new rows; 0: none
  int rows;
  int32_t first, last;  // least and largest position
  long plain_end;       // entries before it are hidden from no row by a mask
};

template <class T>
inline void fill_tile(const Args& a, long s, long k, long item, long end, Tile<T>& tile) {
  const long group = a.heads / a.kv_heads;
  tile.rows = end - item < kRows ? end - item : kRows;
  tile.plain_end = a.visible ? a.kept[s * a.kept_sequence + k] : INT64_MAX;
  for (int r = 0; r < tile.rows; r++) {
    const long token = a.query_start[s] + (item + r) / group, head = k * group + (item + r) % group;
    const int32_t position = a.positions[token];
    tile.token[r] = token;
    tile.head[r] = head;
    tile.query[r] = (const T*)a.query + token * a.query_stride + head * a.width;
    tile.position[r] = position;
    tile.visible[r] = a.visible ? a.visible[token] : 0;
    tile.first = r == 0 || position < tile.first ? position : tile.first;
    tile.last = r == 0 || position > tile.last ? position : tile.last;
  }
}

// Entries begin .. end - 1 of a head.
struct Span {
  const int32_t* pages;
  long begin, end;
};

// Keys and positions of up to kBlock entries of one head; a value lies page_size * width behind its key. And the pieces of
// memory that they lie in, to be asked for before they are read.
template <class T>
struct Block {
  static constexpr int kMostPieces = 2 * kBlock;
  static constexpr long kMostBytes = 4096;  // the hardware guesses what is read next only within so many

  const T* key[kBlock];
  int32_t position[kBlock];
  int count;
  int32_t first, last;
  long bytes;  // of all entries
  const char* pieces[kMostPieces];
  int piece_count;
  long longest, asked, due;  // bytes: of a piece; of each piece, asked for so far; of all, to be asked for

  void clear() { count = piece_count = bytes = longest = asked = due = 0; }

  // `entries` more in a row.
  void add(const T* keys, long entries, long width, long page_size) {
    for (long i = 0; i < entries; i++) key[count + i] = keys + i * width;
    count += entries;
    const long size = entries * width * sizeof(T);
    bytes += 2 * size;
    if (entries == page_size) {
      add_pieces((const char*)keys, 2 * size);
    } else {
      add_pieces((const char*)keys, size);
      add_pieces((const char*)(keys + page_size * width), size);
    }
  }

  // Ask for `size` bytes more. A line of every piece in turn, as if several streams were read: the hardware joins in
  // ahead of each, and gets a quarter more out of memory than ahead of one. Little at a time between the arithmetic,
  // because a burst of requests would stall it until most of them are answered.
  void ask(long size) {
    for (due += size; due > 0 && asked < longest; asked += 64, due -= 64 * piece_count)
      for (int i = 0; i < piece_count; i++) __builtin_prefetch(pieces[i] + asked, 0, 2);
  }

 private:
  void add_pieces(const char* from, long size) {
    const long parts = (size + kMostBytes - 1) / kMostBytes, part = (size / parts + 63) / 64 * 64;
    for (long i = 0; i < parts && piece_count < kMostPieces; i++) pieces[piece_count++] = from + i * part;
    longest = part > longest ? part : longest;
  }
};

// The first kBlock entries of a span, or as many as it has.
template <class T>
inline void fill_block(const Args& a, Span span, Block<T>& block) {
  const long end = span.begin + kBlock < span.end ? span.begin + kBlock : span.end;
  block.clear();
  if (span.begin >= end) return;
  const int32_t size = a.page_size, first = span.begin;
  const int32_t* pages = span.pages + first / size;
  long offset = first % size;
  for (int32_t entry = first; entry < end; pages++, offset = 0) {
    const long here = size - offset < end - entry ? size - offset : end - entry;
    const int32_t* positions = a.entry_positions + (long)*pages * size + offset;
    if (entry + kBlock < span.end)  // read when the next block is filled
      prefetch(a.entry_positions + (long)span.pages[(entry + kBlock) / size] * size, size * sizeof(int32_t));
    if (here == kLanes)  // one vector instead of a call
      memcpy(block.position + block.count, positions, kLanes * sizeof(int32_t));
    else
      memcpy(block.position + block.count, positions, here * sizeof(int32_t));
    block.add((const T*)a.pool + (*pages * 2l * size + offset) * a.width, here, a.width, size);
    entry += here;
  }
  const int count = block.count;
  for (int i = count; i % kLanes; i++) {  // the last tile of dot products is filled up with what is there
    block.key[i] = block.key[count - 1];
    block.position[i] = block.position[count - 1];
  }
  IntVec least = read<IntVec>(block.position), most = least;
  for (int i = kLanes; i < count; i += kLanes) {
    const IntVec at = read<IntVec>(block.position + i);
    least = at < least ? at : least;
    most = at > most ? at : most;
  }
  block.first = min_lane(least), block.last = max_lane(most);
  for (int i = count; i < kBlock; i++) block.position[i] = INT32_MAX;  // behind every query
}

// Which of kBlock entries from entry `first` on a row's mask lets it see; `old` entries precede the new ones.
inline uint64_t seen_entries(uint64_t visible, long old, long first) {
  const long ahead = old - first;
  if (!visible || ahead >= kBlock) return ~0ull;
  if (ahead >= 0) return visible << ahead | ((1ull << ahead) - 1);
  return -ahead < 64 ? visible >> -ahead : 0;
}

// What of a block some row may not see.
struct Sight {
  bool hidden, masked;  // by a mask of new rows; in any way
  long begin;           // first entry of the block
};

// By how much the largest score is multiplied once it is found, instead of all of them before.
inline float late_scale(const Args& a) { return a.softcap == 0 && a.scale > 0 ? a.scale : 1.0f; }

// A score as it is compared with others: scaled and bounded, unless that is left to `late_scale`.
inline Vec early_score(const Args& a, Vec s) {
  if (a.softcap != 0) return a.softcap * tanh(s * a.scale / a.softcap);
  return a.scale > 0 ? s : s * a.scale;
}

// score * scale - high, rounded once wherever the machine can, so that rows get the same weights in whatever lanes.
inline Vec below(Vec score, Vec scale, Vec high) {
#if defined(QUIRE_AVX512)
  return (Vec)_mm512_fmsub_ps((__m512)score, (__m512)scale, (__m512)high);
#else
  return score * scale - high;
#endif
}

// Scale, softcap and mask one row's scores, turn them into weights and update the row's largest score and mass.
// Returns the factor by which the row's earlier sums shrink. Behind the block's last entry, where scores hold anything,
// weights are zero.
template <class T>
inline float weigh_row(const Args& a, const Block<T>& block, int32_t position, bool masked, uint64_t seen,
                       float* scores, float& top, float& mass) {
  constexpr int kParts = kBlock / kLanes;
  const Vec nothing = broadcast(-INFINITY);
  const IntVec latest = broadcast_int(position);
  const IntVec earliest = broadcast_int(a.window ? position - a.window : INT32_MIN);
  const float scale = late_scale(a);
  Vec parts[kParts], best = nothing;
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i++) {
    Vec s = early_score(a, load(scores + i * kLanes));
    if (masked || block.count < kBlock) {
      const IntVec at = read<IntVec>(block.position + i * kLanes);
      s = ((at <= latest) & (at > earliest)) ? s : nothing;
      if (seen != ~0ull) s = lane_bits(seen >> i * kLanes) ? s : nothing;
    }
    best = max(s, best);
    parts[i] = s;
  }
  float high = max_lanes(best) * scale;
  high = high < top ? top : high;
  if (high == -INFINITY) {  // nothing is visible, or NaN alone; beside numbers it comes out as a weight
    float sum = 0;
    for (int i = 0; i < kParts; i++) sum += sum_lanes(parts[i] != parts[i] ? parts[i] : Vec{});
    if (sum != sum) top = mass = sum;
    memset(scores, 0, kBlock * sizeof(float));
    return 1.0f;
  }
  Vec total = {};
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i++) {
    const Vec weight = exp_weight(below(parts[i], broadcast(scale), broadcast(high)));
    store(scores + i * kLanes, weight);
    total += weight;
  }
  const float shrink = top == high ? 1.0f : exp(broadcast(top - high))[0];
  mass = mass * shrink + sum_lanes(total);
  top = high;
  return shrink;
}

// A block's part in a state, row by row: `work` knows how to score all of it and how to add up what rows weigh.
template <class T, class Work>
inline void add_rows(const Args& a, const Tile<T>& tile, const Work& work, const Block<T>& block, Block<T>& next,
                     Sight sight, State state) {
  const long padded = padded_width(a);
  alignas(64) float scores[kRows][kBlock];
  work.score(block, next, scores);
  for (int r = 0; r < tile.rows; r++) {
    const uint64_t seen = sight.hidden ? seen_entries(tile.visible[r], tile.plain_end, sight.begin) : ~0ull;
    const float shrink =
        weigh_row(a, block, tile.position[r], sight.masked, seen, scores[r], state.top[r], state.mass[r]);
    work.weighed(next);
    if (shrink == 1.0f) continue;
    float* sum = state.sum + r * padded;
    for (long i = 0; i < padded; i += kLanes) store(sum + i, load(sum + i) * shrink);
  }
  work.accumulate(block, next, scores, state.sum, padded);
}

// Two sums in one.
template <class V>
inline V folded(V sum, V scale, V more, V gain) {
  return sum * scale + more * gain;
}

inline void merge_rows(State whole, State part, int rows, long padded) {
  for (int r = 0; r < rows; r++) {
    const float other = part.top[r];
    if (other == -INFINITY) continue;
    const float high = other < whole.top[r] ? whole.top[r] : other;
    const Vec scales = exp(broadcast(whole.top[r] - high)), gains = exp(broadcast(other - high));
    float *sum = whole.sum + r * padded, *more = part.sum + r * padded;
    for (long i = 0; i < padded; i += kLanes) store(sum + i, folded(load(sum + i), scales, load(more + i), gains));
    whole.mass[r] = folded(whole.mass[r], scales[0], part.mass[r], gains[0]);
    whole.top[r] = high;
  }
}

// All entries of `span` into a fresh state; those of `following` are what this thread reads next.
template <class T, class Work>
inline void attend_part(const Args& a, const Tile<T>& tile, const Work& work, Span span, Span following, State state) {
  const int rows = (tile.rows + Work::kTogether - 1) / Work::kTogether * Work::kTogether;
  memset(state.sum, 0, rows * padded_width(a) * sizeof(float));
  for (int r = 0; r < rows; r++) state.top[r] = -INFINITY, state.mass[r] = 0;
  Block<T> blocks[2];
  fill_block(a, span, blocks[0]);
  for (int turn = 0; span.begin < span.end; span.begin += kBlock, turn ^= 1) {
    const Block<T>& block = blocks[turn];
    Block<T>& next = blocks[turn ^ 1];
    const Span rest = {span.pages, span.begin + kBlock, span.end};
    fill_block(a, rest.begin < rest.end ? rest : following, next);
    if (block.first > tile.last || (a.window && block.last <= tile.first - a.window)) continue;
    const bool hidden = span.begin + block.count > tile.plain_end;
    const bool masked = hidden || block.last > tile.first || (a.window && block.first <= tile.last - a.window);
    work.add(block, next, {hidden, masked, span.begin}, state);
  }
}

// Divide by the mass, sinks included, and write the tile's rows.
template <class T, class Work>
inline void write_tile(const Args& a, const Tile<T>& tile, State state, long padded) {
  Work::straighten(state, tile.rows, padded);
  for (int r = 0; r < tile.rows; r++) {
    float scale = 1.0f, mass = state.mass[r];
    if (a.sinks) {
      const float sink = a.sinks[tile.head[r]], high = sink > state.top[r] ? sink : state.top[r];
      scale = exp(broadcast(state.top[r] - high))[0];
      mass = mass * scale + exp(broadcast(sink - high))[0];
    }
    const Vec factor = broadcast(mass == 0 ? 0 : scale / mass);
    T* out = (T*)a.output + (tile.token[r] * a.heads + tile.head[r]) * a.value_width;
    for (long i = 0; i < a.value_width; i += kLanes) {
      const long count = a.value_width - i < kLanes ? a.value_width - i : kLanes;
      store_some(out + i, load(state.sum + r * padded + i) * factor, count);
    }
  }
}

}  // namespace quire

// Which entries rank best: no sort, the bar is found bit by bit. The contracts stand in kernels/ranking.py.
#include "cpu_entries.h"

namespace quire {
// What the heads of a layer hold: scores [K, entries], lengths [K], positions [K, entries].
struct ScoredLayer {
  const float* scores;
  const int64_t* lengths;
  Pages positions;
  long entries;
};

namespace {

// Larger floats have larger keys; zeros of both signs have the same.
inline uint32_t key_of(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

inline long count_from(const uint32_t* keys, long count, uint32_t bar) {
  int found = 0;
  for (long i = 0; i < count; i++) found += keys[i] >= bar;
  return found;
}

// The wanted-th largest of the keys, 1 <= wanted <= count.
inline uint32_t bar_of(const uint32_t* keys, long count, long wanted) {
  uint32_t bar = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const uint32_t higher = bar | 1u << bit;
    if (count_from(keys, count, higher) >= wanted) bar = higher;
  }
  return bar;
}

const uint32_t* keys_of(const float* scores, long count) {
  static thread_local KeptMemory memory;
  uint32_t* keys = (uint32_t*)memory.get(count * sizeof(uint32_t));
  for (long i = 0; i < count; i++) keys[i] = key_of(scores[i]);
  return keys;
}

// Of the wanted best those that equal the bar: the rest is above it.
inline long spare_at(const uint32_t* keys, long count, uint32_t bar, long wanted) {
  return wanted - (bar == UINT32_MAX ? 0 : count_from(keys, count, bar + 1));
}

}  // namespace
}  // namespace quire

// ranked [L, K, E] of the layers; counts [2, L, K]: lengths of the heads, and how many of their entries are protected.
extern "C" void quire_rank_entries(const quire::ScoredLayer* scored, float* ranked, int64_t* counts, long layers,
                                   long heads, long entries, int sinks, int newest, int threads) {
  const float most = __FLT_MAX__, infinity = __builtin_inff();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < layers * heads; row++) {
    const quire::ScoredLayer& layer = scored[row / heads];
    const long head = row % heads, length = layer.lengths[head];
    const quire::Positions positions(layer.positions, head, length);
    const long first = positions.from(sinks), last = positions.from(newest);
    const float* from = layer.scores + head * layer.entries;
    float* to = ranked + row * entries;
    for (long e = 0; e < first; e++) to[e] = infinity;
    for (long e = first; e < last; e++) {
      float x = from[e];
      x = x < most ? x : x != x ? -most : most;
      to[e] = x > -most ? x : -most;
    }
    const long second = first > last ? first : last;
    for (long e = second; e < length; e++) to[e] = infinity;
    for (long e = length; e < entries; e++) to[e] = -infinity;
    counts[row] = length;
    counts[layers * heads + row] = first + length - second;
  }
}

// keep [N, width]: ascending indices of the counts[n] best of each row of scores [N, E]; ties go to the smaller index.
extern "C" void quire_best_entries(const float* scores, const int64_t* counts, int32_t* keep, long rows, long entries,
                                   long width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long row = 0; row < rows; row++) {
    int32_t* out = keep + row * width;
    const long wanted = counts[row];
    long taken = 0;
    if (wanted > 0) {
      const uint32_t* keys = quire::keys_of(scores + row * entries, entries);
      const uint32_t bar = quire::bar_of(keys, entries, wanted);
      long spare = quire::spare_at(keys, entries, bar, wanted);
      for (long e = 0; e < entries && taken < wanted; e++) {
        const bool equal = keys[e] == bar, takes = (keys[e] > bar) | (equal & (spare > 0));
        out[taken] = e;
        taken += takes;
        spare -= equal;
      }
    }
    for (; taken < width; taken++) out[taken] = 0;
  }
}

// shares [G, N]: how many of the `wanted` best of a group's scores [G, N, E] are in each row; ties go to the smaller
// row, then index; -inf is none.
extern "C" void quire_share_best(const float* scores, int64_t* shares, long groups, long rows, long entries,
                                 long wanted, int threads) {
  const uint32_t none = quire::key_of(-__builtin_inff());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long group = 0; group < groups; group++) {
    const long count = rows * entries;
    const uint32_t* keys = quire::keys_of(scores + group * count, count);
    const uint32_t bar = wanted < count ? quire::bar_of(keys, count, wanted) : none;
    long spare = wanted < count ? quire::spare_at(keys, count, bar, wanted) : 0;
    if (bar <= none) spare = 0;
    for (long row = 0; row < rows; row++) {
      long better = 0, equal = 0;
      for (long e = 0; e < entries; e++) {
        better += keys[row * entries + e] > bar;
        equal += keys[row * entries + e] == bar;
      }
      const long extra = equal < spare ? equal : spare;
      shares[group * rows + row] = better + extra;
      spare -= extra;
    }
  }
}

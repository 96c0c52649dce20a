// Scores by keys and values alone, in one or two passes over them. The contracts stand in kernels/key_scores.py and
// lag_ranks.py. Everything is a fixed function of its arguments, whatever the threads.
#include "cpu_entries.h"

namespace quire {
namespace {

constexpr long kNormBlock = 512;  // entries of a head that a thread takes at a time

// out[i] = |rows[i]|^2 of kRun rows side by side.
template <class T>
void square_run(const T* rows, long width, float* out) {
  typedef typename Dot<T>::Raw Raw;
  const long whole = width - width % Dot<T>::step;
  Vec sums[kRun];
  for (long r = 0; r < kRun; r++) {
    const T* row = rows + r * width;
    Vec sum = {};
    for (long i = 0; i < whole; i += Dot<T>::step) {
      const Raw x = Dot<T>::fetch(row + i);
      sum = Dot<T>::add(sum, x, x);
    }
    if (whole < width) {
      const Raw x = fetch_some(row + whole, width - whole);
      sum = Dot<T>::add(sum, x, x);
    }
    sums[r] = sum;
  }
  for (long r = 0; r < kRun; r += kLanes) store(out + r, transpose_sum(sums + r));
}

// For each part of a row of `width` numbers f(load, at), where load(row) gives the part's numbers and `at` is where they
// belong in a row of floats: two vectors at a time, in the order of load_pair, then what is left.
template <class T, class F>
inline void each_part(long width, F f) {
  long c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) f([c](const T* row) { return load_pair(row + c); }, c);
  for (; c + kLanes <= width; c += kLanes) f([c](const T* row) { return Pair{load(row + c), Vec{}}; }, c);
  if (c < width) f([c, width](const T* row) { return Pair{load_some(row + c, width - c), Vec{}}; }, c);
}

// Norms of some of a head's entries; adds each entry over its norm to `direction`, as each_part orders it, if there is
// one.
template <class T>
void norm_entries(const Entries<T>& entries, long first, long last, long width, T* room, float* out,
                  float* direction) {
  for (long e = first; e < last; e += kRun) {
    const T* run = entries.run(e, room);
    float norms[kRun], shares[kRun];
    square_run(run, width, norms);
    for (long i = 0; i < kRun; i += kLanes) {
      const Vec norm = sqrt(load(norms + i));
      store(norms + i, norm);
      store(shares + i, 1.0f / max(norm, broadcast(1e-12f)));
    }
    const long count = last - e < kRun ? last - e : kRun;
    memcpy(out + e, norms, count * sizeof(float));
    if (!direction) continue;
    each_part<T>(width, [&](auto part, long at) {
      Vec first = load(direction + at), second = load(direction + at + kLanes);
      for (long i = 0; i < count; i++) {
        const Pair x = part(run + i * width);
        first += x.first * shares[i], second += x.second * shares[i];
      }
      store(direction + at, first);
      store(direction + at + kLanes, second);
    });
  }
}

// out [length]: the cosine between each entry of a head and the mean of its entries' directions.
template <class T>
void cosines(const Pages& pages, long head, long length, long width, float* out) {
  static thread_local KeptMemory memory;
  const long padded = whole(width, kLanes) + kLanes;
  float* direction = (float*)memory.get(padded * sizeof(float) + kRun * width * sizeof(T));
  T* room = (T*)(direction + padded);
  memset(direction, 0, padded * sizeof(float));
  const Entries<T> entries(pages, head, length, width);
  norm_entries(entries, 0, length, width, room, out, direction);
  Vec squares = {};
  for (long c = 0; c < padded; c += kLanes) squares += load(direction + c) * load(direction + c);
  const float norm = fmaxf(sqrtf(sum_lanes(squares)), 1e-12f);
  for (long e = 0; e < length; e += kRun) {
    const T* run = entries.run(e, room);
    Vec sums[kRun] = {};
    each_part<T>(width, [&](auto part, long at) {
      const Vec first = load(direction + at), second = load(direction + at + kLanes);
      for (long i = 0; i < kRun; i++) {
        const Pair x = part(run + i * width);
        sums[i] += x.first * first + x.second * second;
      }
    });
    for (long i = 0; i < kRun && e + i < length; i += kLanes) {
      const long some = length - e - i < kLanes ? length - e - i : kLanes;
      const Vec own = max(load_some(out + e + i, some), broadcast(1e-12f));
      store_some(out + e + i, transpose_sum(sums + i) / (own * norm), some);
    }
  }
}

// [size] += softmax over a partition's entries of their deviations over channels, normalised by the range of the next.
// A channel is centred on that range, so that the variance can be had from sums and sums of squares. `known` rows are
// there; those past the next partition are asked for.
template <class T>
void add_spread(const T* const* rows, long known, long size, long width, float least_range, float* ranges, float* spread,
                float* sum) {
  float *middle = ranges, *slope = ranges + whole(width, 2 * kLanes);
  each_part<T>(width, [&](auto part, long at) {
    Pair low = part(rows[size]), high = low;
    for (long e = 1; e < size; e++) {
      const Pair x = part(rows[size + e]);
      low = {least(x.first, low.first), least(x.second, low.second)};
      high = {max(x.first, high.first), max(x.second, high.second)};
    }
    store(middle + at, (low.first + high.first) * 0.5f);
    store(middle + at + kLanes, (low.second + high.second) * 0.5f);
    store(slope + at, 1.0f / max(high.first - low.first, broadcast(least_range)));
    store(slope + at + kLanes, 1.0f / max(high.second - low.second, broadcast(least_range)));
  });
  Vec top = broadcast(-INFINITY);
  for (long e = 0; e < size; e += kLanes) {
    Vec sums[kLanes] = {}, squares[kLanes] = {};
    for (long i = e; i < e + kLanes; i++)
      if (2 * size + i < known) prefetch(rows[2 * size + i], width * sizeof(T));
    each_part<T>(width, [&](auto part, long at) {
      const Pair centre = {load(middle + at), load(middle + at + kLanes)};
      const Pair by = {load(slope + at), load(slope + at + kLanes)};
      for (long i = 0; i < kLanes; i++) {
        const Pair x = part(rows[e + i]);
        const Vec first = (x.first - centre.first) * by.first, second = (x.second - centre.second) * by.second;
        sums[i] += first, squares[i] += first * first;
        sums[i] += second, squares[i] += second * second;
      }
    });
    const Vec mean = transpose_sum(sums);
    const Vec variance = (transpose_sum(squares) - mean * mean / (float)width) / (float)(width - 1);
    const Vec deviation = sqrt(max(variance, variance * 0.0f));  // 0 where rounding made it negative
    store(spread + e, deviation);
    top = max(deviation, top);
  }
  const float most = max_lanes(top);
  float total = 0;
  for (long e = 0; e < size; e += kLanes) {
    const Vec p = exp(load(spread + e) - most);
    store(spread + e, p);
    total += sum_lanes(p);
  }
  for (long e = 0; e < size; e += kLanes) store(sum + e, load(sum + e) + load(spread + e) / total);
}

// How many of the others are less, or as large and older, as a share of the size.
inline void rank(const float* scores, long size, float* out) {
  for (long e = 0; e < size; e += kLanes) {
    const Vec own = load(scores + e);
    IntVec below = {};
    for (long i = 0; i < e; i++) below += broadcast(scores[i]) <= own;
    for (int i = 0; i < kLanes; i++) {
      const Vec other = broadcast(scores[e + i]);
      below += (other < own) | ((other == own) & lane_bits(-2u << i));
    }
    for (long i = e + kLanes; i < size; i++) below += broadcast(scores[i]) < own;
    store(out + e, __builtin_convertvector(-below, Vec) / (float)size);
  }
}

struct Lag {
  Pages states[2];  // keys, values
  const int64_t* lengths;
  float* output;  // [K, E]
  long first, entries, size, width;
  float least_range;
};

// One partition of a head and the one behind it.
template <class T>
void rank_part(const Lag& lag, long head, long part) {
  static thread_local KeptMemory memory;
  const long size = lag.size, width = lag.width, at = lag.first + part * size, padded = whole(width, 2 * kLanes);
  const T** rows = (const T**)memory.get(3 * size * sizeof(T*) + (2 * padded + 2 * size) * sizeof(float));
  float *ranges = (float*)(rows + 3 * size), *spread = ranges + 2 * padded, *sum = spread + size;
  memset(sum, 0, size * sizeof(float));
  for (const Pages& pages : lag.states) {
    const long known = at + 3 * size <= lag.lengths[head] ? 3 * size : 2 * size;
    Entries<T>(pages, head, lag.lengths[head], width).rows(at, known, rows);
    add_spread(rows, known, size, width, lag.least_range, ranges, spread, sum);
  }
  rank(sum, size, lag.output + head * lag.entries + at);
}

}  // namespace
}  // namespace quire

using quire::bf16;

// output [K, E]: the norm of each entry.
extern "C" void quire_entry_norms(const quire::Pages* states, const int64_t* lengths, float* output, long heads,
                                  long entries, long width, int is_bf16, int threads) {
  auto norm = [&](auto zero, long head, long first) {
    typedef decltype(zero) T;
    static thread_local quire::KeptMemory memory;
    const long length = lengths[head], last = first + quire::kNormBlock < length ? first + quire::kNormBlock : length;
    T* room = (T*)memory.get(quire::kRun * width * sizeof(T));
    quire::norm_entries(quire::Entries<T>(*states, head, length, width), first, last, width, room,
                        output + head * entries, (float*)nullptr);
  };
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++)
    for (long first = 0; first < entries; first += quire::kNormBlock)
      is_bf16 ? norm(bf16{}, head, first) : norm(0.0f, head, first);
}

// output [K, E]: the cosine between each entry and the mean of the directions of its head's entries.
extern "C" void quire_mean_cosines(const quire::Pages* states, const int64_t* lengths, float* output, long heads,
                                   long entries, long width, int is_bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++)
    (is_bf16 ? quire::cosines<bf16> : quire::cosines<float>)(*states, head, lengths[head], width,
                                                             output + head * entries);
}

// output [K, E] from entry `first` on: ranks in [0, 1) inside partitions of `size`, all complete ones of a head but the
// last; the others are left alone. D and size multiples of 16.
extern "C" void quire_lag_ranks(const quire::Pages* keys, const quire::Pages* values, const int64_t* lengths,
                                float* output, long first, long heads, long entries, long size, long width,
                                float least_range, int is_bf16, int threads) {
  const quire::Lag lag{{*keys, *values}, lengths, output, first, entries, size, width, least_range};
  const long parts = (entries - first) / size - 1;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (long head = 0; head < heads; head++)
    for (long part = 0; part < parts; part++) {
      if (first + (part + 2) * size > lengths[head]) continue;
      (is_bf16 ? quire::rank_part<bf16> : quire::rank_part<float>)(lag, head, part);
    }
}

// output [K, E]: the mean of each entry's score and its neighbours', `size` in all; what lies at positions from `newest`
// on, or past the ends, counts as 0.
extern "C" void quire_mean_by_neighbours(const float* scores, const quire::Pages* positions, const int64_t* lengths,
                                         float* output, long heads, long entries, int newest, int size) {
  static thread_local quire::KeptMemory memory;
  const long reach = size / 2, room = entries + 2 * reach;
  float* known = (float*)memory.get(room * sizeof(float));
  for (long head = 0; head < heads; head++) {
    const long last = quire::Positions(*positions, head, lengths[head]).from(newest);
    memset(known, 0, room * sizeof(float));
    memcpy(known + reach, scores + head * entries, last * sizeof(float));
    float* to = output + head * entries;
    for (long e = 0; e < entries; e++) to[e] = known[e];
    for (long shift = 1; shift < size; shift++)
      for (long e = 0; e < entries; e++) to[e] += known[e + shift];
    for (long e = 0; e < entries; e++) to[e] /= size;
  }
}

// scores [K, E] become means over all heads' entries at positions with the same p / size; n tokens.
extern "C" void quire_mean_by_token(float* scores, const int32_t* positions, const int64_t* lengths, long heads,
                                    long entries, long position_stride, long tokens, int size) {
  static thread_local quire::KeptMemory memory;
  const long places = tokens / size + 1;
  float* totals = (float*)memory.get(2 * places * sizeof(float));
  float* counts = totals + places;
  memset(totals, 0, 2 * places * sizeof(float));
  for (long head = 0; head < heads; head++)
    for (long e = 0; e < lengths[head]; e++) {
      const long place = positions[head * position_stride + e] / size;
      totals[place] += scores[head * entries + e];
      counts[place] += 1.0f;
    }
  for (long place = 0; place < places; place++) totals[place] /= counts[place] > 0 ? counts[place] : 1.0f;
  for (long head = 0; head < heads; head++)
    for (long e = 0; e < lengths[head]; e++)
      scores[head * entries + e] = totals[positions[head * position_stride + e] / size];
}

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

// Norms of some of a head's entries; adds each entry over its norm to `direction` [width] if there is one.
template <class T>
void norm_entries(const Entries<T>& entries, long first, long last, long width, T* room, float* out,
                  float* direction) {
  for (long e = first; e < last; e += kRun) {
    const T* run = entries.run(e, room);
    float norms[kRun];
    square_run(run, width, norms);
    for (long i = 0; i < kRun; i += kLanes) {
      Vec v = load(norms + i);
      for (int l = 0; l < kLanes; l++) v[l] = sqrtf(v[l]);
      store(norms + i, v);
    }
    const long count = last - e < kRun ? last - e : kRun;
    memcpy(out + e, norms, count * sizeof(float));
    if (!direction) continue;
    for (long i = 0; i < count; i++) {
      const float share = 1.0f / fmaxf(norms[i], 1e-12f);
      const T* row = run + i * width;
      long c = 0;
      for (; c + kLanes <= width; c += kLanes) store(direction + c, load(direction + c) + load(row + c) * share);
      if (c < width) store_some(direction + c, load(direction + c) + load_some(row + c, width - c) * share, width - c);
    }
  }
}

// out [length]: the cosine between each entry of a head and the mean of its entries' directions.
template <class T>
void cosines(const Pages& pages, long head, long length, long width, float* out) {
  static thread_local KeptMemory memory;
  const long padded = (width + kLanes - 1) / kLanes * kLanes;
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
    Vec sums[kRun];
    for (long i = 0; i < kRun; i++) {
      Vec sum = {};
      long c = 0;
      for (; c + kLanes <= width; c += kLanes) sum += load(run + i * width + c) * load(direction + c);
      if (c < width) sum += load_some(run + i * width + c, width - c) * load(direction + c);
      sums[i] = sum;
    }
    float products[kRun];
    for (long i = 0; i < kRun; i += kLanes) store(products + i, transpose_sum(sums + i));
    for (long i = 0; i < kRun && e + i < length; i++) out[e + i] = products[i] / norm / fmaxf(out[e + i], 1e-12f);
  }
}

// [size] += softmax over a partition's entries of their deviations over channels, normalised by the range of the next.
// A channel is centred on that range, so that the variance can be had from sums and sums of squares. `known` rows are
// there; those past the next partition are asked for.
template <class T>
void add_spread(const T* const* rows, long known, long size, long width, float least_range, float* ranges, float* spread,
                float* sum) {
  float *middle = ranges, *slope = ranges + width;
  for (long c = 0; c < width; c += kLanes) {
    Vec least = load(rows[size] + c), greatest = least;
    for (long e = 1; e < size; e++) {
      const Vec x = load(rows[size + e] + c);
      least = x < least ? x : least, greatest = x > greatest ? x : greatest;
    }
    store(middle + c, (least + greatest) * 0.5f);
    store(slope + c, 1.0f / max(greatest - least, broadcast(least_range)));
  }
  float top = -INFINITY, total = 0;
  for (long e = 0; e < size; e += kLanes) {
    Vec sums[kLanes], squares[kLanes];
    for (long i = 0; i < kLanes; i++) {
      const T* row = rows[e + i];
      if (2 * size + e + i < known) prefetch(rows[2 * size + e + i], width * sizeof(T));
      Vec mean = {}, square = {};
      for (long c = 0; c < width; c += kLanes) {
        const Vec x = (load(row + c) - load(middle + c)) * load(slope + c);
        mean += x, square += x * x;
      }
      sums[i] = mean, squares[i] = square;
    }
    const Vec mean = transpose_sum(sums);
    const Vec variance = (transpose_sum(squares) - mean * mean / (float)width) / (float)(width - 1);
    store(spread + e, variance);
    for (long i = e; i < e + kLanes; i++) {
      spread[i] = spread[i] > 0 ? sqrtf(spread[i]) : spread[i] * 0;
      top = spread[i] > top ? spread[i] : top;
    }
  }
  for (long e = 0; e < size; e += kLanes) {
    const Vec p = exp(load(spread + e) - top);
    store(spread + e, p);
    total += sum_lanes(p);
  }
  for (long e = 0; e < size; e++) sum[e] += spread[e] / total;
}

// How many of the others are less, or as large and older, as a share of the size.
inline void rank(const float* scores, long size, float* out) {
  for (long e = 0; e < size; e++) {
    const Vec own = broadcast(scores[e]);
    const long mixed = e / kLanes * kLanes;  // the vector with older and newer ones
    IntVec below = {};
    for (long i = 0; i < mixed; i += kLanes) below += load(scores + i) <= own;
    for (long i = mixed; i < size; i += kLanes) below += load(scores + i) < own;
    int32_t lanes[kLanes], count = 0;
    memcpy(lanes, &below, sizeof lanes);
    for (int i = 0; i < kLanes; i++) count -= lanes[i];
    for (long i = mixed; i < e; i++) count += scores[i] == scores[e];
    out[e] = (float)count / size;
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
  const long size = lag.size, width = lag.width, at = lag.first + part * size;
  const T** rows = (const T**)memory.get(3 * size * sizeof(T*) + (2 * width + 2 * size) * sizeof(float));
  float *ranges = (float*)(rows + 3 * size), *spread = ranges + 2 * width, *sum = spread + size;
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

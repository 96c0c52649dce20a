// Scores by attention: what a few rows give each entry, and what queries to come are expected to give. The contracts
// stand in kernels/attention_columns.py and expected_logits.py. Everything is a fixed function of its arguments,
// whatever the threads.
#include "cpu_entries.h"

namespace quire {
namespace {

constexpr long kGroup = kRuns * kRun;  // entries that are multiplied at a time
constexpr long kEntryBlock = 256;      // entries whose sums stay in L1 while blocks of columns take their turns

struct Attention {
  const void* query;
  Pages keys, positions;
  const int32_t* query_positions;
  const int64_t* lengths;
  const float* sinks;
  float* output;
  long query_stride, rows, heads, kv_heads, entries, width, parts;
  float scale, softcap;
  int greatest;  // instead of the sum
};

// Columns first .. first + kLanes - 1 of a kv head's rows x group; out [length] takes their probabilities. One pass over
// the keys: weights [length][kLanes] are relative to the largest logit so far, `tops` of each kGroup entries, until it
// is known which was the largest of all.
template <class T>
void add_block(const Attention& a, long head, long first, const Columns<T>& block, T* room, bool near,
               float* tops, float* weights, float* out) {
  const long group = a.heads / a.kv_heads, count = a.rows * group, length = a.lengths[head];
  const Positions positions(a.positions, head, length);
  int32_t seen[kLanes];
  float sinks[kLanes];
  int32_t least = INT32_MAX;
  for (long c = 0; c < kLanes; c++) {
    const long column = first + c < count ? first + c : count - 1;
    seen[c] = a.query_positions[column / group];
    sinks[c] = a.sinks ? a.sinks[head * group + column % group] : -INFINITY;
    least = seen[c] < least ? seen[c] : least;
  }
  const IntVec visible = read<IntVec>(seen);
  const long hidden = least < INT32_MAX ? positions.from(least + 1) : length;  // from here on to some columns
  const Vec none = broadcast(-INFINITY), sink = load(sinks);
  Vec top = sink, sum = sink == none ? Vec{} : broadcast(1.0f);
  const Entries<T> keys(a.keys, head, length, a.width);
  const T* runs[kRuns];
  for (long e = 0; e < length; e += kGroup) {
    keys.runs(e, room, near, runs);
    float* at = weights + e * kLanes;
    block.multiply(runs, a.width, at, false);
    const long some = length - e < kGroup ? length - e : kGroup;
    const Vec before = top;
    for (long i = 0; i < some; i++) {
      Vec x = load(at + i * kLanes) * a.scale;
      if (a.softcap > 0) x = tanh(x / a.softcap) * a.softcap;
      if (e + i >= hidden) x = broadcast_int(positions[e + i]) > visible ? none : x;
      store(at + i * kLanes, x);
      top = max(top, x);
    }
    const Vec base = top == none ? Vec{} : top;
    sum *= exp(before - base);
    for (long i = 0; i < some; i++) {
      const Vec p = exp(load(at + i * kLanes) - base);
      store(at + i * kLanes, p);
      sum += p;
    }
    store(tops + e / kGroup * kLanes, top);
  }
  const Vec base = top == none ? Vec{} : top;
  float shares[kLanes];
  store(shares, sum > 0.0f ? 1.0f / sum : sum != sum ? sum : Vec{});
  for (long c = 0; c < kLanes; c++) shares[c] = first + c < count ? shares[c] : 0.0f;
  for (long e = 0; e < length; e += kGroup) {
    const Vec share = load(shares) * exp(load(tops + e / kGroup * kLanes) - base);
    const long end = e + kGroup < length ? e + kGroup : length;
    for (long i = e; i < end; i += kLanes) {
      const int some = end - i < kLanes ? end - i : kLanes;
      if (a.greatest) {
        for (long j = i; j < i + some; j++) {
          const float p = max_lanes(load(weights + j * kLanes) * share);
          out[j] = out[j] > p || out[j] != out[j] ? out[j] : p;
        }
        continue;
      }
      Vec rows[kLanes];
      for (long j = 0; j < kLanes; j++) rows[j] = load(weights + (i + j) * kLanes) * share;
      store_some(out + i, load_some(out + i, some) + transpose_sum(rows), some);
    }
  }
}

// One of the `parts` of a kv head's columns.
template <class T>
void attend_part(const Attention& a, long head, long part) {
  static thread_local KeptMemory memory;
  const long group = a.heads / a.kv_heads, count = a.rows * group, blocks = (count + kLanes - 1) / kLanes;
  const long length = a.lengths[head], size = whole(a.entries, kGroup) * kLanes;
  float* weights = (float*)memory.get((size + size / kGroup) * sizeof(float) + kGroup * a.width * sizeof(T) +
                                      Columns<T>::bytes(a.width));
  float *tops = weights + size, *out = a.output + (head * a.parts + part) * a.entries;
  T* room = (T*)(tops + size / kGroup);
  memset(out, 0, a.entries * sizeof(float));
  Columns<T> columns(room + kGroup * a.width, a.width);
  const TileUse<T> use(a.width);
  const FlushTiny flush;
  const long from = blocks * part / a.parts;
  for (long block = from; block < blocks * (part + 1) / a.parts; block++) {
    const T* rows[kLanes];
    for (long c = 0; c < kLanes; c++) {
      const long column = block * kLanes + c, row = column / group, own = head * group + column % group;
      rows[c] = column < count ? (const T*)a.query + row * a.query_stride + own * a.width : nullptr;
    }
    columns.set(rows, a.width);
    add_block(a, head, block * kLanes, columns, room, block > from, tops, weights, out);
  }
}

struct Moments {
  Pages keys;
  const int64_t* lengths;
  const float *mean, *covariance;  // [H, D] and [H, D, D], symmetric
  const float *cos, *sin;          // [half]
  const float* mean_keys;          // [K, D]
  float* output;                   // [H, E]
  long half, heads, kv_heads, entries, width;
  float scale;
};

// Rows i and i + half of x [2 * half][n] turned by the i-th angle.
void turn_rows(float* x, long n, const float* cos, const float* sin, long half) {
  for (long i = 0; i < half; i++) {
    float *first = x + i * n, *second = x + (i + half) * n;
    for (long j = 0; j < n; j++) {
      const float a = first[j], b = second[j];
      first[j] = a * cos[i] - b * sin[i];
      second[j] = b * cos[i] + a * sin[i];
    }
  }
}

// What the columns of a block of the lower triangle are multiplied with.
inline long inputs_of(long block, long width) {
  const long needed = whole((block + 1) * kLanes, kInputs);
  return needed < width ? needed : width;
}

// linear [D] = s R m, and square [D][D], the lower triangle of s^2 / 2 R C R^T with everything off its diagonal twice:
// k.(linear + square k) is the same, and half of the products are with zeros.
void expect_form(const Moments& m, long head, float* linear, float* square) {
  const long width = m.width;
  memcpy(linear, m.mean + head * width, width * sizeof(float));
  memcpy(square, m.covariance + head * width * width, width * width * sizeof(float));
  turn_rows(linear, 1, m.cos, m.sin, m.half);
  turn_rows(square, width, m.cos, m.sin, m.half);
  const float half_scale = m.scale * m.scale / 2;
  for (long i = 0; i < width; i++) {
    float* row = square + i * width;
    for (long j = 0; j < m.half; j++) {
      const float a = row[j], b = row[j + m.half];
      row[j] = a * m.cos[j] - b * m.sin[j];
      row[j + m.half] = b * m.cos[j] + a * m.sin[j];
    }
    linear[i] *= m.scale;
    for (long j = 0; j < i; j++) row[j] *= 2 * half_scale;
    row[i] *= half_scale;
    for (long j = i + 1; j < width; j++) row[j] = 0.0f;
  }
}

// mean [D] of a head's keys.
void mean_key(const Pages& pages, long head, long length, long width, float* mean) {
  static thread_local KeptMemory memory;
  bf16* room = (bf16*)memory.get(kRun * width * sizeof(bf16));
  const Entries<bf16> keys(pages, head, length, width);
  memset(mean, 0, width * sizeof(float));
  for (long e = 0; e < length; e += kRun) {
    const bf16* run = keys.run(e, room);
    const long count = length - e < kRun ? length - e : kRun;
    for (long c = 0; c < width; c += kLanes) {
      Vec sum = load(mean + c);
      for (long i = 0; i < count; i++) sum += load(run + i * width + c);
      store(mean + c, sum);
    }
  }
  for (long c = 0; c < width; c++) mean[c] /= length > 0 ? length : 1;
}

// rounded [D][D] = square in bfloat16. What that took away, F, counts as a function that is linear around the mean key
// a: k.F k = a.(F + F^T) k - a.F a, but for deviations from the mean. So channels in which all keys are large, as models
// with biases have them, lose nothing. Adds to linear [D]; returns the constant.
float round_form(const float* square, const float* mean, long width, bf16* rounded, float* linear) {
  Vec total = {};
  for (long i = 0; i < width; i++) {
    Vec own = {};
    const Vec at = broadcast(mean[i]);
    for (long c = 0; c < inputs_of(i / kLanes, width); c += kLanes) {
      const Vec exact = load(square + i * width + c);
      store(rounded + i * width + c, exact);
      const Vec lost = exact - load(rounded + i * width + c), share = lost * at;
      own += lost * load(mean + c);
      store(linear + c, load(linear + c) + share);
    }
    const float product = sum_lanes(own);
    linear[i] += product;
    total[0] += product * mean[i];
  }
  return -total[0];
}

// k.(C k + b) of all entries for one query head.
void expect_head(const Moments& m, long head) {
  static thread_local KeptMemory memory;
  const long width = m.width, blocks = width / kLanes, block_bytes = Columns<bf16>::bytes(width);
  char* at = (char*)memory.get((width + 1) * width * sizeof(float) + width * width * sizeof(bf16) +
                               blocks * block_bytes + (kGroup + kEntryBlock) * kLanes * sizeof(float) +
                               kEntryBlock * width * sizeof(bf16));
  float *linear = (float*)at, *square = linear + width;
  bf16* form = (bf16*)(square + width * width);
  char* packed = (char*)(form + width * width);
  float *sums = (float*)(packed + blocks * block_bytes), *total = sums + kGroup * kLanes;
  bf16* room = (bf16*)(total + kEntryBlock * kLanes);
  const long kv_head = head / (m.heads / m.kv_heads), length = m.lengths[kv_head];
  const Entries<bf16> keys(m.keys, kv_head, length, width);
  expect_form(m, head, linear, square);
  const float constant = round_form(square, m.mean_keys + kv_head * width, width, form, linear);
  const TileUse<bf16> use(width);
  for (long block = 0; block < blocks; block++) {
    const bf16* rows[kLanes];
    for (long c = 0; c < kLanes; c++) rows[c] = form + (block * kLanes + c) * width;
    Columns<bf16>(packed + block * block_bytes, width).set(rows, inputs_of(block, width));
  }
  const bf16* runs[kEntryBlock / kRun];
  float* out = m.output + head * m.entries;
  for (long first = 0; first < length; first += kEntryBlock) {
    const long count = length - first < kEntryBlock ? length - first : kEntryBlock;
    for (long e = 0; e < count; e += kGroup) keys.runs(first + e, room + e * width, true, runs + e / kRun);
    memset(total, 0, kEntryBlock * kLanes * sizeof(float));
    for (long block = 0; block < blocks; block++) {
      const Columns<bf16> columns(packed + block * block_bytes, width);
      const Vec b = load(linear + block * kLanes);
      for (long e = 0; e < count; e += kGroup) {
        columns.multiply(runs + e / kRun, inputs_of(block, width), sums, false);
        for (long i = 0; i < kGroup; i++) {
          const Vec k = load(runs[(e + i) / kRun] + i % kRun * width + block * kLanes);
          float* to = total + (e + i) * kLanes;
          store(to, load(to) + (load(sums + i * kLanes) + b) * k);
        }
      }
    }
    sum_rows(total, count, out + first);
    for (long e = first; e < first + count; e++) out[e] += constant;
  }
}

// out [entries]: the parts' [parts][entries] added up, or the greatest of them.
void join_parts(const float* parts, long count, long entries, int greatest, float* out) {
  memcpy(out, parts, entries * sizeof(float));
  for (long part = 1; part < count; part++) {
    const float* more = parts + part * entries;
    if (greatest)
      for (long e = 0; e < entries; e++) out[e] = out[e] > more[e] || out[e] != out[e] ? out[e] : more[e];
    else
      for (long e = 0; e < entries; e++) out[e] += more[e];
  }
}

// out [first, length): the mean of the softmaxes over these entries of a group's logits [group][entries], which are
// overwritten; 0 before it.
void mean_softmax(float* logits, long group, long first, long length, long entries, float* out) {
  memset(out, 0, length * sizeof(float));
  for (long g = 0; g < group; g++) {
    float* row = logits + g * entries;
    Vec top = broadcast(-INFINITY), sum = {};
    for (long e = first; e < length; e += kLanes) {
      const long some = length - e < kLanes ? length - e : kLanes;
      if (some == kLanes) top = max(load(row + e), top);
      for (long i = 0; some < kLanes && i < some; i++) top[0] = row[e + i] > top[0] ? row[e + i] : top[0];
    }
    const float most = max_lanes(top);
    for (long e = first; e < length; e += kLanes) {
      const long some = length - e < kLanes ? length - e : kLanes;
      Vec p = exp(load_some(row + e, some) - most);
      store_some(row + e, p, some);
      for (long i = some; i < kLanes; i++) p[i] = 0.0f;
      sum += p;
    }
    const float share = 1.0f / (sum_lanes(sum) * group);
    for (long e = first; e < length; e++) out[e] += row[e] * share;
  }
}

}  // namespace
}  // namespace quire

using quire::bf16;

// output [K, E]: probability that the columns (rows x group) give each entry, added up or the greatest; `parts` shares of
// the columns are computed on their own.
extern "C" void quire_attention_columns(const void* query, const quire::Pages* keys, const quire::Pages* positions,
                                        const int32_t* query_positions, const int64_t* lengths, const float* sinks,
                                        float* output, long query_stride, long rows, long heads, long kv_heads,
                                        long entries, long width, long parts, float scale, float softcap,
                                        int greatest, int is_bf16, int threads) {
  static thread_local quire::KeptMemory memory;
  float* shares = parts > 1 ? (float*)memory.get(kv_heads * parts * entries * sizeof(float)) : output;
  const quire::Attention a{query, *keys, *positions, query_positions, lengths, sinks, shares,  query_stride, rows,
                           heads, kv_heads, entries, width,           parts,   scale, softcap, greatest};
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (long head = 0; head < kv_heads; head++)
    for (long part = 0; part < parts; part++)
      is_bf16 ? quire::attend_part<bf16>(a, head, part) : quire::attend_part<float>(a, head, part);
  for (long head = 0; parts > 1 && head < kv_heads; head++)
    quire::join_parts(shares + head * parts * entries, parts, entries, greatest, output + head * entries);
}

// output [K, E]: the softmax of logits [H, E], which are overwritten, over entries at positions from `sinks` on, mean
// over a group's heads.
extern "C" void quire_mean_probabilities(float* logits, const quire::Pages* positions, const int64_t* lengths,
                                         float* output, long heads, long kv_heads, long entries, int sinks,
                                         int threads) {
  const long group = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < kv_heads; head++) {
    const long first = quire::Positions(*positions, head, lengths[head]).from(sinks);
    quire::mean_softmax(logits + head * group * entries, group, first, lengths[head], entries, output + head * entries);
  }
}

// output [H, E] = s Rm.k + s^2 / 2 k.(R C R^T) k for keys in bfloat16, D a multiple of 32; R turns by cos, sin [half].
extern "C" void quire_expected_logits(const quire::Pages* keys, const int64_t* lengths, const float* mean,
                                      const float* covariance, const float* cos, const float* sin, float* output,
                                      long half, long heads, long kv_heads, long entries, long width, float scale,
                                      int threads) {
  static thread_local quire::KeptMemory memory;
  float* mean_keys = (float*)memory.get(kv_heads * width * sizeof(float));
  const quire::Moments m{*keys,  lengths, mean, covariance, cos,     sin,   mean_keys,
                         output, half,    heads, kv_heads,  entries, width, scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < kv_heads; head++)
    quire::mean_key(*keys, head, lengths[head], width, mean_keys + head * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) quire::expect_head(m, head);
}

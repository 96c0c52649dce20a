// Scores by attention: what a few rows give each entry, and what queries to come are expected to give. The contracts
// stand in kernels/attention_columns.py and expected_logits.py. Everything is a fixed function of its arguments,
// whatever the threads.
#include "cpu_entries.h"

namespace quire {
namespace {

constexpr long kEntryBlock = 256;  // entries whose sums stay in L1 while blocks of columns take their turns

struct Attention {
  const void* query;
  Pages keys;
  const int32_t *positions, *query_positions;
  const int64_t* lengths;
  const float* sinks;
  float* output;
  long query_stride, position_stride, rows, heads, kv_heads, entries, width, parts;
  float scale, softcap;
  int greatest;  // instead of the sum
};

// Columns first .. first + kLanes - 1 of a kv head's rows x group; `total` [length][kLanes] takes their probabilities.
template <class T>
void add_block(const Attention& a, long head, long first, const Columns<T>& block, T* room, float* logits,
               float* total) {
  const long group = a.heads / a.kv_heads, count = a.rows * group, length = a.lengths[head];
  const int32_t* positions = a.positions + head * a.position_stride;
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
  const Vec none = broadcast(-INFINITY), sink = load(sinks);
  Vec top = sink;
  const Entries<T> keys(a.keys, head, length, a.width);
  for (long e = 0; e < length; e += 2 * kRun) {
    const T* one = keys.run(e, room);
    const T* other = e + kRun < length ? keys.run(e + kRun, room + kRun * a.width) : one;
    block.multiply(one, other, a.width, logits + e * kLanes, false);
    const long end = e + 2 * kRun < length ? e + 2 * kRun : length;
    for (long i = e; i < end; i++) {
      Vec x = load(logits + i * kLanes) * a.scale;
      if (a.softcap > 0) x = tanh(x / a.softcap) * a.softcap;
      if (positions[i] > least) x = broadcast_int(positions[i]) > visible ? none : x;
      store(logits + i * kLanes, x);
      top = max(top, x);
    }
  }
  top = top == none ? Vec{} : top;
  Vec sum = exp(sink - top);
  for (long e = 0; e < length; e++) {
    const Vec p = exp(load(logits + e * kLanes) - top);
    store(logits + e * kLanes, p);
    sum += p;
  }
  float shares[kLanes];
  store(shares, sum > 0.0f ? 1.0f / sum : sum != sum ? sum : Vec{});
  for (long c = 0; c < kLanes; c++) shares[c] = first + c < count ? shares[c] : 0.0f;
  const Vec share = load(shares);
  for (long e = 0; e < length; e++) {
    const Vec old = load(total + e * kLanes), p = load(logits + e * kLanes) * share;
    store(total + e * kLanes, a.greatest ? max(old, p) : old + p);
  }
}

// One of the `parts` of a kv head's columns.
template <class T>
void attend_part(const Attention& a, long head, long part) {
  static thread_local KeptMemory memory;
  const long group = a.heads / a.kv_heads, count = a.rows * group, blocks = (count + kLanes - 1) / kLanes;
  const long length = a.lengths[head], size = whole_runs(a.entries + kRun) * kLanes;
  float* logits = (float*)memory.get(2 * size * sizeof(float) + 2 * kRun * a.width * sizeof(T) +
                                     Columns<T>::bytes(a.width));
  float* total = logits + size;
  T* room = (T*)(total + size);
  memset(total, 0, length * kLanes * sizeof(float));
  Columns<T> columns(room + 2 * kRun * a.width, a.width);
  const TileUse<T> use(a.width);
  for (long block = blocks * part / a.parts; block < blocks * (part + 1) / a.parts; block++) {
    const T* rows[kLanes];
    for (long c = 0; c < kLanes; c++) {
      const long column = block * kLanes + c, row = column / group, own = head * group + column % group;
      rows[c] = column < count ? (const T*)a.query + row * a.query_stride + own * a.width : nullptr;
    }
    columns.set(rows);
    add_block(a, head, block * kLanes, columns, room, logits, total);
  }
  float* out = a.output + (head * a.parts + part) * a.entries;
  if (a.greatest)
    for (long e = 0; e < length; e++) out[e] = max_lanes(load(total + e * kLanes));
  else
    sum_rows(total, length, out);
  for (long e = length; e < a.entries; e++) out[e] = 0.0f;
}

struct Moments {
  Pages keys;
  const int64_t* lengths;
  const float *mean, *covariance;  // [H, D] and [H, D, D], symmetric
  const float *cos, *sin;          // [half]
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

// k.(C k + b) of all entries for one query head. C is a sum of two bfloat16 matrices: 16 bits of each number.
void expect_head(const Moments& m, long head) {
  static thread_local KeptMemory memory;
  const long width = m.width, blocks = width / kLanes, block_bytes = Columns<bf16>::bytes(width);
  char* at = (char*)memory.get((width + 1) * width * sizeof(float) + 2 * width * width * sizeof(bf16) +
                               2 * blocks * block_bytes + 2 * kEntryBlock * kLanes * sizeof(float) +
                               kEntryBlock * width * sizeof(bf16));
  float *linear = (float*)at, *square = linear + width;
  bf16 *high = (bf16*)(square + width * width), *low = high + width * width;
  char* packed = (char*)(low + width * width);
  float *sums = (float*)(packed + 2 * blocks * block_bytes), *total = sums + kEntryBlock * kLanes;
  bf16* room = (bf16*)(total + kEntryBlock * kLanes);
  expect_form(m, head, linear, square);
  for (long i = 0; i < width * width; i += kLanes) {
    const Vec v = load(square + i);
    store(high + i, v);
    store(low + i, v - load(high + i));
  }
  const TileUse<bf16> use(width);
  for (long i = 0; i < 2 * blocks; i++) {
    const bf16* rows[kLanes];
    for (long c = 0; c < kLanes; c++) rows[c] = (i % 2 ? low : high) + (i / 2 * kLanes + c) * width;
    Columns<bf16>(packed + i * block_bytes, width).set(rows);
  }
  const long kv_head = head / (m.heads / m.kv_heads), length = m.lengths[kv_head];
  const Entries<bf16> keys(m.keys, kv_head, length, width);
  const bf16* runs[kEntryBlock / kRun];
  for (long first = 0; first < length; first += kEntryBlock) {
    const long count = length - first < kEntryBlock ? length - first : kEntryBlock, pieces = whole_runs(count) / kRun;
    for (long r = 0; r < pieces; r++) runs[r] = keys.run(first + r * kRun, room + r * kRun * width);
    memset(total, 0, pieces * kRun * kLanes * sizeof(float));
    for (long block = 0; block < blocks; block++) {
      const long needed = whole_inputs((block + 1) * kLanes), inputs = needed < width ? needed : width;
      const Columns<bf16> top(packed + 2 * block * block_bytes, width);
      const Columns<bf16> rest(packed + (2 * block + 1) * block_bytes, width);
      const Vec b = load(linear + block * kLanes);
      for (long r = 0; r < pieces; r += 2) {
        const bf16 *one = runs[r], *other = r + 1 < pieces ? runs[r + 1] : one;
        top.multiply(one, other, inputs, sums, false);
        rest.multiply(one, other, inputs, sums, true);
        const long rows = r + 1 < pieces ? 2 * kRun : kRun;
        for (long i = 0; i < rows; i++) {
          const Vec k = load((i < kRun ? one : other - kRun * width) + i * width + block * kLanes);
          float* to = total + (r * kRun + i) * kLanes;
          store(to, load(to) + (load(sums + i * kLanes) + b) * k);
        }
      }
    }
    sum_rows(total, count, m.output + head * m.entries + first);
  }
}

}  // namespace
}  // namespace quire

using quire::bf16;

// output [K, parts, E]: probability that the columns (rows x group) of a part give each entry, added up or the greatest.
extern "C" void quire_attention_columns(const void* query, const quire::Pages* keys, const int32_t* positions,
                                        const int32_t* query_positions, const int64_t* lengths, const float* sinks,
                                        float* output, long query_stride, long position_stride, long rows, long heads,
                                        long kv_heads, long entries, long width, long parts, float scale,
                                        float softcap, int greatest, int is_bf16, int threads) {
  const quire::Attention a{query,  *keys,        positions,       query_positions, lengths, sinks,
                           output, query_stride, position_stride, rows,            heads,   kv_heads,
                           entries, width,       parts,           scale,           softcap, greatest};
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic, 1)
  for (long head = 0; head < kv_heads; head++)
    for (long part = 0; part < parts; part++)
      is_bf16 ? quire::attend_part<bf16>(a, head, part) : quire::attend_part<float>(a, head, part);
}

// output [H, E] = s Rm.k + s^2 / 2 k.(R C R^T) k for keys in bfloat16, D a multiple of 32; R turns by cos, sin [half].
extern "C" void quire_expected_logits(const quire::Pages* keys, const int64_t* lengths, const float* mean,
                                      const float* covariance, const float* cos, const float* sin, float* output,
                                      long half, long heads, long kv_heads, long entries, long width, float scale,
                                      int threads) {
  const quire::Moments m{*keys, lengths, mean, covariance, cos, sin, output, half, heads, kv_heads, entries, width,
                         scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long head = 0; head < heads; head++) quire::expect_head(m, head);
}

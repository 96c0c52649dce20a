// Logits after temperature, top-k, top-p and min-p, as distributions.py says.
//
// No row is sorted whole. What can be kept at all is known before: a top-k row keeps the best k, and a token that a
// top-p row keeps has more than (1 - p) / V of the mass, for all that have less come to less than 1 - p together. Those
// few are ordered piece by piece from the best on, until the cut is reached.
#include "cpu_distributions.h"

#include "cpu_rows.h"

#include <functional>

namespace quire {
namespace {

constexpr long kPiece = 128;        // candidates ordered first; four times as many each next time
constexpr float kBoundMargin = 0.5f;  // the bound on the mass of a token is lowered by more than sums are rounded

// Orders as the float does, ties by the lower token first.
inline uint64_t key_of(float value, uint32_t token) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)ordered << 32 | (uint32_t)~token;
}
inline uint32_t token_of(uint64_t key) { return ~(uint32_t)key; }

// Keys of the tokens at or above `bound`.
void collect(const float* x, long width, float bound, std::vector<uint64_t>& keys) {
  keys.clear();
  each_vector(x, width, [&](long first, Vec v, int count) {
    if (!any(v >= bound)) return;
    for (int i = 0; i < count; i++)
      if (v[i] >= bound) keys.push_back(key_of(v[i], first + i));
  });
}

// Keys of the k best tokens, in any order: the floor rises whenever twice as many have come together.
void collect_best(const float* x, long width, long k, std::vector<uint64_t>& keys) {
  keys.clear();
  const size_t most = std::max<long>(2 * k, 64);
  float bound = -INFINITY;
  auto keep_best = [&] {
    if ((long)keys.size() <= k) return;
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<uint64_t>());
    bound = x[token_of(keys[k - 1])];
    keys.resize(k);
  };
  each_vector(x, width, [&](long first, Vec v, int count) {
    if (!any(v >= bound)) return;
    for (int i = 0; i < count; i++)
      if (v[i] >= bound) keys.push_back(key_of(v[i], first + i));
    if (keys.size() >= most) keep_best();
  });
  keep_best();
}

// Keeps what the cuts keep of the scaled row, sets the rest to -inf.
void cut_row(float* x, long width, const Cuts& cuts, CutBuffers& buffers) {
  auto& [keys, values] = buffers;
  const bool limited = cuts.top_k > 0, nucleus = cuts.top_p < 1;
  double goal = INFINITY;
  if (limited) {
    collect_best(x, width, std::min(cuts.top_k, width), keys);
    if (nucleus) {
      // Added up from the best on, whatever order they were found in.
      std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
      values.clear();
      for (uint64_t key : keys) values.push_back(x[token_of(key)]);
      goal = cuts.top_p * mass_of(values.data(), values.size());
    }
  } else {
    const double total = mass_of(x, width);
    goal = cuts.top_p * total;
    const double least = std::max(0.0, 1.0 - (double)cuts.top_p) * total / width * kBoundMargin;
    collect(x, width, std::min(0.0f, std::max(cuts.floor, logf(least))), keys);
  }
  values.clear();
  double reached = 0;
  size_t kept = 0, ordered = 0, piece = kPiece;
  for (; kept < keys.size() && (kept == 0 || reached < goal); kept++) {
    if (kept == ordered) {
      ordered = std::min(keys.size(), ordered + piece);
      if (ordered < keys.size())
        std::nth_element(keys.begin() + kept, keys.begin() + ordered, keys.end(), std::greater<uint64_t>());
      std::sort(keys.begin() + kept, keys.begin() + ordered, std::greater<uint64_t>());
      piece *= 4;
    }
    const float value = x[token_of(keys[kept])];
    if (kept && value < cuts.floor) break;
    values.push_back(value);
    if (nucleus) reached += exp(broadcast(value))[0];
  }
  std::fill(x, x + width, -INFINITY);
  for (size_t i = 0; i < kept; i++) x[token_of(keys[i])] = values[i];
}

// (x - top) / temperature; adding zero makes one of the two zeros, which would be ranked apart.
void scale_row(const float* x, float top, float* y, long width, float temperature) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) store(y + i, (load(x + i) - top) / temperature + 0.0f);
  for (; i < width; i++) y[i] = (x[i] - top) / temperature + 0.0f;
}

}  // namespace

void shape_row(const float* x, float* y, long width, const Cuts& cuts, CutBuffers& buffers) {
  const float top = largest(x, width);
  if (!isfinite(top)) {  // no distribution: nobody looks at what is drawn
    std::fill(y, y + width, top - top);
    return;
  }
  scale_row(x, top, y, width, cuts.temperature);
  if (cuts.top_k > 0 || cuts.top_p < 1) return cut_row(y, width, cuts, buffers);
  if (cuts.floor > -INFINITY)
    for (long i = 0; i < width; i++) y[i] = y[i] < cuts.floor ? -INFINITY : y[i];
}

}  // namespace quire

// y [rows, width]: scaled logits of x [rows, width], rows x_stride elements apart; the cuts are [rows] each.
extern "C" void quire_shape_rows(const float* x, float* y, const float* temperature, const int64_t* top_k,
                                 const float* top_p, const float* floor, long x_stride, long rows, long width,
                                 int threads) {
#pragma omp parallel num_threads(rows < threads ? rows : threads)
  {
    quire::CutBuffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (long row = 0; row < rows; row++) {
      const quire::Cuts cuts{temperature[row], top_p[row], floor[row], (long)top_k[row]};
      quire::shape_row(x + row * x_stride, y + row * width, width, cuts, buffers);
    }
  }
}

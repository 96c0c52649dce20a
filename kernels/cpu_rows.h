// One pass over a row of logits, and what is found in it: for the choice of tokens.
#pragma once
#include "cpu_noise.h"

#include <math.h>

#include <algorithm>

namespace quire {

// Whether a lane is true.
inline bool any(IntVec lanes) {
#if defined(QUIRE_AVX512)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; i++) found |= lanes[i];
  return found;
#endif
}

// Calls visit(first, v, count) for the row in vectors; lanes behind the last are -inf.
template <class Visit>
inline void each_vector(const float* x, long width, Visit visit) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) visit(i, load(x + i), kLanes);
  if (i < width) {
    float padded[kLanes];
    std::fill(padded, padded + kLanes, -INFINITY);
    memcpy(padded, x + i, (width - i) * sizeof(float));
    visit(i, load(padded), (int)(width - i));
  }
}

// The largest number; NaN if there is one.
inline float largest(const float* x, long width) {
  Vec top = broadcast(-INFINITY), nan = {};
  each_vector(x, width, [&](long, Vec v, int) { top = v > top ? v : top, nan = v != v ? v : nan; });
  return max_lanes(nan != nan ? nan : top);
}

// The largest number and its first place; NaN and 0 if there is one. Finding a maximum is one pass over memory: the
// block that holds it is searched again in L1.
inline float likeliest(const float* x, long width, int64_t* index) {
  constexpr long kSearched = 2048;  // logits of a block: 8 KiB
  float best = -INFINITY;
  long place = 0;
  for (long start = 0; start < width; start += kSearched) {
    const float here = largest(x + start, std::min(kSearched, width - start));
    if (here != here) {
      *index = 0;
      return here;
    }
    if (here > best) best = here, place = start;
  }
  while (x[place] != best) place++;
  *index = place;
  return best;
}

// Sum of e^x.
inline double mass_of(const float* x, long width) {
  double total = 0;
  // Sums of a few hundred float32 each: what they lack in precision is far less than a token's mass.
  for (long start = 0; start < width; start += 512) {
    Vec sum = {};
    each_vector(x + start, std::min<long>(512, width - start), [&](long, Vec v, int) {
      if (any(v > -INFINITY)) sum += exp(v);
    });
    total += sum_lanes(sum);
  }
  return total;
}

// The token whose logit and noise add up to most, the first among equals; 0 if nothing can be drawn.
inline int64_t draw_row(const float* x, long width, NoiseKey key) {
  Vec best = broadcast(-INFINITY);
  IntVec where = {};
  each_vector(x, width, [&](long first, Vec v, int) {
    if (!any(v > -INFINITY)) return;
    const Vec noisy = v + gumbel_lanes(key, first);
    const IntVec better = noisy > best;
    best = better ? noisy : best;
    where = better ? broadcast_int(first) : where;
  });
  int64_t token = 0;
  float top = -INFINITY;
  for (int i = 0; i < kLanes; i++)
    if (best[i] > top || (best[i] == top && top > -INFINITY && where[i] + i < token)) top = best[i], token = where[i] + i;
  return token;
}

}  // namespace quire

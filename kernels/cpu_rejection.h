// The rule for a draft token that was drawn from a distribution: see rejection.py.
#pragma once
#include <stdint.h>

namespace quire {

// What keys the noise that decides, and that by which a replacement is drawn.
struct Noises {
  int64_t seed, decide, replace;
};

// Whether the draft is accepted; the token is that, or what replaces it. p, q [width]: the target's and the draft's
// scaled logits.
bool judge_row(const float* p, const float* q, long width, int64_t draft, const Noises& noises, int64_t* token);

}  // namespace quire

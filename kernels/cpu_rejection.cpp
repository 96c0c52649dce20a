// Draft tokens accepted or replaced, one row after the other as far as a run of them goes on: see rejection.py.
#include "cpu_rejection.h"

#include "cpu_rows.h"

#include <vector>

namespace quire {
namespace {

// Mass of the row and of one of its tokens; 0 where it is no distribution.
inline double share(const float* x, long width, int64_t token) {
  const double total = mass_of(x, width);
  return total > 0 ? exp(broadcast(x[token]))[0] / total : 0;
}

inline bool accepts(const float* p, const float* q, long width, int64_t draft, NoiseKey key) {
  const double drafted = share(q, width, draft);
  return drafted > 0 && uniform_lanes(key, 0)[0] * drafted < share(p, width, draft);
}

// A token of norm(max(p - q, 0)), of p where nothing is left of that.
int64_t draw_residual(const float* p, const float* q, long width, NoiseKey key) {
  const float of_p = 1 / (float)mass_of(p, width), q_mass = mass_of(q, width);
  const float of_q = q_mass > 0 ? 1 / q_mass : 0;
  std::vector<float> residual((width + kLanes - 1) / kLanes * kLanes, -INFINITY);
  bool left = false;
  each_vector(p, width, [&](long first, Vec v, int count) {
    if (!any(v > -INFINITY)) return;
    Vec w = count == kLanes ? load(q + first) : load_some(q + first, count);
    const Vec rest = exp(v) * of_p - (of_q > 0 ? exp(w) * of_q : Vec{});
    const IntVec some = rest > 0x1p-126f;
    left |= any(some);
    store(residual.data() + first, some ? log(some ? rest : broadcast(1.0f)) : broadcast(-INFINITY));
  });
  return draw_row(left ? residual.data() : p, width, key);
}

}  // namespace

bool judge_row(const float* p, const float* q, long width, int64_t draft, const Noises& noises, int64_t* token) {
  const bool accepted = accepts(p, q, width, draft, NoiseKey(noises.seed, noises.decide));
  *token = accepted ? draft : draw_residual(p, q, width, NoiseKey(noises.seed, noises.replace));
  return accepted;
}

}  // namespace quire

// tokens [rows]: see judge_drafts in rejection.py. p, q [rows, width], contiguous; uniforms come from (seed, decide) and
// replacements from (seed, replace).
extern "C" void quire_judge_rows(const float* p, const float* q, const int64_t* drafts, const int64_t* heads,
                                 const int64_t* seeds, const int64_t* decide, const int64_t* replace, int64_t* tokens,
                                 long rows, long width, int threads) {
#pragma omp parallel for num_threads(rows < threads ? rows : threads) schedule(dynamic, 1)
  for (long head = 0; head < rows; head++) {
    if (heads[head] != head) continue;
    bool open = true;  // no rejection yet in the run
    for (long row = head; row < rows && heads[row] == head; row++) {
      tokens[row] = -1;
      if (!open) continue;
      const quire::Noises noises{seeds[row], decide[row], replace[row]};
      open = quire::judge_row(p + row * width, q + row * width, width, drafts[row], noises, tokens + row);
    }
  }
}

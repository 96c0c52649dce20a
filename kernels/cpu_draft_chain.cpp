// A small model continues its own greedy tokens in one call: embedding, layers, norm, head and choice, once per depth.
// The functions are those of a step called from Python, so the tokens are the same; Python's share of such a pass would
// be half as long as its arithmetic.
#include "cpu_kernels.h"

#include <memory>

namespace quire {
namespace {

struct DraftChain {
  int64_t* tokens;         // [k, S]; the first row is given, the others are drawn
  const int64_t* active;   // [k]: sequences that go on at each depth, always the first ones
  const void* embedding;   // [V, E]
  const void* norm;        // [E]
  const void* head;        // [V, E]
  const void *cos, *sin;   // [positions, half]
  float* logits;           // [S, V]
  long depth, sequences, vocab;
};

// Row i of `to` is row rows[i] of `from`; `bytes` a row.
void gather(const void* from, const int64_t* rows, long count, long bytes, void* to) {
  for (long i = 0; i < count; i++) memcpy((char*)to + i * bytes, (const char*)from + rows[i] * bytes, bytes);
}

// Every sequence has one entry more in every head, and its next row stands one further.
void advance(const DecoderStep& s, const Args& a, long layers, long count) {
  for (long i = 0; i < count; i++) {
    ((int64_t*)a.positions)[i]++;
    for (long layer = 0; layer < layers; layer++)
      for (long k = 0; k < a.kv_heads; k++) ((int32_t*)a.kept)[i * a.kept_sequence + layer * s.kept_layer + k]++;
  }
}

}  // namespace
}  // namespace quire

// `step` and `attention` are those of a first pass of one row per sequence, but for cos and sin, which are found here;
// positions and kept lengths are counted up. A row that is not finite goes on with token 0.
extern "C" void quire_draft_chain(const quire::DecoderLayer* layers, long count, const quire::DecoderStep* step,
                                  const quire::Args* attention, const quire::DraftChain* chain) {
  quire::DecoderStep s = *step;
  quire::Args a = *attention;
  const long item = s.is_bf16 ? 2 : 4, row_bytes = s.hidden * item, half_bytes = s.half * item;
  std::unique_ptr<char[]> angles(new char[2 * chain->sequences * half_bytes]);
  std::unique_ptr<float[]> values(new float[chain->sequences]);
  s.cos = angles.get(), s.sin = angles.get() + chain->sequences * half_bytes;
  for (long level = 1; level < chain->depth; level++) {
    const long rows = chain->active[level];
    int64_t* drawn = chain->tokens + level * chain->sequences;
    s.rows = a.sequences = rows;
    quire::gather(chain->embedding, drawn - chain->sequences, rows, row_bytes, s.x);
    quire::gather(chain->cos, a.positions, rows, half_bytes, (void*)s.cos);
    quire::gather(chain->sin, a.positions, rows, half_bytes, (void*)s.sin);
    quire_decoder(layers, count, &s, &a);
    quire_rms_norm(s.x, chain->norm, s.normed, s.hidden, rows, s.hidden, s.epsilon, s.is_bf16, s.threads);
    quire_linear(s.normed, chain->head, nullptr, nullptr, chain->logits, s.hidden, 0, chain->vocab, rows, s.hidden,
                 chain->vocab, s.is_bf16, false, true, s.threads);
    quire_row_maxima(chain->logits, values.get(), drawn, chain->vocab, rows, chain->vocab, s.threads);
    quire::advance(s, a, count, rows);
  }
}

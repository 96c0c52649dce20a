// A small model continues its own tokens in one call: embedding, layers, norm, head and choice, once per depth. The
// functions are those of a step called from Python, so the tokens are the same, greedy or drawn; Python's share of such
// a pass would be as long as its arithmetic.
#include "cpu_distributions.h"
#include "cpu_kernels.h"
#include "cpu_rows.h"

#include <memory>

namespace quire {
namespace {

struct DraftChain {
  int64_t* tokens;         // [k, S]
  const int64_t* active;   // [k]: sequences that go on at each depth, always the first ones
  const void* embedding;   // [V, E]
  const void* norm;        // [E]
  const void* head;        // [V, E]
  const void *cos, *sin;   // [positions, half]
  float* first;            // [S, V]: logits of the first tokens; overwritten, as the next
  float* logits;           // [S, V]
  const float* temperature;                   // [S]; 0: the likeliest token, and nothing of the rest matters
  const float *top_p, *floor;                 // [S]; floor: logarithm of min-p
  const int64_t *top_k, *seeds;               // [S]
  const int64_t *positions, *places;          // [k, S]: what keys the noise; the row of `scaled` drawn from, or -1
  float* scaled;                              // [Q, V]: rows that are kept
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

// The token of sequence i from its logits [V], which may be overwritten.
int64_t draw(const DraftChain& c, float* logits, long level, long i, CutBuffers& buffers) {
  if (c.temperature[i] == 0) {
    int64_t token;
    likeliest(logits, c.vocab, &token);
    return token;
  }
  const long at = level * c.sequences + i;
  float* scaled = c.places[at] < 0 ? logits : c.scaled + c.places[at] * c.vocab;
  shape_row(logits, scaled, c.vocab, {c.temperature[i], c.top_p[i], c.floor[i], (long)c.top_k[i]}, buffers);
  return draw_row(scaled, c.vocab, NoiseKey(c.seeds[i], c.positions[at]));
}

void draw_level(const DraftChain& c, float* logits, long level, int threads) {
  const long rows = c.active[level];
#pragma omp parallel num_threads(rows < threads ? rows : threads)
  {
    CutBuffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < rows; i++)
      c.tokens[level * c.sequences + i] = draw(c, logits + i * c.vocab, level, i, buffers);
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
  s.cos = angles.get(), s.sin = angles.get() + chain->sequences * half_bytes;
  quire::draw_level(*chain, chain->first, 0, s.threads);
  for (long level = 1; level < chain->depth; level++) {
    const long rows = s.rows = a.sequences = chain->active[level];
    quire::gather(chain->embedding, chain->tokens + (level - 1) * chain->sequences, rows, row_bytes, s.x);
    quire::gather(chain->cos, a.positions, rows, half_bytes, (void*)s.cos);
    quire::gather(chain->sin, a.positions, rows, half_bytes, (void*)s.sin);
    quire_decoder(layers, count, &s, &a);
    quire_rms_norm(s.x, chain->norm, s.normed, s.hidden, rows, s.hidden, s.epsilon, s.is_bf16, s.threads);
    quire_linear(s.normed, chain->head, nullptr, nullptr, chain->logits, s.hidden, 0, chain->vocab, rows, s.hidden,
                 chain->vocab, s.is_bf16, false, true, s.threads);
    quire::draw_level(*chain, chain->logits, level, s.threads);
    quire::advance(s, a, count, rows);
  }
}

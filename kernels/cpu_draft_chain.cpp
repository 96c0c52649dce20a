// A small model continues its own tokens in one call: embedding, layers, norm, head and choice, once per depth. The
// functions are those of a step called from Python, so the tokens are the same, greedy or drawn; Python's share of such
// a pass would be as long as its arithmetic.
#include "cpu_distributions.h"
#include "cpu_kernels.h"
#include "cpu_rows.h"

namespace quire {
namespace {

struct DraftChain {
  int64_t* tokens;         // [k, S]
  const int64_t* active;   // [k]: sequences that go on at each depth, always the first ones
  float* first;            // [S, V]: logits of the first tokens; overwritten
  const float* temperature;                   // [S]; 0: the likeliest token, and nothing of the rest matters
  const float *top_p, *floor;                 // [S]; floor: logarithm of min-p
  const int64_t *top_k, *seeds;               // [S]
  const int64_t *positions, *places;          // [k, S]: what keys the noise; the row of `scaled` drawn from, or -1
  float* scaled;                              // [Q, V]: rows that are kept
  long depth, sequences;
};

// Every sequence has one entry more in every head, and its next row stands one further.
void advance(const DecoderStep& s, const Args& a, long layers, long count) {
  for (long i = 0; i < count; i++) {
    ((int64_t*)a.positions)[i]++;
    for (long layer = 0; layer < layers; layer++)
      for (long k = 0; k < a.kv_heads; k++) ((int32_t*)a.kept)[i * a.kept_sequence + layer * s.kept_layer + k]++;
  }
}

// The token of sequence i from its logits [V], which may be overwritten.
int64_t draw(const DraftChain& c, float* logits, long vocab, long level, long i, CutBuffers& buffers) {
  if (c.temperature[i] == 0) {
    int64_t token;
    likeliest(logits, vocab, &token);
    return token;
  }
  const long at = level * c.sequences + i;
  float* scaled = c.places[at] < 0 ? logits : c.scaled + c.places[at] * vocab;
  shape_row(logits, scaled, vocab, {c.temperature[i], c.top_p[i], c.floor[i], (long)c.top_k[i]}, buffers);
  return draw_row(scaled, vocab, NoiseKey(c.seeds[i], c.positions[at]));
}

void draw_level(const DraftChain& c, float* logits, long vocab, long level, int threads) {
  const long rows = c.active[level];
#pragma omp parallel num_threads(rows < threads ? rows : threads)
  {
    CutBuffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (long i = 0; i < rows; i++)
      c.tokens[level * c.sequences + i] = draw(c, logits + i * vocab, vocab, level, i, buffers);
  }
}

}  // namespace
}  // namespace quire

// `step` and `attention` are those of a first pass of one row per sequence, all of which give logits; rows are turned to
// their positions, which are counted up, as are kept lengths. A row that is not finite goes on with token 0.
extern "C" void quire_draft_chain(const quire::Decoder* decoder, const quire::DecoderStep* step,
                                  const quire::Args* attention, const quire::DraftChain* chain) {
  quire::DecoderStep s = *step;
  quire::Args a = *attention;
  s.angle_rows = a.positions;
  quire::draw_level(*chain, chain->first, decoder->vocab, 0, s.threads);
  for (long level = 1; level < chain->depth; level++) {
    s.rows = s.wanted = a.sequences = chain->active[level];
    s.ids = chain->tokens + (level - 1) * chain->sequences;
    quire_forward(decoder, &s, &a);
    quire::draw_level(*chain, s.logits, decoder->vocab, level, s.threads);
    quire::advance(s, a, decoder->count, s.rows);
  }
}

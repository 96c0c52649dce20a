// The forward pass of a step in one call, from token ids to logits: the same functions, in the same order and with the
// same results as called one by one from Python, whose share of a small model's step would be as long as that of the
// arithmetic.
#include "cpu_kernels.h"

namespace quire {
namespace {

constexpr long kSerialBytes = 1 << 15;  // below, waking the other threads costs more than it saves

// Row i of `to` is row rows[i] of `from`; `bytes` a row.
void gather(const void* from, const int64_t* rows, long count, long bytes, void* to, int threads) {
#pragma omp parallel for num_threads(count* bytes < kSerialBytes ? 1 : threads)
  for (long i = 0; i < count; i++) memcpy((char*)to + i * bytes, (const char*)from + rows[i] * bytes, bytes);
}

void run_layer(const Decoder& d, const DecoderLayer& layer, const DecoderStep& s, const Args& a) {
  const long heads_width = (a.heads + 2 * a.kv_heads) * a.width, mixed_width = a.heads * a.width;
  auto norm = [&](const void* weight) {
    quire_rms_norm(s.x, weight, s.normed, d.hidden, s.rows, d.hidden, d.epsilon, d.is_bf16, s.threads);
  };
  auto multiply = [&](const Matrix& m, const void* x, long in, void* y, long out, const void* residual, bool gated) {
    quire_linear(x, m.weight, m.bias, residual, y, in, out, out, s.rows, in, out, d.is_bf16, gated, false, s.threads);
  };
  norm(layer.attention_norm);
  multiply(layer.qkv, s.normed, d.hidden, s.heads, heads_width, nullptr, false);
  quire_rotate(s.heads, s.cos, s.sin, layer.head_norm, heads_width, s.rows, a.heads + a.kv_heads, a.width, s.half,
               d.epsilon, d.is_bf16, s.threads);
  quire_attention(&a, true, true, d.is_bf16, s.threads);
  // A result is stored after its own residual was read, so the residual stream is updated in place.
  multiply(layer.output, a.output, mixed_width, s.x, d.hidden, s.x, false);
  norm(layer.mlp_norm);
  multiply(layer.gate_up, s.normed, d.hidden, s.gated, d.feed_forward, nullptr, true);
  multiply(layer.down, s.gated, d.feed_forward, s.x, d.hidden, s.x, false);
}

// Final norm and output head of the rows that are wanted.
void write_logits(const Decoder& d, const DecoderStep& s) {
  const void* x = s.x;
  if (s.logit_rows) {
    gather(s.x, s.logit_rows, s.wanted, d.hidden * (d.is_bf16 ? 2 : 4), s.normed, s.threads);
    x = s.normed;
  }
  quire_rms_norm(x, d.norm, s.normed, d.hidden, s.wanted, d.hidden, d.epsilon, d.is_bf16, s.threads);
  quire_linear(s.normed, d.head, nullptr, nullptr, s.logits, d.hidden, 0, d.vocab, s.wanted, d.hidden, d.vocab,
               d.is_bf16, false, true, s.threads);
}

}  // namespace
}  // namespace quire

// `attention` describes the first layer: queries, keys and values lie in step->heads; page_table and kept move on.
// Returns whether all ids are tokens; if not, nothing is done.
extern "C" int quire_forward(const quire::Decoder* decoder, const quire::DecoderStep* step,
                             const quire::Args* attention) {
  const quire::Decoder& d = *decoder;
  quire::DecoderStep s = *step;
  quire::Args args = *attention;
  const long item = d.is_bf16 ? 2 : 4, turn = s.half * item;
  for (long i = 0; i < s.rows; i++)
    if (s.ids[i] < 0 || s.ids[i] >= d.vocab) return false;
  quire::gather(d.embedding, s.ids, s.rows, d.hidden * item, s.x, s.threads);
  if (s.angle_rows) {
    char* const sines = (char*)s.turns + s.rows * turn;
    quire::gather(s.cos, s.angle_rows, s.rows, turn, s.turns, s.threads);
    quire::gather(s.sin, s.angle_rows, s.rows, turn, sines, s.threads);
    s.cos = s.turns, s.sin = sines;
  }
  for (long i = 0; i < d.count; i++) {
    args.window = d.layers[i].window;
    quire::run_layer(d, d.layers[i], s, args);
    args.page_table += s.table_layer;
    args.kept += s.kept_layer;
  }
  quire::write_logits(d, s);
  return true;
}

// All decoder layers of a step in one call: the same functions, in the same order and with the same results as called
// one by one from Python, whose share of a small model's step would be as long as that of the arithmetic.
#include "cpu_kernels.h"

namespace quire {
namespace {

void run_layer(const DecoderLayer& layer, const DecoderStep& s, const Args& a) {
  const long heads_width = (a.heads + 2 * a.kv_heads) * a.width, mixed_width = a.heads * a.width;
  auto multiply = [&](const Matrix& m, const void* x, long in, void* y, long out, const void* residual, bool gated) {
    quire_linear(x, m.weight, m.bias, residual, y, in, out, out, s.rows, in, out, s.is_bf16, gated, false, s.threads);
  };
  quire_rms_norm(s.x, layer.attention_norm, s.normed, s.hidden, s.rows, s.hidden, s.epsilon, s.is_bf16, s.threads);
  multiply(layer.qkv, s.normed, s.hidden, s.heads, heads_width, nullptr, false);
  quire_rotate(s.heads, s.cos, s.sin, layer.head_norm, heads_width, s.rows, a.heads + a.kv_heads, a.width, s.half,
               s.epsilon, s.is_bf16, s.threads);
  quire_attention(&a, true, true, s.is_bf16, s.threads);
  // A result is stored after its own residual was read, so the residual stream is updated in place.
  multiply(layer.output, a.output, mixed_width, s.x, s.hidden, s.x, false);
  quire_rms_norm(s.x, layer.mlp_norm, s.normed, s.hidden, s.rows, s.hidden, s.epsilon, s.is_bf16, s.threads);
  multiply(layer.gate_up, s.normed, s.hidden, s.gated, s.feed_forward, nullptr, true);
  multiply(layer.down, s.gated, s.feed_forward, s.x, s.hidden, s.x, false);
}

}  // namespace
}  // namespace quire

// `attention` describes the first layer: queries, keys and values lie in step->heads; page_table and kept move on.
extern "C" void quire_decoder(const quire::DecoderLayer* layers, long count, const quire::DecoderStep* step,
                              const quire::Args* attention) {
  quire::Args args = *attention;
  for (long i = 0; i < count; i++) {
    args.window = layers[i].window;
    quire::run_layer(layers[i], *step, args);
    args.page_table += step->table_layer;
    args.kept += step->kept_layer;
  }
}

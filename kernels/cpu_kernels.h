// The functions that the library exports and also calls itself; what they do stands at their bodies.
#pragma once
#include "cpu_attention.h"

namespace quire {

struct Matrix {
  const void *weight, *bias;  // [out, in]; [out] or null
};

struct DecoderLayer {
  const void *attention_norm, *mlp_norm;  // [E]
  const void* head_norm;                  // [H + K, D] or null
  Matrix qkv, output, gate_up, down;
  long window;  // 0: none
};

struct Decoder {
  const DecoderLayer* layers;
  const void *embedding, *norm, *head;  // [V, E], [E], [V, E]
  long count, hidden, feed_forward, vocab;
  float epsilon;
  int is_bf16;
};

// One step. The buffers between its parts are the caller's.
struct DecoderStep {
  const int64_t* ids;                        // [T]
  const void *cos, *sin;                     // [.., half]
  const int64_t *angle_rows, *logit_rows;    // [T]: which of them; [R]; null: row i is i's
  float* logits;                             // [R, V]
  void *x, *heads, *gated, *turns;           // [T, E], [T, (H + 2 K) * D], [T, F], [2, T, half]
  void* normed;                              // [max(T, R), E]
  long rows, wanted, half;                   // T, R
  long table_layer, kept_layer;              // strides of the page table and of the kept lengths
  int threads;
};

}  // namespace quire

extern "C" {

void quire_linear(const void* x, const void* weight, const void* bias, const void* residual, void* y, long x_stride,
                  long residual_stride, long y_stride, long rows, long in, long out, int is_bf16, int gated, int wide,
                  int threads);

void quire_rms_norm(const void* x, const void* weight, void* y, long x_stride, long rows, long width, float epsilon,
                    int is_bf16, int threads);

void quire_rotate(void* heads, const void* cos, const void* sin, const void* weight, long row_stride, long rows,
                  long num_heads, long width, long half, float epsilon, int is_bf16, int threads);

void quire_attention(const quire::Args* args, int do_append, int do_attend, int is_bf16, int threads);

int quire_forward(const quire::Decoder* decoder, const quire::DecoderStep* step, const quire::Args* attention);
}

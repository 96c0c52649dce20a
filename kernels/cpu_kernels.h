// The functions that the library exports and that cpu_decoder.cpp calls as well; what they do stands at their bodies.
#pragma once
#include "cpu_attention.h"

extern "C" {

void quire_linear(const void* x, const void* weight, const void* bias, const void* residual, void* y, long x_stride,
                  long residual_stride, long y_stride, long rows, long in, long out, int is_bf16, int gated, int wide,
                  int threads);

void quire_rms_norm(const void* x, const void* weight, void* y, long x_stride, long rows, long width, float epsilon,
                    int is_bf16, int threads);

void quire_rotate(void* heads, const void* cos, const void* sin, const void* weight, long row_stride, long rows,
                  long num_heads, long width, long half, float epsilon, int is_bf16, int threads);

void quire_attention(const quire::Args* args, int do_append, int do_attend, int is_bf16, int threads);
}

// The noise of noise.py, bit for bit up to the logarithms: a function of (seed, position, token) alone.
#pragma once
#include "cpu.h"

namespace quire {

inline uint64_t mix64(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// What all tokens of a row share.
struct NoiseKey {
  uint32_t low, high;
  NoiseKey(int64_t seed, int64_t position) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    const uint64_t key = mix64(mix64((uint64_t)seed + golden) + (uint64_t)position * golden);
    low = (uint32_t)key, high = (uint32_t)(key >> 32);
  }
};

// Of the tokens token .. token + kLanes - 1: (31 bits + 1/2) / 2^31, below one.
inline Vec uniform_lanes(NoiseKey key, uint32_t token) {
  BitVec bits;
  for (int i = 0; i < kLanes; i++) bits[i] = i;
  bits = (bits + token) * 0x9E3779B9u + key.low;
  bits = (bits ^ bits >> 16) * 0x85EBCA6Bu ^ key.high;
  bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
  bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
  bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
  bits ^= bits >> 16;
  const Vec u = (__builtin_convertvector((IntVec)(bits & 0x7fffffffu), Vec) + 0.5f) * 0x1p-31f;
  const Vec largest = broadcast(0x1.fffffep-1f);
  return u < largest ? u : largest;
}

// ln(x) to about 1e-7 relative for finite x > 0 that are not denormal (Cephes logf).
inline Vec log(Vec x) {
  const BitVec bits = (BitVec)x;
  IntVec exponent = (IntVec)(bits >> 23) - 126;
  Vec m = (Vec)((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  const IntVec small = m < 0.707106781186547524f;
  exponent += small;  // all ones is -1
  m = (small ? m + m : m) - 1.0f;
  Vec p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec e = __builtin_convertvector(exponent, Vec), square = m * m;
  const Vec tail = p * square * m + e * -2.12194440e-4f - 0.5f * square;
  return m + tail + e * 0.693359375f;
}

// ln(1 + y) for -1 < y <= 0, to about 1e-7 relative at small y too: what 1 + y rounds away is put back (Kahan).
inline Vec log1p(Vec y) {
  const Vec x = 1.0f + y, seen = x - 1.0f;
  return seen == 0.0f ? y : log(x) * (y / seen);
}

// Standard Gumbel noise: -log(-log(1 - u)).
inline Vec gumbel_lanes(NoiseKey key, uint32_t token) { return -log(-log1p(-uniform_lanes(key, token))); }

}  // namespace quire

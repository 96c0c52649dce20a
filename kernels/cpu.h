// What the CPU kernels share: vectors of float32, loads and stores of float32 and bfloat16, exp, and the dot-product
// tile that both the linear layers and the attention scores are made of.
//
// Only compiler vector extensions are used, so any GCC or Clang target works; AVX2, AVX-512 and AVX512-BF16 have faster
// versions of a few functions. Arithmetic is float32 throughout. Every result is a fixed function of its own row: no
// sum's order depends on how many rows, sequences or threads there are.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QUIRE_AVX512 1
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

template <class V, class P>
inline V read(const P* source) {
  V v;
  memcpy(&v, source, sizeof v);
  return v;
}

inline Vec broadcast(float x) { return x - Vec{}; }
inline IntVec broadcast_int(int32_t x) { return x - IntVec{}; }

// All ones in lane i if bit i is set, else zeros.
inline IntVec lane_bits(uint32_t bits) {
  BitVec single;
  for (int i = 0; i < kLanes; i++) single[i] = 1u << i;
  return (single & bits) != 0;
}

inline Vec load(const float* p) { return read<Vec>(p); }
inline Vec load(const bf16* p) {
#if defined(QUIRE_AVX512)  // one instruction; the portable form becomes four
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16);
#else
  return (Vec)(__builtin_convertvector(read<HalfVec>(p), BitVec) << 16);
#endif
}

// The first `count` < kLanes elements, then zeros; touches nothing behind them.
template <class T>
inline Vec load_some(const T* p, int count) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

// Bits of v rounded to bfloat16, ties to even, in the upper halves of the lanes.
inline BitVec bf16_bits(Vec v) {
  BitVec bits = (BitVec)v;
  BitVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  IntVec is_nan = v != v;
  return is_nan ? (bits | 0x400000) : rounded;  // rounding could carry a NaN over into a number
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec v) {
#if defined(QUIRE_AVX512) && defined(__AVX512BF16__)
  __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
  HalfVec halves = __builtin_convertvector(bf16_bits(v) >> 16, HalfVec);
#endif
  memcpy(p, &halves, sizeof halves);
}

template <class T>
inline void store_some(T* p, Vec v, int count) {
  T padded[kLanes];
  store(padded, v);
  memcpy(p, padded, count * sizeof(T));
}

// v as it would be read back after a store as T: where the library's modelling code rounds, so do we.
template <class T>
inline Vec rounded(Vec v);
template <>
inline Vec rounded<float>(Vec v) {
  return v;
}
template <>
inline Vec rounded<bf16>(Vec v) {
#if defined(QUIRE_AVX512) && defined(__AVX512BF16__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
#else
  return (Vec)(bf16_bits(v) & 0xffff0000u);
#endif
}

// Lanes are folded in halves: few steps that wait for each other.
inline float sum_lanes(Vec v) {
#if defined(QUIRE_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// The largest lane; NaN if there is one.
inline float max_lanes(Vec v) {
#if defined(QUIRE_AVX512)
  const bool nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return nan ? __builtin_nanf("") : _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top || v[i] != v[i] ? v[i] : top;
  return top;
#endif
}

// a > b ? a : b, so b beside a NaN.
inline Vec max(Vec a, Vec b) {
#if defined(QUIRE_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline int32_t min_lane(IntVec v) {
#if defined(QUIRE_AVX512)
  return _mm512_reduce_min_epi32((__m512i)v);
#else
  int32_t least = v[0];
  for (int i = 1; i < kLanes; i++) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

inline int32_t max_lane(IntVec v) { return ~min_lane(~v); }

// e^r for |r| <= ln(2) / 2: Taylor to degree 7 with minimax corrections (Cephes expf).
inline Vec exp_polynomial(Vec r) {
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p;
}

// e^x to about 1e-7 relative; 0 below -87.3 (also for -inf), infinity above 88.3, NaN stays NaN.
inline Vec exp(Vec x) {
  const float low = -87.33f, high = 88.37f;
#if defined(QUIRE_AVX512)  // half the instructions: rounding and scaling by powers of two have their own
  const __mmask16 vanishing = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(low), _CMP_LT_OQ);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(2 * high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
  const __m512 n =
      _mm512_roundscale_ps((__m512)((Vec)bounded * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec whole = (Vec)n;
  const Vec r = (Vec)bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
  return (Vec)_mm512_mask_scalef_ps(_mm512_setzero_ps(), (__mmask16)~vanishing, (__m512)exp_polynomial(r), n);
#else
  IntVec vanishes = x < low, overflows = x > high;
  x = vanishes ? broadcast(low) : x;
  x = overflows ? broadcast(high) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const Vec p = exp_polynomial(r);
  Vec power = (Vec)(((IntVec)shifted - 0x4b400000 + 127) << 23);
  return vanishes ? Vec{} : overflows ? broadcast(__builtin_inff()) : p * power;
#endif
}

// e^x for x <= 0, as weights of a softmax are: with two thirds of the instructions of `exp`, to 1e-6 relative. 0 below -87.3
// (also for -inf), NaN stays NaN.
inline Vec exp_weight(Vec x) {
#if defined(QUIRE_AVX512)
  const __m512 base = _mm512_set1_ps(1.44269504088896341f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps((__m512)x, base), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = (Vec)_mm512_fmsub_ps((__m512)x, base, n);
  Vec p = broadcast(1.32646318525e-3f);  // 2^f for |f| <= 1/2: 1e-7 off at most, exact at 0
  p = p * f + 9.67148691416e-3f;
  p = p * f + 5.55073358119e-2f;
  p = p * f + 2.40222424269e-1f;
  p = p * f + 6.93147003651e-1f;
  p = p * f + 1.0f;
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(some, (__m512)p, n);
#else
  return exp(x);
#endif
}

inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

// How two rows of T are multiplied: `step` elements at a time, into kLanes partial sums.
template <class T>
struct Dot {
  typedef Vec Raw;
  static constexpr int step = kLanes;
  static Raw fetch(const T* p) { return load(p); }
  static Vec add(Vec sum, Raw a, Raw b) { return sum + a * b; }
};
#if defined(QUIRE_AVX512) && defined(__AVX512BF16__)
template <>
struct Dot<bf16> {  // two products per lane; each is exact in float32
  typedef __m512bh Raw;
  static constexpr int step = 2 * kLanes;
  static Raw fetch(const bf16* p) { return read<Raw>(p); }
  static Vec add(Vec sum, Raw a, Raw b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

template <class T>
inline typename Dot<T>::Raw fetch_some(const T* p, int count) {
  T padded[Dot<T>::step] = {};
  memcpy(padded, p, count * sizeof(T));
  return Dot<T>::fetch(padded);
}

// Lane i of the result is the sum of the lanes of sums[i]. A tree of shuffles and additions: 45 instructions for 16
// sums where 16 separate sums take 120. All sums are added up in the same order.
inline Vec transpose_sum(const Vec* sums) {
#if defined(QUIRE_AVX512)
  __m512 quarter[4];
  for (int i = 0; i < 4; i++) {
    auto fold = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    __m512 low = fold((__m512)sums[i], (__m512)sums[4 + i]), high = fold((__m512)sums[8 + i], (__m512)sums[12 + i]);
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  auto pair = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  __m512d first = (__m512d)pair(quarter[0], quarter[1]), second = (__m512d)pair(quarter[2], quarter[3]);
  return (Vec)_mm512_add_ps((__m512)_mm512_unpacklo_pd(first, second), (__m512)_mm512_unpackhi_pd(first, second));
#elif defined(__AVX2__)
  __m256 half[4];
  for (int i = 0; i < 4; i++) {
    __m256 a = (__m256)sums[i], b = (__m256)sums[4 + i];
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  auto pair = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  __m256d first = (__m256d)pair(half[0], half[1]), second = (__m256d)pair(half[2], half[3]);
  return (Vec)_mm256_add_ps((__m256)_mm256_unpacklo_pd(first, second), (__m256)_mm256_unpackhi_pd(first, second));
#else
  Vec result;
  for (int i = 0; i < kLanes; i++) {
    Vec s = sums[i];
    result[i] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
  return result;
#endif
}

// Ask for the cache lines of [p, p + bytes), or some of them, without waiting; harmless outside of what is mapped.
inline void prefetch(const void* p, long bytes, long every = 64) {
  for (long i = 0; i < bytes; i += every) __builtin_prefetch((const char*)p + i, 0, 2);
}

// Memory that is kept for the next call of this thread, because fresh memory costs a page fault per 4 KiB.
class KeptMemory {
 public:
  ~KeptMemory() { free(memory_); }
  void* get(size_t wanted) {
    if (size_ < wanted) {
      free(memory_);
      size_ = (wanted + wanted / 2 + 63) / 64 * 64;
      memory_ = aligned_alloc(64, size_);
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Most rows of a tile: 4 x 4 dot products with 16 lanes (24 of 32 registers), 2 x 4 with 8.
constexpr int kTileRows = kLanes / 4;

// Dot products of ROWS rows with kLanes / ROWS columns, all of `length` elements: lane r * COLUMNS + c of the result.
template <class T, int ROWS>
inline Vec dot_tile(const T* const* rows, const T* const* columns, long length) {
  constexpr int COLUMNS = kLanes / ROWS;
  typedef typename Dot<T>::Raw Raw;
  Vec sums[kLanes] = {};
  const long whole = length - length % Dot<T>::step;
  for (long i = 0; i < whole; i += Dot<T>::step) {
    Raw a[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) a[r] = Dot<T>::fetch(rows[r] + i);
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; c++) {
      Raw b = Dot<T>::fetch(columns[c] + i);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) sums[r * COLUMNS + c] = Dot<T>::add(sums[r * COLUMNS + c], a[r], b);
    }
  }
  if (whole < length) {
    for (int c = 0; c < COLUMNS; c++) {
      Raw b = fetch_some(columns[c] + whole, length - whole);
      for (int r = 0; r < ROWS; r++) {
        Raw a = fetch_some(rows[r] + whole, length - whole);
        sums[r * COLUMNS + c] = Dot<T>::add(sums[r * COLUMNS + c], a, b);
      }
    }
  }
  return transpose_sum(sums);
}

}  // namespace quire

// The tile registers of recent Xeons (AMX): eight matrices of up to 16 rows of 64 bytes, and products of two of them in
// bfloat16 with sums in float32, each sum in a fixed order of its own. Left operand: rows of 32 numbers as they lie in
// memory. Right operand: rows of 16 pairs, so that two consecutive numbers of a column lie together.
#pragma once
#include "cpu.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(QUIRE_AVX512) && defined(__AVX512BF16__)
#define QUIRE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace quire {

constexpr long kTile = 16;        // rows of a tile, and columns of sums
constexpr long kTileInputs = 32;  // numbers that are multiplied and added up by one instruction

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int row_count, int bytes) { rows[tile] = row_count, column_bytes[tile] = bytes; }
  void use() const {
    asm volatile("" ::"r"(this) : "memory");  // older compilers do not know that the next line reads all of it
    _tile_loadconfig(this);
  }
};

// The kernel hands out the tile registers on demand, once per process (torch asks as well).
inline bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// In each quarter of 128 bits, rows and columns of 4 x 4 words of 32 bits change places.
inline void transpose_lanes(__m512i* v) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
}

// Rows and columns of 16 x 16 words of 32 bits change places.
inline void transpose_words(__m512i* v) {
  __m512i t[16];
  memcpy(t, v, sizeof t);
  for (int i = 0; i < 16; i += 4) transpose_lanes(t + i);
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace quire
#endif

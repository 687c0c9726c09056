// The 16x16x16 product of a warp in each architecture's fragments: weights are A (16 outputs by 16 inputs), activations
// B (16 inputs by 16 tokens), sums C (16 outputs by 16 tokens, float32).
#pragma once
#include "platform.h"

namespace kt {

// LANES of a warp; LANES that hold different weights; values of A, of B and of C a lane; output rows of A a lane
#if defined(KT_NV)
constexpr int LANES = 32, STORED = 32, EA = 8, EB = 8, EC = 8, ROWS = 2;
KT_DEVICE int a_row(int lane, int which) { return lane / 4 + 8 * which; }
KT_DEVICE int pair_row(int pair) { return pair & 1; }
KT_DEVICE int c_row(int lane, int i) { return lane / 4 + 8 * ((i >> 1) & 1); }
KT_DEVICE int c_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + 8 * (i >> 2); }
#else
#if defined(KT_MFMA)
constexpr int LANES = 64, STORED = 64, EA = 4, EB = 4, EC = 4, ROWS = 1;
KT_DEVICE int c_row(int lane, int i) { return lane / 16 * 4 + i; }
#elif defined(KT_WMMA12)
constexpr int LANES = 32, STORED = 32, EA = 8, EB = 8, EC = 8, ROWS = 1;
KT_DEVICE int c_row(int lane, int i) { return lane / 16 * 8 + i; }
#else
constexpr int LANES = 32, STORED = 16, EA = 16, EB = 16, EC = 8, ROWS = 1;  // both halves of a wave hold the same A and B
KT_DEVICE int c_row(int lane, int i) { return i * 2 + lane / 16; }
#endif
KT_DEVICE int a_row(int lane, int) { return lane & 15; }
KT_DEVICE int pair_row(int) { return 0; }
KT_DEVICE int c_col(int lane, int) { return lane & 15; }
#endif

// where 16 bytes (8 inputs) of a token lie in a tile of 128 inputs: swizzled, so that 8 tokens meet different banks
KT_DEVICE int x_chunk(int token, int chunk) { return token * 256 + ((chunk ^ (token & 7)) << 4); }

#if defined(KT_EMULATE)
template <typename T>
inline float value_of(uint32_t bits);
template <>
inline float value_of<Half>(uint32_t bits) { return from_half(bits); }
template <>
inline float value_of<BFloat>(uint32_t bits) { return from_bf16(bits); }

// inputs of element i of a lane's A and B, from the ISA documents
inline void a_place(int lane, int i, int& row, int& k) {
#if defined(KT_NV)
  row = (lane >> 2) + ((i / 2) % 2 ? 8 : 0);
  k = (lane % 4) * 2 + (i & 1) + (i >= 4 ? 8 : 0);
#else
  row = lane % 16;
  k = EA == 16 ? i : (lane / 16) * EA + i;
#endif
}
inline void b_place(int lane, int i, int& k, int& col) {
#if defined(KT_NV)
  col = (lane >> 2) + (i >= 4 ? 8 : 0);  // two products of 8 columns
  k = (lane % 4) * 2 + (i & 1) + (i % 4 >= 2 ? 8 : 0);
#else
  col = lane % 16;
  k = EB == 16 ? i : (lane / 16) * EB + i;
#endif
}
template <typename T>
inline void mma(const uint32_t* a, const uint32_t* b, float* c) {
  Warp& w = warp();
  int lane = thread() % LANES, row, col, k;
  for (int i = 0; i < EA; ++i) {
    a_place(lane, i, row, k);
    w.a[row][k] = value_of<T>((a[i / 2] >> (16 * (i & 1))) & 0xffff);
  }
  for (int i = 0; i < EB; ++i) {
    b_place(lane, i, k, col);
    w.b[k][col] = value_of<T>((b[i / 2] >> (16 * (i & 1))) & 0xffff);
  }
  sync_warp();
  for (int i = 0; i < EC; ++i)
    for (int j = 0; j < 16; ++j) c[i] += w.a[c_row(lane, i)][j] * w.b[j][c_col(lane, i)];
  sync_warp();
}
#endif

#if defined(KT_NV)
// four 8x8 matrices; lanes 8m to 8m+7 name the rows of matrix m
KT_DEVICE void ldmatrix4(uint32_t* out, const void* row) {
#if defined(KT_EMULATE)
  Warp& w = warp();
  int lane = thread() % LANES;
  w.rows[lane] = row;
  sync_warp();
  for (int m = 0; m < 4; ++m) memcpy(out + m, static_cast<const char*>(w.rows[m * 8 + lane / 4]) + lane % 4 * 4, 4);
  sync_warp();
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#endif
}
KT_DEVICE void load_b(uint32_t* b, const char* x, int first_token, int step, int lane) {
  int token = first_token + (lane & 7) + (lane >> 4) * 8;
  ldmatrix4(b, x + x_chunk(token, step * 2 + ((lane >> 3) & 1)));
}
#if !defined(KT_EMULATE)
template <typename T>
KT_DEVICE void mma(const uint32_t* a, const uint32_t* b, float* c) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    float* d = c + t * 4;
#define KT_MMA(TYPE)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                             \
               ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"                                         \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[t * 2]), "r"(b[t * 2 + 1]))
    if constexpr (sizeof(T) && __is_same(T, Half)) KT_MMA("f16");
    else KT_MMA("bf16");
#undef KT_MMA
  }
}
#endif
#else
KT_DEVICE void load_b(uint32_t* b, const char* x, int first_token, int step, int lane) {
  int token = first_token + (lane & 15);
  constexpr int BYTES = EB * 2;
  int start = EB == 16 ? 0 : lane / 16 * BYTES;  // bytes into the step's 32
#pragma unroll
  for (int i = 0; i < (BYTES + 15) / 16; ++i) {
    int at = start + i * 16;
    memcpy(b + i * 4, x + x_chunk(token, step * 2 + at / 16) + at % 16, BYTES < 16 ? BYTES : 16);
  }
}
#if !defined(KT_EMULATE)
template <typename V>
KT_DEVICE V fragment(const uint32_t* words) {
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}
template <typename T>
KT_DEVICE void mma(const uint32_t* a, const uint32_t* b, float* c) {
  constexpr bool HALF = __is_same(T, Half);
  typedef _Float16 H __attribute__((ext_vector_type(EA)));
  typedef short S __attribute__((ext_vector_type(EA)));
  typedef float F __attribute__((ext_vector_type(EC)));
  F d;
  memcpy(&d, c, sizeof(F));
#if defined(KT_MFMA) && defined(__HIP_DEVICE_COMPILE__)
  if constexpr (HALF) d = __builtin_amdgcn_mfma_f32_16x16x16f16(fragment<H>(a), fragment<H>(b), d, 0, 0, 0);
  else d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(fragment<S>(a), fragment<S>(b), d, 0, 0, 0);
#elif defined(KT_WMMA12) && defined(__HIP_DEVICE_COMPILE__)
  if constexpr (HALF) d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(fragment<H>(a), fragment<H>(b), d);
  else d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(fragment<S>(a), fragment<S>(b), d);
#elif defined(__HIP_DEVICE_COMPILE__)
  if constexpr (HALF) d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(fragment<H>(a), fragment<H>(b), d);
  else d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(fragment<S>(a), fragment<S>(b), d);
#endif
  memcpy(c, &d, sizeof(F));
}
#endif
#endif

}  // namespace kt

// Who of a warp holds what in the 16x16x16 product of each architecture: activations are A (16 rows by 16 of K), weights B
// (16 of K by 16 columns), sums C. From the PTX ISA ("Matrix Fragments for mma.m16n8k16"; two of them side by side here)
// and AMD's ISA documents (V_MFMA_F32_16X16X16 of CDNA2 and 3, V_WMMA_F32_16X16X16 of RDNA3 and 4).
//
// The build names one: KT_NV from sm_80; KT_MFMA on gfx9 from gfx90a, waves of 64; KT_WMMA11 on gfx11 and KT_WMMA12 on
// gfx12, waves of 32. The host's pass and the device's must agree on sizes, so no macro of a compiler decides.
#pragma once
#include "device.h"

namespace kt {

// kLanes of a warp, of which kStored hold different weights; 32-bit words of A and of B a lane, two values each; sums a
// lane; kOwn columns that they lie in; sums of a product with ones that are worth keeping; warps a block; stages of copies.
#if defined(KT_NV)
constexpr int kLanes = 32, kStored = 32, kA = 4, kB = 4, kC = 8, kOwn = 4, kOnes = 4, kWarps = 8, kStages = 4;
#elif defined(KT_MFMA)
constexpr int kLanes = 64, kStored = 64, kA = 2, kB = 2, kC = 4, kOwn = 1, kOnes = 4, kWarps = 4, kStages = 2;
#elif defined(KT_WMMA11)
constexpr int kLanes = 32, kStored = 16, kA = 8, kB = 8, kC = 8, kOwn = 1, kOnes = 8, kWarps = 4, kStages = 2;
#elif defined(KT_WMMA12)
constexpr int kLanes = 32, kStored = 32, kA = 4, kB = 4, kC = 8, kOwn = 1, kOnes = 8, kWarps = 4, kStages = 2;
#else
#error "define KT_NV, KT_MFMA, KT_WMMA11 or KT_WMMA12"
#endif

// Row of sum i; which of a lane's own columns it is in; column of each of those, of 16.
#if defined(KT_NV)
KT_DEVICE int sum_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
KT_DEVICE int own_of(int i) { return i % 2 + i / 4 * 2; }
KT_DEVICE int own_column(int lane, int own) { return lane % 4 * 2 + own % 2 + own / 2 * 8; }
#else
KT_DEVICE int sum_row(int lane, int i) {
#if defined(KT_WMMA11)
  return i * 2 + lane / 16;
#else
  return lane / 16 * kC + i;
#endif
}
KT_DEVICE int own_of(int) { return 0; }
KT_DEVICE int own_column(int lane, int) { return lane % 16; }
#endif

// 16 bytes (8 of K) of a row of x lie here in 16 rows of 32 bytes: halves of every other four rows change places, so that
// eight rows of a half lie in eight different banks.
KT_DEVICE int place_of_x(int row, int half) { return row * 32 + (half ^ ((row >> 2) & 1)) * 16; }

#if defined(KT_NV)
KT_DEVICE void load_x(uint32_t (&a)[kA], const uint8_t* x, int lane) {
  load_matrix(a, x + place_of_x(lane % 16, lane / 16));
}
#else
KT_DEVICE void load_x(uint32_t (&a)[kA], const uint8_t* x, int lane) {
  constexpr int kBytes = kA * 4, kPiece = kBytes < 16 ? kBytes : 16;
  int start = kBytes == 32 ? 0 : lane / 16 * kBytes;
#pragma unroll
  for (int i = 0; i < kBytes / kPiece; i++) {
    int at = start + i * kPiece;
    __builtin_memcpy(a + i * 4, __builtin_assume_aligned(x + place_of_x(lane % 16, at / 16) + at % 16, kPiece), kPiece);
  }
}
#endif

#if defined(KT_EMULATE)
// K and row of value e of a lane's A, K and column of value e of its B.
inline void place_of_a(int lane, int e, int& row, int& k) {
#if defined(KT_NV)
  row = lane / 4 + e / 2 % 2 * 8, k = lane % 4 * 2 + e % 2 + e / 4 * 8;
#else
  row = lane % 16, k = kA == 8 ? e : lane / 16 * kA * 2 + e;
#endif
}
inline void place_of_b(int lane, int e, int& k, int& column) {
#if defined(KT_NV)
  column = lane / 4 + e / 4 * 8, k = lane % 4 * 2 + e % 2 + e / 2 % 2 * 8;
#else
  column = lane % 16, k = kB == 8 ? e : lane / 16 * kB * 2 + e;
#endif
}

template <class T>
void mma(float* c, const uint32_t* a, const uint32_t* b, int sums = kC) {
  emulated::together({c, a, b, nullptr, nullptr}, [sums](emulated::Warp& w) {
    auto get = [](const uint32_t* words, int e) { return to_float<T>(static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2))); };
    float left[16][16], right[16][16];
    int row, column, k;
    for (int lane = 0; lane < kLanes; lane++) {
      for (int e = 0; e < 2 * kA; e++) place_of_a(lane, e, row, k), left[row][k] = get(w.lanes[lane].a, e);
      for (int e = 0; e < 2 * kB; e++) place_of_b(lane, e, k, column), right[k][column] = get(w.lanes[lane].b, e);
    }
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < sums; i++) {
        row = sum_row(lane, i), column = own_column(lane, own_of(i));
        for (k = 0; k < 16; k++) w.lanes[lane].c[i] += left[row][k] * right[k][column];
      }
  });
}
template <class T>
void mma_ones(float (&c)[kOnes], const uint32_t (&a)[kA], uint32_t ones) {
  uint32_t b[kB];
  for (uint32_t& word : b) word = ones;
  mma<T>(c, a, b, kOnes);
}

#elif defined(KT_NV)
template <class T>
KT_DEVICE void mma_8(float* c, const uint32_t (&a)[kA], uint32_t b0, uint32_t b1) {
#define KT_MMA(TYPE)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
               "{%0,%1,%2,%3};"                                                                                    \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (T::kHalf) KT_MMA("f16");
  else KT_MMA("bf16");
#undef KT_MMA
}
template <class T>
KT_DEVICE void mma(float (&c)[kC], const uint32_t (&a)[kA], const uint32_t (&b)[kB]) {
  mma_8<T>(c, a, b[0], b[1]);
  mma_8<T>(c + 4, a, b[2], b[3]);
}
template <class T>
KT_DEVICE void mma_ones(float (&c)[kOnes], const uint32_t (&a)[kA], uint32_t ones) {
  mma_8<T>(c, a, ones, ones);
}

#else
template <class V>
KT_DEVICE V fragment(const uint32_t* words) {
  V value;
  __builtin_memcpy(&value, words, sizeof(V));
  return value;
}
template <class T>
KT_DEVICE void mma(float (&c)[kC], const uint32_t (&a)[kA], const uint32_t (&b)[kB]) {
#if defined(__HIP_DEVICE_COMPILE__)
  using Half = _Float16 __attribute__((ext_vector_type(kA * 2)));
  using Short = short __attribute__((ext_vector_type(kA * 2)));  // how these instructions take bfloat16
  using Sums = float __attribute__((ext_vector_type(kC)));
  Sums d;
  __builtin_memcpy(&d, c, sizeof(d));
#if defined(KT_MFMA)
  if constexpr (T::kHalf) d = __builtin_amdgcn_mfma_f32_16x16x16f16(fragment<Half>(a), fragment<Half>(b), d, 0, 0, 0);
  else d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(fragment<Short>(a), fragment<Short>(b), d, 0, 0, 0);
#elif defined(KT_WMMA12)
  if constexpr (T::kHalf) d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(fragment<Half>(a), fragment<Half>(b), d);
  else d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(fragment<Short>(a), fragment<Short>(b), d);
#else
  if constexpr (T::kHalf) d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(fragment<Half>(a), fragment<Half>(b), d);
  else d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(fragment<Short>(a), fragment<Short>(b), d);
#endif
  __builtin_memcpy(c, &d, sizeof(d));
#endif
}
template <class T>
KT_DEVICE void mma_ones(float (&c)[kOnes], const uint32_t (&a)[kA], uint32_t ones) {
  uint32_t b[kB];
  for (uint32_t& word : b) word = ones;
  mma<T>(c, a, b);
}
#endif

}  // namespace kt

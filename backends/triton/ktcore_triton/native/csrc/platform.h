// One kernel source for nvcc, for clang's HIP and for g++ (host emulation): what differs between the three.
// KT_NV: mma.sync, warps of 32. KT_MFMA: gfx9, waves of 64. KT_WMMA11, KT_WMMA12: gfx11 and gfx12, waves of 32.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(KT_EMULATE)  // the build names the flavour with -DKT_NV=1 or another of the four
#include "emulate.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#if defined(__gfx90a__) || defined(__gfx942__)
#define KT_MFMA 1
#elif defined(__GFX12__)
#define KT_WMMA12 1
#else  // the host pass sees no architecture: it only needs the types
#define KT_WMMA11 1
#endif
#define KT_DEVICE __device__ __forceinline__
#define KT_KERNEL __global__
using kt_stream = hipStream_t;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define KT_NV 1
#define KT_DEVICE __device__ __forceinline__
#define KT_KERNEL __global__
using kt_stream = cudaStream_t;
#endif

namespace kt {

struct Half {};  // IEEE binary16
struct BFloat {};

#if !defined(KT_EMULATE)
KT_DEVICE int thread() { return threadIdx.x; }
KT_DEVICE int block_x() { return blockIdx.x; }
KT_DEVICE int block_y() { return blockIdx.y; }
KT_DEVICE int blocks_x() { return gridDim.x; }
KT_DEVICE void sync() { __syncthreads(); }
KT_DEVICE void fence() { __threadfence(); }
KT_DEVICE unsigned add(unsigned* at) { return atomicAdd(at, 1u); }
KT_DEVICE char* shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#if defined(__HIP__)
// plain loads: the hardware's own overlap of several blocks has to hide their latency
KT_DEVICE void copy16(void* to, const void* from, bool real) {
  *static_cast<uint4*>(to) = real ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}
KT_DEVICE void commit() {}
template <int N>
KT_DEVICE void wait() {}
#else
KT_DEVICE void copy16(void* to, const void* from, bool real) {  // zeros where not real; `from` is not read then
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(to)),
               "l"(from), "r"(real ? 16 : 0)
               : "memory");
}
KT_DEVICE void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
KT_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
#endif
#endif

KT_DEVICE float from_bf16(uint32_t bits) {
  bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
KT_DEVICE uint32_t to_bf16(float value) {  // to nearest even; no NaN comes here
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// (c - z) * s + o of two values in 16 bits each
template <typename T>
KT_DEVICE uint32_t affine(uint32_t c, uint32_t z, uint32_t s, uint32_t o);

#if defined(KT_NV) && !defined(KT_EMULATE)
template <typename V>
KT_DEVICE V as(uint32_t bits) {
  V value;
  memcpy(&value, &bits, 4);
  return value;
}
template <typename V>
KT_DEVICE uint32_t bits_of(V value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
template <>
KT_DEVICE uint32_t affine<Half>(uint32_t c, uint32_t z, uint32_t s, uint32_t o) {
  return bits_of(__hfma2(__hsub2(as<__half2>(c), as<__half2>(z)), as<__half2>(s), as<__half2>(o)));
}
template <>
KT_DEVICE uint32_t affine<BFloat>(uint32_t c, uint32_t z, uint32_t s, uint32_t o) {
  using B = __nv_bfloat162;
  return bits_of(__hfma2(__hsub2(as<B>(c), as<B>(z)), as<B>(s), as<B>(o)));
}
#else
KT_DEVICE float from_half(uint32_t bits) {
  uint16_t low = uint16_t(bits);
  _Float16 value;
  memcpy(&value, &low, 2);
  return float(value);
}
KT_DEVICE uint32_t to_half(float value) {
  _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <>
KT_DEVICE uint32_t affine<Half>(uint32_t c, uint32_t z, uint32_t s, uint32_t o) {
  uint32_t low = to_half((from_half(c) - from_half(z)) * from_half(s) + from_half(o));
  return low | to_half((from_half(c >> 16) - from_half(z >> 16)) * from_half(s >> 16) + from_half(o >> 16)) << 16;
}
template <>
KT_DEVICE uint32_t affine<BFloat>(uint32_t c, uint32_t z, uint32_t s, uint32_t o) {
  uint32_t low = to_bf16((from_bf16(c & 0xffff) - from_bf16(z & 0xffff)) * from_bf16(s & 0xffff) + from_bf16(o & 0xffff));
  return low | to_bf16((from_bf16(c >> 16) - from_bf16(z >> 16)) * from_bf16(s >> 16) + from_bf16(o >> 16)) << 16;
}
#endif

// two unsigned codes (bits 0.. and 16..) as values plus BIAS, with the exponent trick where the mantissa has room
template <typename T, int BITS>
struct Decode {
  static constexpr uint32_t BIAS = 0x64006400u;  // 1024
  static KT_DEVICE uint32_t pair(uint32_t codes) { return codes | 0x64006400u; }
};
template <>
struct Decode<BFloat, 4> {
  static constexpr uint32_t BIAS = 0x43004300u;  // 128
  static KT_DEVICE uint32_t pair(uint32_t codes) { return codes | 0x43004300u; }
};
template <>
struct Decode<BFloat, 8> {  // 128 + code would need nine bits
  static constexpr uint32_t BIAS = 0;
  static KT_DEVICE uint32_t pair(uint32_t codes) {
    return to_bf16(float(codes & 0xffffu)) | to_bf16(float(codes >> 16)) << 16;
  }
};

}  // namespace kt

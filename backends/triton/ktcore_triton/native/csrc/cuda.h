// CUDA: asynchronous copies of sm_80 and later.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KT_DEVICE __device__ __forceinline__
#define KT_KERNEL __global__
#define KT_SHARED(name) extern __shared__ __align__(16) uint8_t name[]
#define KT_NV 1

namespace kt {

KT_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// 16 bytes from global to shared memory, zeros where `there` is false, nothing where they are another's. What the machine
// copies by itself needs no register in between: nothing is left to do at the end.
struct Held {};
KT_DEVICE void begin_copy(Held&, void* to, const void* from, bool there, bool mine) {
  if (!mine) return;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
KT_DEVICE void end_copy(const Held&, void*, bool, bool) {}
KT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
KT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
KT_DEVICE void sync_warp() { __syncwarp(); }

// Four 8x8 matrices of 16-bit values; lane l gives row l % 8 of matrix l / 8.
KT_DEVICE void load_matrix(uint32_t (&r)[4], const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at)));
}

// a - b of two pairs of 16-bit floats.
template <class T>
KT_DEVICE uint32_t subtract(uint32_t a, uint32_t b);
template <>
KT_DEVICE uint32_t subtract<Fp16>(uint32_t a, uint32_t b) {
  __half2 r = __hsub2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
  return reinterpret_cast<uint32_t&>(r);
}
template <>
KT_DEVICE uint32_t subtract<Bf16>(uint32_t a, uint32_t b) {
  __nv_bfloat162 r = __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<uint32_t&>(r);
}
KT_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
KT_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }

KT_DEVICE float read_fresh(const float* at) { return __ldcg(at); }

inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

template <class Kernel, class Argument>
int launch(Kernel kernel, Grid grid, int threads, int shared, void* stream, const Argument& argument) {
  if (shared > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared, static_cast<cudaStream_t>(stream)>>>(argument);
  return cudaGetLastError();
}

}  // namespace kt

// What a kernel needs of the machine: matrix products of a warp, copies to shared memory, launches. Two of them: CUDA,
// and the host, where threads of a block run as fibers (emulate.h) so that index arithmetic can be checked without one.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef KT_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KT_DEVICE __device__ __forceinline__
#define KT_KERNEL __global__
#define KT_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

namespace kt {

struct Fp16 {};
struct Bf16 {};
struct Grid {
  int x, y, z;
};

KT_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// 16 bytes from global to shared memory, zeros where `there` is false.
KT_DEVICE void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
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

template <class T>
KT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
KT_DEVICE void mma<Fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
KT_DEVICE void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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

// Whether this block is the last of `count` to come here; what the others wrote before is visible to it then.
KT_DEVICE bool last_to_arrive(int* counter, int count) {
  __shared__ int mine;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    mine = atomicAdd(counter, 1);
    if (mine == count - 1) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (mine != count - 1) return false;
  __threadfence();
  return true;
}
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
#endif

namespace kt {

// A 16-bit float whose last bits are an integer: 1024 + i in float16 for i < 1024, 128 + i in bfloat16 for i < 128.
template <class T>
struct Magic;
template <>
struct Magic<Fp16> {
  static constexpr uint32_t base = 0x6400, one = 0x3c00;
};
template <>
struct Magic<Bf16> {
  static constexpr uint32_t base = 0x4300, one = 0x3f80;
};

// The bits of a small integer, |value| <= 256, in bfloat16: exact.
KT_DEVICE uint32_t whole(int value) {
  float f = static_cast<float>(value);
#ifdef KT_EMULATE
  return std::bit_cast<uint32_t>(f) >> 16;
#else
  return __float_as_uint(f) >> 16;
#endif
}

template <class T>
KT_DEVICE uint32_t pair_of_ones() {
  return Magic<T>::one * 0x10001;
}

// Eight 4-bit codes less `zero`, exact, as the fragments of two subtiles.
template <class T>
KT_DEVICE void expand4(uint32_t word, int zero, uint32_t (&b)[2][2]) {
  const uint32_t magic = Magic<T>::base * 0x10001, take = (Magic<T>::base + static_cast<uint32_t>(zero)) * 0x10001;
#pragma unroll
  for (int i = 0; i < 4; i++) b[i / 2][i % 2] = subtract<T>((word >> 4 * i & 0x000f000f) | magic, take);
}

// Four 8-bit codes less `zero` (0 or 128 to 128), exact, as the fragment of one subtile.
template <class T>
KT_DEVICE void expand8(uint32_t word, int zero, uint32_t (&b)[1][2]);
template <>
KT_DEVICE void expand8<Fp16>(uint32_t word, int zero, uint32_t (&b)[1][2]) {
  const uint32_t magic = Magic<Fp16>::base * 0x10001, take = (Magic<Fp16>::base + static_cast<uint32_t>(zero)) * 0x10001;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t two = word >> 16 * i;
    b[0][i] = subtract<Fp16>((two & 0xff) | (two & 0xff00) << 8 | magic, take);
  }
}
template <>
KT_DEVICE void expand8<Bf16>(uint32_t word, int zero, uint32_t (&b)[1][2]) {
  // in two steps of 7 bits: 128 + low is exact, and so is each difference, as |code - zero| <= 256
  const uint32_t magic = Magic<Bf16>::base * 0x10001;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t two = word >> 16 * i, pair = (two & 0xff) | (two & 0xff00) << 8;
    uint32_t low = subtract<Bf16>((pair & 0x007f007f) | magic, magic);
    // bit 7 is 128 itself: taken from the zero point instead of added to the code
    uint32_t high = (pair >> 7 & 0x00010001) * 128u;
    int first = zero - static_cast<int>(high & 0xffff), second = zero - static_cast<int>(high >> 16);
    b[0][i] = subtract<Bf16>(low, whole(first) | whole(second) << 16);
  }
}

}  // namespace kt

// HIP: a copy passes through registers, asked for before a tile is multiplied and stored after it.
#pragma once
#include <hip/hip_runtime.h>

#define KT_DEVICE __device__ __forceinline__
#define KT_KERNEL __global__
#define KT_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

namespace kt {

// 16 bytes on their way to shared memory: zeros where `there` is false, nothing where they are another's. Asked for
// without a branch, since where paths meet the compiler would wait for the load.
struct Held {
  uint4 value;
};
KT_DEVICE void begin_copy(Held& held, void*, const void* from, bool, bool) {
  held.value = *static_cast<const uint4*>(from);
}
KT_DEVICE void end_copy(const Held& held, void* to, bool there, bool mine) {
  if (mine) *static_cast<uint4*>(to) = there ? held.value : uint4{0, 0, 0, 0};
}
KT_DEVICE void commit_copies() {}
template <int>
KT_DEVICE void wait_copies() {}

// Lanes of a wave run in step, and its accesses to shared memory in order: only the compiler must not move them.
KT_DEVICE void sync_warp() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}

// a - b of two pairs of 16-bit floats.
template <class T>
KT_DEVICE uint32_t subtract(uint32_t a, uint32_t b);
template <>
KT_DEVICE uint32_t subtract<Fp16>(uint32_t a, uint32_t b) {
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(Pair, a) - __builtin_bit_cast(Pair, b));
}
KT_DEVICE float half_to_float(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
KT_DEVICE uint32_t float_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// Comes after the fence of `last_to_arrive`, which drops what caches held.
KT_DEVICE float read_fresh(const float* at) { return *at; }

inline const char* error_text(int code) { return hipGetErrorString(static_cast<hipError_t>(code)); }

template <class Kernel, class Argument>
int launch(Kernel kernel, Grid grid, int threads, int shared, void* stream, const Argument& argument) {
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared, static_cast<hipStream_t>(stream)>>>(argument);
  return hipGetLastError();
}

}  // namespace kt

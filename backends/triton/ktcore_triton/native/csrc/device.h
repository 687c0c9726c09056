// What a kernel needs of the machine besides matrix products: copies to shared memory, barriers, launches. Three of them:
// CUDA, HIP (hip.h), and the host (emulate.h), where indices can be checked without a device.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kt {

struct Fp16 {
  static constexpr bool kHalf = true;
};
struct Bf16 {
  static constexpr bool kHalf = false;
};
struct Grid {
  int x, y, z;
};

}  // namespace kt

#if defined(KT_EMULATE)
#include "emulate.h"
#elif defined(__HIP__)
#include "hip.h"
#else
#include "cuda.h"
#endif

#if !defined(KT_EMULATE)
namespace kt {

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

}  // namespace kt
#endif

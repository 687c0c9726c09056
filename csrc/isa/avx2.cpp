// The kernels for AVX2, FMA and F16C. Only this unit is compiled with its instruction set's flags.
#include <immintrin.h>
#include "core/f16.h"
#include "core/kernels.h"
#include "core/raw_blocks.h"

#define AI inline __attribute__((always_inline))
#define UNR _Pragma("GCC unroll 16")

namespace ktcore {
namespace isa_avx2 {
// Up to so many tokens codes are unpacked in registers, beyond into L1: formats with one scale a block, K-quants.
constexpr int kGemvTokens = 4, kGemvTokensK = 4;
#include "kernels/vec_avx2.h"
#include "kernels/all.h"
}  // namespace isa_avx2

const Kernels& kernels_avx2() {
    static constexpr Kernels table = isa_avx2::make_table("avx2");
    return table;
}
}  // namespace ktcore

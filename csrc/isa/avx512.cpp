// The kernels for AVX-512 F, BW, DQ and VL without VNNI: Skylake to Cannon Lake servers. Only this unit is compiled with its instruction set's flags.
#include <immintrin.h>
#include "core/f16.h"
#include "core/kernels.h"
#include "core/raw_blocks.h"

#define AI inline __attribute__((always_inline))
#define UNR _Pragma("GCC unroll 16")

namespace ktcore {
namespace isa_avx512 {
// Up to so many tokens codes are unpacked in registers, beyond into L1: formats with one scale a block, K-quants.
constexpr int kGemvTokens = 12, kGemvTokensK = 4;
#include "kernels/vec_avx512.h"
#include "kernels/all.h"
}  // namespace isa_avx512

const Kernels& kernels_avx512() {
    static constexpr Kernels table = isa_avx512::make_table("avx512");
    return table;
}
}  // namespace ktcore

// The kernels for AVX-512 with VNNI, BF16, VBMI and GFNI: Zen 4 and 5, Sapphire Rapids.
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx512_bf16 {
#include "kernels/vec_avx512.h"
#include "kernels/all.h"
}  // namespace isa_avx512_bf16

const Kernels& kernels_avx512_bf16() {
    static constexpr Kernels table = isa_avx512_bf16::make_table("avx512_bf16");
    return table;
}
}  // namespace ktcore

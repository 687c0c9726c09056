// The kernels for AVX-512 F, BW, DQ and VL without VNNI: Skylake to Cannon Lake servers.
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx512 {
#include "kernels/vec_avx512.h"
#include "kernels/all.h"
}  // namespace isa_avx512

const Kernels& kernels_avx512() {
    static constexpr Kernels table = isa_avx512::make_table("avx512");
    return table;
}
}  // namespace ktcore

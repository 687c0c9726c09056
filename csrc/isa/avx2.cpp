// The kernels for AVX2, FMA and F16C.
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx2 {
#include "kernels/vec_avx2.h"
#include "kernels/all.h"
}  // namespace isa_avx2

const Kernels& kernels_avx2() {
    static constexpr Kernels table = isa_avx2::make_table("avx2");
    return table;
}
}  // namespace ktcore

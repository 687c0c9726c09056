// The kernels for AVX-512 with VNNI: Cascade Lake, Ice Lake.
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx512_vnni {
#include "kernels/vec_avx512.h"
#include "kernels/all.h"
}  // namespace isa_avx512_vnni

const Kernels& kernels_avx512_vnni() {
    static constexpr Kernels table = isa_avx512_vnni::make_table("avx512_vnni");
    return table;
}
}  // namespace ktcore

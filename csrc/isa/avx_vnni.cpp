// The integer products of AVX-VNNI (Alder Lake and later, Zen 5), 256 bits wide; all else as avx2.
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx_vnni {
#include "kernels/avx_vnni_all.h"
}  // namespace isa_avx_vnni

const Kernels& kernels_avx_vnni() { return isa_avx_vnni::kernels_named("avx_vnni"); }
}  // namespace ktcore

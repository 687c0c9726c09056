// The unit avx_vnni with its dot product put together from AVX2's instructions, for tests.
#define KTCORE_EMULATE_VNNI
#include "isa/unit.h"

namespace ktcore {
namespace isa_avx_vnni_emulated {
#include "kernels/avx_vnni_all.h"
}  // namespace isa_avx_vnni_emulated

const Kernels& kernels_avx_vnni_emulated() { return isa_avx_vnni_emulated::kernels_named("avx_vnni_emulated"); }
}  // namespace ktcore

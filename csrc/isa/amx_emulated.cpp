// The tile kernels over emulated tiles on AVX2, for tests: AMX runs the same code over other vectors.
#include "isa/unit.h"

namespace ktcore {
namespace isa_amx_emulated {
inline const Kernels& base() { return kernels_avx2(); }
#include "kernels/vec_avx2.h"
#include "kernels/amx_config.h"
#include "kernels/amx_emulated.h"
#include "kernels/amx_all.h"
}  // namespace isa_amx_emulated

const Kernels& kernels_amx_emulated() { return isa_amx_emulated::tiled_kernels("amx_emulated"); }
}  // namespace ktcore

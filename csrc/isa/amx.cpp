// The kernels for AMX (Sapphire Rapids and later): matrix products on tiles, all else as avx512_bf16.
#include "isa/unit.h"

namespace ktcore {
namespace isa_amx {
inline const Kernels& base() { return kernels_avx512_bf16(); }
#include "kernels/vec_avx512.h"
#include "kernels/amx_config.h"
#include "kernels/amx_hardware.h"
#include "kernels/amx_all.h"
}  // namespace isa_amx

const Kernels& kernels_amx() { return isa_amx::tiled_kernels("amx"); }
}  // namespace ktcore

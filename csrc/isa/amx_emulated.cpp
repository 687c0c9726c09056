// The tile kernels over emulated tiles on AVX2, for tests: AMX runs the same code over other vectors.
#include <immintrin.h>

#include "core/f16.h"
#include "core/kernels.h"
#include "core/raw_blocks.h"

#define AI inline __attribute__((always_inline))
#define UNR _Pragma("GCC unroll 16")

namespace ktcore {
namespace isa_amx_emulated {
constexpr int kGemvTokens = 4, kGemvTokensK = 4;  // unused: few tokens go to the base
inline const Kernels& base() { return kernels_avx2(); }
#include "kernels/vec_avx2.h"
// The order matters, as in kernels/all.h.
#include "kernels/unpack.h"
#include "kernels/tile.h"
#include "kernels/tile_f32.h"
#include "kernels/tile_bf16.h"
#include "kernels/amx_config.h"
#include "kernels/amx_emulated.h"
#include "kernels/amx_int8.h"
#include "kernels/amx_bf16.h"
#include "kernels/amx_table.h"
}  // namespace isa_amx_emulated

const Kernels& kernels_amx_emulated() { return isa_amx_emulated::tiled_kernels("amx_emulated"); }
}  // namespace ktcore

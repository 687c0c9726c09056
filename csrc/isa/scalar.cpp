// The definition, in plain C++ for any CPU. Only this unit is compiled with its instruction set's flags.
#include "core/f16.h"
#include "core/kernels.h"
#include "core/raw_blocks.h"

#define AI inline __attribute__((always_inline))
#define UNR  // unrolled, the emulated vectors take minutes to compile

namespace ktcore {
namespace isa_scalar {
// Up to so many tokens codes are unpacked in registers, beyond into L1: formats with one scale a block, K-quants.
constexpr int kGemvTokens = 4, kGemvTokensK = 4;
#include "kernels/vec_scalar.h"
#include "kernels/all.h"
}  // namespace isa_scalar

const Kernels& kernels_scalar() {
    static constexpr Kernels table = isa_scalar::make_table("scalar");
    return table;
}
}  // namespace ktcore

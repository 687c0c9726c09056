// The definition, in plain C++ for any CPU.
#define UNR  // unrolled, the emulated vectors take minutes to compile
#include "isa/unit.h"

namespace ktcore {
namespace isa_scalar {
#include "kernels/vec_scalar.h"
#include "kernels/all.h"
}  // namespace isa_scalar

const Kernels& kernels_scalar() {
    static constexpr Kernels table = isa_scalar::make_table("scalar");
    return table;
}
}  // namespace ktcore

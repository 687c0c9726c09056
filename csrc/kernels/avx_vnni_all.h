// What a unit with VEX-coded dot products of bytes instantiates: integer products; all else is the AVX2 unit's. Inside the
// unit's namespace; the order matters, as in kernels/all.h.
#include "kernels/vec_avx2.h"
#include "kernels/unpack.h"
#include "kernels/act_row.h"
#include "kernels/grids.h"
#include "kernels/ternary.h"
#include "kernels/tile.h"
#include "kernels/limits.h"
#include "kernels/table_int8.h"

// noinline: this unit's instructions stay inside its namespace.
__attribute__((noinline)) inline const Kernels& kernels_named(const char* name) {
    static const Kernels table = [name] {
        Kernels t = kernels_avx2();
        t.name = name;
        t.panel = run_panel;
        t.peak = peak_operations;
        return t;
    }();
    return table;
}

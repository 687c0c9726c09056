// What a unit with VEX-coded dot products of bytes instantiates: integer products; all else is the AVX2 unit's. Inside the
// unit's namespace; the order matters, as in kernels/all.h.
#include "kernels/vec_avx2.h"
#include "kernels/unpack.h"
#include "kernels/act_row.h"
#include "kernels/grids.h"
#include "kernels/ternary.h"
#include "kernels/tile.h"
#include "kernels/limits.h"

template <int F>
constexpr decltype(Kernels::panel) int8_of() {
    if constexpr (kFormats[F].kind != Kind::Float) return panel_int8<static_cast<Format>(F)>;
    return nullptr;
}
struct Products {
    decltype(Kernels::panel) of[kFormatCount];
};
template <int... F>
constexpr Products products(std::integer_sequence<int, F...>) {
    return {{int8_of<F>()...}};
}
constexpr Products kProducts = products(std::make_integer_sequence<int, kFormatCount>());

inline void run_panel(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch,
                      Reading how) {
    kProducts.of[static_cast<int>(w.format)](w, panel, a, t0, t1, acc, scratch, how);
}

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

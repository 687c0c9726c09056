// The integer products of all formats behind one function. Inside the unit's namespace.

// A row of the format table is all that a format needs to be here: null where it has no such kernel.
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

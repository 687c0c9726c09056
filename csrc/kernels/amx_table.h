// Another unit's table with its matrix products put on tiles. Inside the unit's namespace, which supplies base(), the
// table of the unit below.
constexpr int kFewTiled = 4;  // up to so many tokens the unpacked panel would be read too few times

template <int F>
constexpr decltype(Kernels::panel) tiled_int8_of() {
    if constexpr (kFormats[F].kind != Kind::Float) return tiled_int8<static_cast<Format>(F)>;
    return nullptr;
}
struct Tiled {
    decltype(Kernels::panel) int8[kFormatCount];
};
template <int... F>
constexpr Tiled tiled_tables(std::integer_sequence<int, F...>) {
    return {{tiled_int8_of<F>()...}};
}
constexpr Tiled kTiled = tiled_tables(std::make_integer_sequence<int, kFormatCount>());

inline void panel_tiled(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch,
                        Reading how) {
    if (t1 - t0 <= how.few) return base().panel(w, panel, a, t0, t1, acc, scratch, how);
    kTiled.int8[static_cast<int>(w.format)](w, panel, a, t0, t1, acc, scratch, how);
}

inline int few_tiled(Format f) { return info(f).kind == Kind::Float ? 0 : kFewTiled; }

inline void panel_mixed_tiled(const PackedView& w, int panel, const FloatRows& rows, int t0, int t1, float* acc,
                              uint8_t* scratch) {
    const auto kernel = w.format == Format::BF16          ? tiled_bf16<Format::BF16>
                        : w.format == Format::F8_E4M3_G128 ? tiled_bf16<Format::F8_E4M3_G128>
                        : w.format == Format::F8_E4M3_G32  ? tiled_bf16<Format::F8_E4M3_G32>
                                                           : base().panel_mixed;
    kernel(w, panel, rows, t0, t1, acc, scratch);
}

// As peak_operations in kernels/limits.h: tile products on four accumulators, which cover their latency.
inline int64_t peak_tiled(Arithmetic kind, int64_t rounds) {
    if (kind == Arithmetic::F32) return base().peak(kind, rounds);
    TileConfig config;
    for (int t = 0; t < 6; t++) config.set(t, 16, 64);
    Tiles tiles(config);
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>(), tiles.zero<4>(), tiles.zero<5>();
    if (kind == Arithmetic::Int8) {
        for (int64_t r = 0; r < rounds; r++)
            tiles.dot_su<0, 4, 5>(), tiles.dot_su<1, 4, 5>(), tiles.dot_su<2, 4, 5>(), tiles.dot_su<3, 4, 5>();
        return rounds * 4 * 16 * 16 * 64 * 2;
    }
    for (int64_t r = 0; r < rounds; r++)
        tiles.dot_bf<0, 4, 5>(), tiles.dot_bf<1, 4, 5>(), tiles.dot_bf<2, 4, 5>(), tiles.dot_bf<3, 4, 5>();
    return rounds * 4 * 16 * 16 * 32 * 2;
}

// noinline: this unit's instructions stay inside its namespace.
__attribute__((noinline)) inline const Kernels& tiled_kernels(const char* name) {
    static const Kernels table = [name] {
        Kernels t = base();
        t.name = name;
        t.panel = panel_tiled;
        t.few = few_tiled;
        t.panel_mixed = panel_mixed_tiled;
        t.round_rows = nullptr;  // it rounds into the tiles' own order
        t.peak = peak_tiled;
        return t;
    }();
    return table;
}

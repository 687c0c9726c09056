// Builds the unit's function table from the templates. Inside the unit's namespace.
using PanelFloat = void (*)(const PackedView&, int, const float*, size_t, int, int, float*, uint8_t*);
using PanelMixed = void (*)(const PackedView&, int, const FloatRows&, int, int, float*, uint8_t*);
using PanelUnpack = void (*)(const PackedView&, int, float*, uint8_t*);

// A row of the format table is all that a format needs to be in these.
struct Tables {
    PanelFloat exact[kFormatCount];
    PanelMixed mixed[kFormatCount];
    PanelUnpack unpack[kFormatCount];
};
template <int... F>
constexpr Tables tables_of(std::integer_sequence<int, F...>) {
    return {{panel_float<static_cast<Format>(F)>...},
            {panel_mixed<static_cast<Format>(F)>...},
            {panel_unpack<static_cast<Format>(F)>...}};
}
constexpr Tables kTablesOf = tables_of(std::make_integer_sequence<int, kFormatCount>());

inline int few_tokens(Format f) {
    if (info(f).kind == Kind::Float) return 0;
    if (info(f).kind == Kind::Grid) return kGridTokens;
    return info(f).packed_k == 256 ? kGemvTokensK : kGemvTokens;
}
inline void run_panel_f32(const PackedView& w, int panel, const float* x, size_t ldx, int t0, int t1, float* acc,
                          uint8_t* scratch) {
    kTablesOf.exact[static_cast<int>(w.format)](w, panel, x, ldx, t0, t1, acc, scratch);
}
inline void run_panel_mixed(const PackedView& w, int panel, const FloatRows& rows, int t0, int t1, float* acc,
                            uint8_t* scratch) {
    kTablesOf.mixed[static_cast<int>(w.format)](w, panel, rows, t0, t1, acc, scratch);
}
inline void run_unpack(const PackedView& w, int panel, float* out, uint8_t* scratch) {
    kTablesOf.unpack[static_cast<int>(w.format)](w, panel, out, scratch);
}

constexpr Kernels make_table(const char* name) {
    return {name,
            run_panel,
            few_tokens,
            run_panel_f32,
            run_panel_mixed,
            kHasBf16 ? round_rows : nullptr,
            run_unpack,
            quantize_row,
            rms_norm_row,
            store_rows,
            accumulate_rows,
            gated_quantize_rows,
            gated_store_rows,
            rope_row,
            cache_row,
            attend_item,
            attend_ready,
            merge_parts,
            uncache_row,
            sigmoid_gate,
            conv_silu_row,
            index_item,
            delta_item,
            kda_item,
            stream_rows,
            stream_enter,
            stream_leave,
            sum_bytes,
            peak_operations};
}

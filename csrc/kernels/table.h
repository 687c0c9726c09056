// Builds the unit's function table from the templates. Inside the unit's namespace.
using PanelInt8 = void (*)(const PackedView&, int, const ActView&, int, int, float*, uint8_t*);
using PanelFloat = void (*)(const PackedView&, int, const float*, size_t, int, int, float*, uint8_t*);
using PanelUnpack = void (*)(const PackedView&, int, float*, uint8_t*);

constexpr PanelInt8 kInt8[] = {panel_int8<Format::Q4_0>, panel_int8<Format::Q4_1>, panel_int8<Format::Q5_0>,
                               panel_int8<Format::Q5_1>, panel_int8<Format::Q8_0>, panel_int8<Format::Q2_K>,
                               panel_int8<Format::Q3_K>, panel_int8<Format::Q4_K>, panel_int8<Format::Q5_K>,
                               panel_int8<Format::Q6_K>};
constexpr PanelFloat kFloat[] = {panel_float<Format::Q4_0>, panel_float<Format::Q4_1>, panel_float<Format::Q5_0>,
                                 panel_float<Format::Q5_1>, panel_float<Format::Q8_0>, panel_float<Format::Q2_K>,
                                 panel_float<Format::Q3_K>, panel_float<Format::Q4_K>, panel_float<Format::Q5_K>,
                                 panel_float<Format::Q6_K>, panel_float<Format::F16>,  panel_float<Format::BF16>,
                                 panel_float<Format::F32>};
constexpr PanelUnpack kUnpack[] = {panel_unpack<Format::Q4_0>, panel_unpack<Format::Q4_1>, panel_unpack<Format::Q5_0>,
                                   panel_unpack<Format::Q5_1>, panel_unpack<Format::Q8_0>, panel_unpack<Format::Q2_K>,
                                   panel_unpack<Format::Q3_K>, panel_unpack<Format::Q4_K>, panel_unpack<Format::Q5_K>,
                                   panel_unpack<Format::Q6_K>, panel_unpack<Format::F16>,  panel_unpack<Format::BF16>,
                                   panel_unpack<Format::F32>};

inline void run_panel(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch) {
    kInt8[static_cast<int>(w.format)](w, panel, a, t0, t1, acc, scratch);
}
inline void run_panel_f32(const PackedView& w, int panel, const float* x, size_t ldx, int t0, int t1, float* acc,
                          uint8_t* scratch) {
    kFloat[static_cast<int>(w.format)](w, panel, x, ldx, t0, t1, acc, scratch);
}
inline void run_unpack(const PackedView& w, int panel, float* out, uint8_t* scratch) {
    kUnpack[static_cast<int>(w.format)](w, panel, out, scratch);
}

constexpr Kernels make_table(const char* name) {
    return {name,         run_panel,  run_panel_f32,   run_unpack,          quantize_row,
            rms_norm_row, store_rows, accumulate_rows, gated_quantize_rows, gated_store_rows,
            rope_row,     cache_row,  attend_item,     merge_parts,         uncache_row,
            sum_bytes};
}

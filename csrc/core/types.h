// Plain data shared by every unit: weight formats, packed matrices, quantised activations. No functions that
// could be instantiated under another instruction set: everything here is POD or constexpr.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ktcore {

constexpr int kPanelRows = 32;  // output rows of a packed panel
constexpr int kHalfRows = 16;   // rows of one 64-byte vector (16 rows x 4 k)
constexpr int kActGroup = 16;   // activation values that share one int8 scale
constexpr int kTokenChunk = 128;  // tokens a work item covers: their int8 rows stay in L2

enum class Format : uint8_t { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, F16, BF16, F32 };
constexpr int kFormatCount = 13;

// One row of the format table. `bits` of a code, `group` values that share a (sub)scale, `offset_shift`:
// the code's constant offset is 1 << offset_shift (-1: none). `header` is the packed header of 32 rows.
struct FormatInfo {
    const char* name;
    int block;        // values of a GGUF block
    int block_bytes;  // its bytes
    int packed_k;     // values of K in a packed block
    int header;
    int bits;
    int group;
    bool has_min;
    int offset_shift;
    bool is_float;
};

constexpr FormatInfo kFormats[kFormatCount] = {
    {"Q4_0", 32, 18, 32, 64, 4, 32, false, 3, false},      {"Q4_1", 32, 20, 32, 128, 4, 32, true, -1, false},
    {"Q5_0", 32, 22, 32, 64, 5, 32, false, 4, false},      {"Q5_1", 32, 24, 32, 128, 5, 32, true, -1, false},
    {"Q8_0", 32, 34, 32, 64, 8, 32, false, 7, false},      {"Q2_K", 256, 84, 256, 640, 2, 16, true, -1, false},
    {"Q3_K", 256, 110, 256, 448, 3, 16, false, 2, false},  {"Q4_K", 256, 144, 256, 512, 4, 32, true, -1, false},
    {"Q5_K", 256, 176, 256, 512, 5, 32, true, -1, false},  {"Q6_K", 256, 210, 256, 576, 6, 16, false, 5, false},
    {"F16", 1, 2, 32, 0, 16, 32, false, -1, true},         {"BF16", 1, 2, 32, 0, 16, 32, false, -1, true},
    {"F32", 1, 4, 32, 0, 32, 32, false, -1, true},
};

constexpr const FormatInfo& info(Format f) { return kFormats[static_cast<int>(f)]; }
constexpr int packed_block_bytes(const FormatInfo& i) {
    return i.header + kPanelRows * i.packed_k * i.bits / 8;
}

// A packed matrix as the kernels see it: `panels` panels of 32 rows, each `kblocks` blocks long.
struct PackedView {
    const uint8_t* data;
    size_t panel_bytes;
    int rows, cols;
    int panels, kblocks;
    Format format;
};

// Quantised rows. One record a token: int8 codes [k], then per 16-group: float scale, int32 -(sum of codes),
// float scale*sum, and float scale*sum per 32-group. `k` is padded to a multiple of 32 (of 256 for K-quants
// it already is one).
struct ActView {
    uint8_t* base;
    size_t stride;
    int k;
};
constexpr size_t act_groups(int k) { return static_cast<size_t>(k) / kActGroup; }
constexpr size_t act_scale_at(int k) { return static_cast<size_t>(k); }
constexpr size_t act_nsum_at(int k) { return act_scale_at(k) + 4 * act_groups(k); }
constexpr size_t act_ssum_at(int k) { return act_nsum_at(k) + 4 * act_groups(k); }
constexpr size_t act_ssum32_at(int k) { return act_ssum_at(k) + 4 * act_groups(k); }
constexpr size_t act_stride(int k) { return (act_ssum32_at(k) + 2 * act_groups(k) + 63) / 64 * 64 + 64; }

enum class Activation : uint8_t { Silu, Relu, GeluTanh };
enum class CacheType : uint8_t { F16, F32 };

// One attention work item: queries [t0, t1) of one sequence against keys [key0, key1) of one kv head.
struct AttendItem {
    const float* q;  // row of token t0, this kv head's first query head; tokens q_stride apart, heads head_dim
    size_t q_stride;
    float* out;  // like q
    size_t out_stride;
    float* partial_ml;  // not null: write max and sum [rows][2] and the unnormalised out [rows][dpad] instead
    float* partial_out;
    const void* k_pages;
    const void* v_pages;
    const int32_t* blocks;
    int page_size, kv_heads, kv_head, group;
    int head_dim, value_dim;  // widths of a key and of a value
    int k_row, v_row;         // elements from one cached row to the next: a latent cache holds both in one
    int tokens;     // queries of this item
    int first_pos;  // context index of its first query
    int key0, key1;
    int window;  // 0: none; else a query sees the last `window` keys, itself included
    float scale;
    CacheType type;
};

}  // namespace ktcore

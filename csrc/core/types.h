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

enum class Format : uint8_t {
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4,
    INT4_G32, INT4_G64, INT4_G128, INT8_G32, INT8_G64, INT8_G128,
    NVFP4, NVFP4_G128, TQ2_0, Q1_0, Q2_0,
    IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M, TQ1_0,
    F16, BF16, F32, F8_E4M3_G128, F8_E4M3_G32,
    IQ1_S_FAST, IQ1_M_FAST, IQ2_XXS_FAST, IQ2_XS_FAST, IQ2_S_FAST, IQ3_XXS_FAST, IQ3_S_FAST
};

// How a format becomes numbers. Affine: unsigned codes, scales and mins or a constant offset, in bit planes;
// Table: like it, the codes being indices into kTables; Grid: indices of lattice points and signs by panels of rows
// (core/grids.h); Ternary: codes of two bits, five of which a byte holds as base-3 digits (kernels/ternary.h); Float: numbers
// as they are.
enum class Kind : uint8_t { Affine, Table, Grid, Ternary, Float };

// One row of the format table. `bits` of a packed code, `group` values that share a (sub)scale, `offset_shift`:
// the code's constant offset is 1 << offset_shift (-1: none). `header` is the packed header of 32 rows.
struct FormatInfo {
    const char* name;
    int block;        // values of a stored block
    int block_bytes;  // its bytes
    int packed_k;     // values of K in a packed block
    int header;
    int bits;
    int group;
    bool has_min;
    int offset_shift;
    Kind kind;
    int table = 0;            // Table: which of kTables
    bool zero_point = false;  // the min is -zero * scale, value = (code - zero) * scale
    int more = 0;             // Grid: bytes of a row's block beyond the file's
};

constexpr FormatInfo kFormats[] = {
    {"Q4_0", 32, 18, 32, 64, 4, 32, false, 3, Kind::Affine},
    {"Q4_1", 32, 20, 32, 128, 4, 32, true, -1, Kind::Affine},
    {"Q5_0", 32, 22, 32, 64, 5, 32, false, 4, Kind::Affine},
    {"Q5_1", 32, 24, 32, 128, 5, 32, true, -1, Kind::Affine},
    {"Q8_0", 32, 34, 32, 64, 8, 32, false, 7, Kind::Affine},
    {"Q2_K", 256, 84, 256, 640, 2, 16, true, -1, Kind::Affine},
    {"Q3_K", 256, 110, 256, 448, 3, 16, false, 2, Kind::Affine},
    {"Q4_K", 256, 144, 256, 512, 4, 32, true, -1, Kind::Affine},
    {"Q5_K", 256, 176, 256, 512, 5, 32, true, -1, Kind::Affine},
    {"Q6_K", 256, 210, 256, 576, 6, 16, false, 5, Kind::Affine},
    {"IQ4_NL", 32, 18, 32, 64, 4, 32, false, 7, Kind::Table, 0},
    {"IQ4_XS", 256, 136, 256, 320, 4, 32, false, 7, Kind::Table, 0},
    {"MXFP4", 32, 17, 32, 64, 4, 32, false, 4, Kind::Table, 1},
    {"INT4_G32", 32, 20, 32, 128, 4, 32, true, -1, Kind::Affine, 0, true},
    {"INT4_G64", 64, 36, 64, 128, 4, 32, true, -1, Kind::Affine, 0, true},
    {"INT4_G128", 128, 68, 128, 128, 4, 32, true, -1, Kind::Affine, 0, true},
    {"INT8_G32", 32, 36, 32, 128, 8, 32, true, -1, Kind::Affine, 0, true},
    {"INT8_G64", 64, 68, 64, 128, 8, 32, true, -1, Kind::Affine, 0, true},
    {"INT8_G128", 128, 132, 128, 128, 8, 32, true, -1, Kind::Affine, 0, true},
    {"NVFP4", 64, 36, 64, 128, 4, 16, false, 4, Kind::Table, 1},
    {"NVFP4_G128", 128, 76, 128, 384, 4, 16, false, 4, Kind::Table, 1},
    {"TQ2_0", 256, 66, 256, 64, 2, 32, false, 0, Kind::Affine},
    {"Q1_0", 128, 18, 128, 64, 1, 32, false, 0, Kind::Affine},
    {"Q2_0", 64, 18, 64, 64, 2, 32, false, 0, Kind::Affine},
    {"IQ2_XXS", 256, 66, 256, 64, 8, 32, false, 6, Kind::Grid},
    {"IQ2_XS", 256, 74, 256, 64, 8, 16, false, 6, Kind::Grid},
    {"IQ2_S", 256, 82, 256, 64, 8, 16, false, 6, Kind::Grid},
    {"IQ3_XXS", 256, 98, 256, 64, 8, 32, false, 6, Kind::Grid},
    {"IQ3_S", 256, 110, 256, 64, 8, 32, false, 6, Kind::Grid},
    {"IQ1_S", 256, 50, 256, 64, 8, 32, false, 6, Kind::Grid, 0, false, 3},
    {"IQ1_M", 256, 56, 256, 64, 8, 16, false, 6, Kind::Grid, 0, false, 3},
    {"TQ1_0", 256, 54, 256, 64, 2, 32, false, 0, Kind::Ternary},
    {"F16", 1, 2, 32, 0, 16, 32, false, -1, Kind::Float},
    {"BF16", 1, 2, 32, 0, 16, 32, false, -1, Kind::Float},
    {"F32", 1, 4, 32, 0, 32, 32, false, -1, Kind::Float},
    {"F8_E4M3_G128", 128, 132, 128, 128, 8, 128, false, -1, Kind::Float},
    {"F8_E4M3_G32", 32, 36, 32, 128, 8, 32, false, -1, Kind::Float},
    // Lattice points as a code for each value, in bit planes: larger than their file's blocks, quicker to take apart.
    {"IQ1_S_FAST", 256, 50, 256, 192, 2, 32, true, -1, Kind::Affine},
    {"IQ1_M_FAST", 256, 56, 256, 320, 3, 16, false, 4, Kind::Table, 2},
    {"IQ2_XXS_FAST", 256, 66, 256, 192, 3, 32, false, 6, Kind::Table, 3},
    {"IQ2_XS_FAST", 256, 74, 256, 320, 3, 16, false, 6, Kind::Table, 3},
    {"IQ2_S_FAST", 256, 82, 256, 320, 3, 16, false, 6, Kind::Table, 3},
    {"IQ3_XXS_FAST", 256, 98, 256, 192, 4, 32, false, 6, Kind::Table, 4},
    {"IQ3_S_FAST", 256, 110, 256, 192, 4, 32, false, 4, Kind::Table, 5},
};
constexpr int kFormatCount = sizeof kFormats / sizeof kFormats[0];

// Values of 4-bit codes plus the format's offset: IQ4's (-127 .. 113, + 128), e2m1's doubled (0 .. 12, -12, + 16); of codes
// of a level and above it a sign (of 3 bits: twice) IQ1_M's (8 (level - 1) +- 1), IQ2's, IQ3_XXS's and IQ3_S's.
constexpr uint8_t kTables[6][16] = {{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
                                    {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4},
                                    {9, 17, 25, 16, 7, 15, 23, 16, 9, 17, 25, 16, 7, 15, 23, 16},
                                    {72, 89, 107, 64, 56, 39, 21, 64, 72, 89, 107, 64, 56, 39, 21, 64},
                                    {68, 76, 84, 92, 100, 108, 116, 126, 60, 52, 44, 36, 28, 20, 12, 2},
                                    {17, 19, 21, 23, 25, 27, 29, 31, 15, 13, 11, 9, 7, 5, 3, 1}};
constexpr uint16_t kScaleIsBf16 = 0x8000;  // in a stored zero point: the scale's 16 bits are a bfloat16

constexpr const FormatInfo& info(Format f) { return kFormats[static_cast<int>(f)]; }
// The format of the file's blocks: where it is another one, panels hold a code for each of its values.
constexpr Format stored_format(Format f) {
    if (f < Format::IQ1_S_FAST) return f;
    constexpr Format kStored[] = {Format::IQ1_S, Format::IQ1_M,   Format::IQ2_XXS, Format::IQ2_XS,
                                  Format::IQ2_S, Format::IQ3_XXS, Format::IQ3_S};
    return kStored[static_cast<int>(f) - static_cast<int>(Format::IQ1_S_FAST)];
}
// 8-bit floats in groups of packed_k values, each with a float32 scale.
constexpr bool is_fp8(Format f) { return f == Format::F8_E4M3_G128 || f == Format::F8_E4M3_G32; }
constexpr bool coded_points(Format f) { return stored_format(f) != f; }
constexpr int packed_block_bytes(const FormatInfo& i) {
    if (i.kind == Kind::Ternary || i.kind == Kind::Grid) return kPanelRows * (i.block_bytes + i.more);
    return i.header + kPanelRows * i.packed_k * i.bits / 8;
}
// Codes need all eight bits of an unsigned byte.
constexpr bool wide_codes(const FormatInfo& i) { return (i.bits == 8 && i.kind != Kind::Grid) || (i.kind == Kind::Table && i.table == 0); }

// A packed matrix as the kernels see it: `panels` panels of 32 rows, each `kblocks` blocks long.
struct PackedView {
    const uint8_t* data;
    size_t panel_bytes;
    int rows, cols;
    int panels, kblocks;
    Format format;
};

// Quantised rows. One record a token: int8 codes [k], then per 16-group: float scale, int32 -(sum of codes),
// float scale*sum, float scale*sum per 32-group, and (where a unit multiplies Grid formats) the codes again, every 4 x 4 of
// a 16-group transposed. `k` is padded to a multiple of 32 (of 256 for K-quants it already is one).
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
constexpr size_t act_xt_at(int k) { return act_ssum32_at(k) + 2 * act_groups(k); }
constexpr size_t act_stride(int k) { return (act_xt_at(k) + static_cast<size_t>(k) + 63) / 64 * 64 + 64; }

// Rows of floats; `rounded`, if not null, the same as bfloat16, zeros up to a multiple of 32.
struct FloatRows {
    const float* x;
    size_t ldx;
    const uint16_t* rounded = nullptr;
    size_t ld_rounded = 0;
};

enum class Activation : uint8_t { Silu, Relu, GeluTanh };
enum class Arithmetic : uint8_t { Int8, Bf16, F32 };
// Q8: 32 values share a half-precision scale; a row holds all its codes, then all its scales. I16: codes of 16 bits, then a
// float scale; of a row in two parts (latents: the values, then the rotated key) it is the first part's, followed by the
// second's as bfloat16; last the largest magnitude among the first part's codes (kernels/cache.h).
enum class CacheType : uint8_t { F16, F32, BF16, Q8, I16 };
constexpr int kCacheGroup = 32;
constexpr size_t cache_codes(int n) { return static_cast<size_t>(n + kCacheGroup - 1) / kCacheGroup * kCacheGroup; }
constexpr size_t cache_row_bytes(CacheType type, int n) {
    return type == CacheType::F32  ? size_t{4} * static_cast<size_t>(n)
           : type == CacheType::I16 ? size_t{2} * static_cast<size_t>(n + n % 2) + 8
           : type == CacheType::Q8 ? cache_codes(n) + 2 * (cache_codes(n) / kCacheGroup)
                                   : size_t{2} * static_cast<size_t>(n);
}

// One attention work item: queries [t0, t1) of one sequence against keys [key0, key1) of one kv head.
struct AttendItem {
    const float* q;  // row of token t0, this kv head's first query head; tokens q_stride apart, heads head_dim
    size_t q_stride;
    float* out;  // like q
    size_t out_stride;
    float* partial_ml;  // not null: write max and sum [rows][2] and the unnormalised out [rows][dpad] instead
    float* partial_out;
    const uint8_t* ready;  // not null: the queries as Kernels::attend_ready has left them
    const void* k_pages;
    const void* v_pages;
    const int32_t* blocks;
    int page_size, kv_heads, kv_head, group;
    int head_dim, value_dim;  // widths of a key and of a value
    int k_row, v_row;         // values in a whole cached row: a latent cache holds keys and values in one
    int tokens;     // queries of this item
    int first_pos;  // context index of its first query
    int key0, key1;
    int key_end;  // keys of the context that others of its items read next: what is worth reading ahead
    int window;  // 0: none; else a query sees the last `window` keys, itself included
    int chunk;   // 0: none; else a query sees no key before the last multiple of `chunk` at or before itself
    const float* sinks;  // null, or a logit for each query head of the group that takes part in the softmax alone
    float scale;
    CacheType type;
};

// Scores of index keys [key0, key1) for some tokens of a sequence: sum over heads of weight * relu(q . key).
struct IndexItem {
    const float* q;  // [tokens][heads][dim]; tokens q_stride apart
    size_t q_stride;
    const float* weights;  // [tokens][heads]
    size_t weight_stride;
    float* out;  // [tokens]: of key0 and on
    size_t out_stride;
    const void* pages;  // rows of dim values
    const int32_t* blocks;
    int page_size, heads, dim, tokens, key0, key1;
    CacheType type;
};

// One value head of a gated delta rule over consecutive tokens of one sequence; rows of tokens are `*_stride` apart.
struct DeltaItem {
    const float *q, *k, *v;  // q and k normalised and scaled
    size_t qk_stride, v_stride;
    const float *g, *beta;
    size_t gate_stride;
    float* state;  // [key_dim][value_dim], read and written
    float* out;
    size_t out_stride;
    int tokens, key_dim, value_dim;
};

// The same with a decay a channel, made here from f + dt_bias: -rate softplus(.), or bound sigmoid(rate .) where bound is not 0.
struct KdaItem {
    const float *q, *k, *v;  // q and k normalised and scaled
    size_t stride;
    const float* f;  // [tokens][key_dim]
    size_t f_stride;
    const float* dt_bias;  // [key_dim]
    float rate, bound;
    const float* beta;
    size_t beta_stride;
    float* state;  // [key_dim][value_dim], read and written
    float* out;
    size_t out_stride;
    int tokens, key_dim, value_dim;
};

constexpr int kMaxStreams = 8;  // residual streams of a model

// Products of a few float32 rows with some columns of tokens' residual streams.
struct StreamRows {
    const float* w;  // [rows][n], ldw apart
    size_t ldw;
    int rows;
    const float* x;  // [tokens][n], ldx apart
    size_t ldx;
    int tokens, n;
    float* out;  // [tokens][rows + 1], ldo apart
    size_t ldo;
};

}  // namespace ktcore

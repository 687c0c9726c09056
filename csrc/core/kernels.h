// The table of functions that each instruction-set unit supplies, and the choice between them.
#pragma once
#include <utility>

#include "core/types.h"

namespace ktcore {

// How a panel is read, which no result depends on: up to `few` tokens straight from it (see blocks/switch.h), asking for
// what lies `ahead` bytes behind; 0: for what comes next.
struct Reading {
    int few, ahead;
};

struct Kernels {
    const char* name;
    // acc [t1-t0][32] = rows 32*panel.. of w times quantised tokens t0..t1. scratch: kPanelScratch bytes. Few tokens
    // are multiplied straight from the panel, more by tiles of it unpacked: the same sums.
    void (*panel)(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch, Reading how);
    // `few` for a format that nobody has measured.
    int (*few)(Format format);
    // The same from float rows (any format), without quantisation.
    void (*panel_f32)(const PackedView& w, int panel, const float* x, size_t ldx, int t0, int t1, float* acc,
                      uint8_t* scratch);
    // The same for float formats at their own precision: inputs rounded to bfloat16 where weights of 8 or 16 bits have
    // dot products for it, otherwise as panel_f32.
    void (*panel_mixed)(const PackedView& w, int panel, const FloatRows& rows, int t0, int t1, float* acc, uint8_t* scratch);
    // Rows as panel_mixed would round them, for those who multiply them by many panels; null where it rounds none.
    void (*round_rows)(const float* x, size_t ldx, int tokens, int n, uint16_t* out, size_t ldo);
    // out [packed_k*kblocks][32] = one panel as floats.
    void (*unpack_panel)(const PackedView& w, int panel, float* out, uint8_t* scratch);
    // Quantises x [n] into record `row` of a, after RMS-normalising it when weight is given.
    void (*quantize)(const float* x, int n, const float* weight, float eps, const ActView& a, int row);
    // out [n] = rms_norm(x) * weight, padded with zeros to `padded`.
    void (*rms_norm)(const float* x, int n, const float* weight, float eps, float* out, int padded);
    // out[t][r] = acc[t][r] (+ bias[r]) (+ residual[t][r]).
    void (*store)(const float* acc, int tokens, int rows, float* out, size_t ldo, const float* bias,
                  const float* residual, size_t ldr);
    // out[token[i]][r] += weight[i] * acc[i][r].
    void (*accumulate)(const float* acc, int count, int rows, float* out, size_t ldo, const int32_t* token,
                       const float* weight);
    // h = act(gate) * up, 32 values a token, quantised into records t0.. at column `row0`...
    void (*gated_quantize)(const float* gate, const float* up, int tokens, Activation act, const ActView& a, int t0,
                           int row0);
    // ... or as floats.
    void (*gated_store)(const float* gate, const float* up, int tokens, int rows, Activation act, float* out,
                        size_t ldo);
    // Rotates x in place; cos/sin hold `width`/2 values. interleaved: pairs (2i, 2i+1), else (i, i+width/2).
    void (*rope)(float* x, int width, const float* cosine, const float* sine, bool interleaved);
    // split: where the row's second part begins; n: it has one. Matters to I16 alone.
    void (*to_cache)(const float* x, int n, int split, void* out, CacheType type);
    void (*attend)(const AttendItem& item, uint8_t* scratch);
    // Queries of an item over an I16 cache, for it and others with the same ones: attend_ready_bytes at `to`.
    void (*attend_ready)(const AttendItem& item, uint8_t* to, uint8_t* scratch);
    // Folds `parts` partial results of `rows` rows (laid out part-major, overwritten) into out.
    void (*attend_merge)(float* ml, float* sums, int parts, int rows, int value_dim, int group, const float* sinks,
                         float* out, size_t out_stride);
    // out [n] floats of a cached row.
    void (*from_cache)(const void* row, int n, int split, float* out, CacheType type);
    // x [n] *= sigmoid(gate [n]).
    void (*sigmoid_gate)(float* x, const float* gate, int n);
    // silu of a causal depthwise convolution of n channels; weight [width][stride], rows oldest first.
    void (*conv_silu)(const float* const* rows, int width, const float* weight, size_t stride, int n, float* out);
    // Scores of one sequence's index keys; scratch: index_scratch.
    void (*index_scores)(const IndexItem& item, uint8_t* scratch);
    void (*delta)(const DeltaItem& item, uint8_t* scratch);
    void (*kda)(const KdaItem& item, uint8_t* scratch);
    // out[t][r] = row r of w . x[t], and the sum of squares of x[t] behind them; n a multiple of 16.
    void (*stream_rows)(const StreamRows& item);
    // out [hidden] = sum over streams of pre[s] x[s]; hidden a multiple of 16.
    void (*stream_enter)(const float* x, int streams, int hidden, const float* pre, float* out);
    // out[k] = post[k] y + sum_j mix[j][k] x[j]; out may be x.
    void (*stream_leave)(const float* x, const float* y, int streams, int hidden, const float* post, const float* mix,
                         float* out);
    uint64_t (*read_sum)(const uint8_t* p, size_t bytes);
    // Multiplies and adds in registers alone; returns the operations done, 0 where the unit has no such arithmetic.
    int64_t (*peak)(Arithmetic kind, int64_t rounds);
};

constexpr int kChunkK = 512;  // values of K unpacked to L1 at once
constexpr size_t kPanelScratch = size_t{kChunkK} * kPanelRows * 4 + 2 * (kChunkK / 16) * kPanelRows * 4;
// Bytes that the decode kernels prefetch ahead, block headers included, where nobody has measured. One Zen 5 core reads Q4_K
// at 42 to 44 GB/s with 8 KB, 30 to 35 with 4 KB, 24 to 34 with 2 KB; one Zen 4 core Q6_K at 17 GB/s with 8 KB, 25 with 256
// bytes: lines asked for wait in the places that its loads wait in.
constexpr int kReadAhead = 8192;
constexpr int kKeyBlock = 64;  // keys of one attention step
constexpr int kSplitKeys = 256;  // the softmax runs over parts of so many keys, folded in order: results do not depend on
                                 // which thread or item had which part
constexpr int dpad(int head_dim) { return (head_dim + 15) / 16 * 16; }
// width: the larger of a key's and a value's. Rows are padded to groups of 8 where they are few.
constexpr size_t attend_scratch(int width, int rows) {
    const size_t w = static_cast<size_t>(width + 31) / 32 * 32, r = static_cast<size_t>(rows + 15);
    return 4 * (4 * kKeyBlock * w + r * (3 * w + 4 * kKeyBlock + 16)) + 8192;
}
constexpr size_t attend_ready_bytes(int width, int rows) {
    const size_t r = static_cast<size_t>(rows + 15) / 16 * 16, groups = static_cast<size_t>(width + 127) / 128 + 1;
    return r * (groups * 256 + 16) + 256;
}
constexpr size_t index_scratch(int heads, int dim, int tokens) {
    const size_t d = static_cast<size_t>(dpad(dim)), h = static_cast<size_t>(heads + 15) / 16 * 16, t = static_cast<size_t>(tokens);
    return 4 * ((kKeyBlock + 16) * d + 2 * kKeyBlock + kKeyBlock * h + t * h * (d + 1));
}
constexpr int kDeltaChunk = 16;
constexpr int kDeltaSerial = 4;  // so many tokens of a sequence go one by one, more by chunks, which round differently
constexpr size_t delta_scratch(int key_dim, int value_dim) {
    return 4 * kDeltaChunk * (size_t{3} * static_cast<size_t>(key_dim) + 3 * static_cast<size_t>(value_dim) + 2 * kDeltaChunk);
}
constexpr size_t kda_scratch(int key_dim, int value_dim) {
    const size_t dk = static_cast<size_t>(key_dim), dv = static_cast<size_t>(value_dim), c = kDeltaChunk;
    return 4 * (c * (5 * dk + 3 * dv + 2 * c) + dk);
}

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx_vnni();
const Kernels& kernels_avx_vnni_emulated();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_vnni();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();
const Kernels& kernels_amx_emulated();

}  // namespace ktcore

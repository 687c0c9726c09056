// Few tokens by a quantised matrix: a sub-group takes one output row, a lane 16 bytes of codes at a time.
// Macros: X, SCALE types; BITS 4 or 8; ZERO, GROUP, SPAN, OFFSET (0 or 1) of the layout; TOKENS a launch row; ROWS
// sub-groups a work-group. Weights are read once for all TOKENS tokens: their bandwidth is all that counts here.

constexpr int RUNS = BITS == 4 ? 2 : 1;

// column of the first of 16 codes that run `run` of the 16 bytes at `byte` of a row holds
inline int run_column(int byte, int run) {
    if constexpr (BITS == 8) return byte;
    return byte / (SPAN / 2) * SPAN + byte % (SPAN / 2) + run * (SPAN / 2);
}

inline float run_code(const words &packed, int run, int i) {
    const std::uint32_t byte = packed[i / 4] >> (8 * (i % 4));
    return static_cast<float>(BITS == 8 ? byte & 255u : (byte >> (4 * run)) & 15u);
}

KERNEL void gemv(const X *x, const uint8 *codes, const SCALE *scale, const SCALE *offset, const float *bias, float *y,
                 int tokens, int rows, int cols) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int row = item.get_group(2) * ROWS + lanes.get_group_linear_id();
    const int first = item.get_group(1) * TOKENS;
    if (row >= rows) return;
    const int bytes = cols / 8 * BITS;
    const uint8 *stored = codes + static_cast<std::size_t>(row) * bytes;
    const std::size_t groups = static_cast<std::size_t>(row) * (cols / GROUP);
    float sum[TOKENS] = {};
    for (int byte = lanes.get_local_linear_id() * 16; byte < bytes; byte += 16 * LANES) {
        const words packed = *reinterpret_cast<const words *>(stored + byte);
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const int column = run_column(byte, run);
            const float s = static_cast<float>(scale[groups + column / GROUP]);
            float shift = -s * ZERO;
            if constexpr (OFFSET) shift += static_cast<float>(offset[groups + column / GROUP]);
            float weight[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) weight[i] = run_code(packed, run, i) * s + shift;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                // tokens past the end read the last one's values, which nobody stores
                const int token = sycl::min(first + t, tokens - 1);
                const X *values = x + static_cast<std::size_t>(token) * cols + column;
#pragma unroll
                for (int i = 0; i < 16; ++i) sum[t] += weight[i] * static_cast<float>(values[i]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const float total = lanes_sum(lanes, sum[t]);
        if (lanes.leader() && first + t < tokens) {
            y[static_cast<std::size_t>(first + t) * rows + row] = bias ? total + bias[row] : total;
        }
    }
}

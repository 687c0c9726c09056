// Few tokens by a quantised matrix: a sub-group takes one output row, a lane 16 bytes of codes at a time.
// Macros: X type; TOKENS a launch row; ROWS sub-groups a work-group. Weights are read once for all TOKENS tokens: their
// bandwidth is all that counts here.

KERNEL void gemv(const X *x, const uint8 *codes, const SCALE *scale, const SCALE *offset, const float *bias, float *y,
                 int tokens, int rows, int cols) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int row = item.get_group(2) * ROWS + lanes.get_group_linear_id();
    const int first = item.get_group(1) * TOKENS;
    if (row >= rows) return;
    const Affine weight{codes, scale, offset, cols};
    float sum[TOKENS] = {};
    for (int byte = lanes.get_local_linear_id() * 16; byte < weight.bytes(); byte += 16 * LANES) {
        const words packed = weight.packed(row, byte);
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const int column = run_column(byte, run);
            float w[16];
            run_values(weight, row, packed, run, column, w);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                // tokens past the end read the last one's values, which nobody stores
                const X *values = x + static_cast<std::size_t>(sycl::min(first + t, tokens - 1)) * cols + column;
#pragma unroll
                for (int i = 0; i < 16; ++i) sum[t] += w[i] * static_cast<float>(values[i]);
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

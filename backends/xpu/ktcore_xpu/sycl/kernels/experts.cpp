// Routed experts, a sub-group an output row, with the few tokens of decoding in mind: every chosen expert's rows are
// read once a token. Macros: X type; ROWS sub-groups a work-group. A negative id is an expert that is elsewhere.

inline float row_product(sycl::sub_group lanes, const Affine &weight, std::size_t row, const X *x) {
    float sum = 0.0f;
    for (int byte = lanes.get_local_linear_id() * 16; byte < weight.bytes(); byte += 16 * LANES) {
        const words packed = weight.packed(row, byte);
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const int column = run_column(byte, run);
            float values[16];
            run_values(weight, row, packed, run, column, values);
#pragma unroll
            for (int i = 0; i < 16; ++i) sum += values[i] * static_cast<float>(x[column + i]);
        }
    }
    return lanes_sum(lanes, sum);
}

// silu(gate) * up of every token and choice: between [tokens * k, rows]
KERNEL void experts_in(const X *x, const std::int64_t *ids, const uint8 *codes, const SCALE *scale, const SCALE *offset,
                       const uint8 *up_codes, const SCALE *up_scale, const SCALE *up_offset, float *between, int k,
                       int rows, int cols) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int pair = item.get_group(1), row = item.get_group(2) * ROWS + lanes.get_group_linear_id();
    const std::int64_t expert = ids[pair];
    if (row >= rows || expert < 0) return;
    const X *mine = x + static_cast<std::size_t>(pair / k) * cols;
    const std::size_t at = static_cast<std::size_t>(expert) * rows + row;
    const float gate = row_product(lanes, {codes, scale, offset, cols}, at, mine);
    const float up = row_product(lanes, {up_codes, up_scale, up_offset, cols}, at, mine);
    if (lanes.leader()) {
        between[static_cast<std::size_t>(pair) * rows + row] = gate / (1.0f + sycl::exp(-gate)) * up;
    }
}

// the weighted sum over a token's choices, always in their order: y [tokens, rows]
KERNEL void experts_out(const X *between, const std::int64_t *ids, const float *weights, const uint8 *codes,
                        const SCALE *scale, const SCALE *offset, float *y, int k, int rows, int cols) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int token = item.get_group(1), row = item.get_group(2) * ROWS + lanes.get_group_linear_id();
    if (row >= rows) return;
    float sum = 0.0f;
    for (int choice = 0; choice < k; ++choice) {
        const std::size_t pair = static_cast<std::size_t>(token) * k + choice;
        if (ids[pair] < 0) continue;
        const std::size_t at = static_cast<std::size_t>(ids[pair]) * rows + row;
        sum += weights[pair] * row_product(lanes, {codes, scale, offset, cols}, at, between + pair * cols);
    }
    if (lanes.leader()) y[static_cast<std::size_t>(token) * rows + row] = sum;
}

// Many tokens by a quantised matrix: tiles of both in local memory, 32 tokens by 64 output rows a work-group of 256.
// Macros: X type; DPAS 0 or 1, and with it ELEMENT (the type of products) and CAST (how a float becomes one).

#if DPAS
#include <sycl/ext/oneapi/bfloat16.hpp>
#include <sycl/ext/oneapi/matrix/matrix.hpp>
namespace mx = ex::matrix;
#else
#define ELEMENT float
#define CAST float
#endif

constexpr int TOKENS = 32, ROWS = 64, ITEMS = 256;
constexpr int STEP = BITS == 4 ? SPAN : 32;
constexpr int PIECES = STEP * BITS / 128;

// where a weight of the tile lies; the matrix instruction wants pairs of columns side by side
inline int place(int row, int column) {
    return DPAS ? column / 2 * (2 * ROWS) + 2 * row + column % 2 : column * ROWS + row;
}

inline void load_weights(const Affine &from, CAST *tile, int first, int rows, int column, int local) {
    for (int i = local; i < ROWS * PIECES; i += ITEMS) {
        const int row = i % ROWS;
        const int byte = column / 8 * BITS + i / ROWS * 16;
        // rows past the end repeat the last one, which nobody stores
        const std::size_t at = sycl::min(first + row, rows - 1);
        const words packed = from.packed(at, byte);
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const int start = run_column(byte, run);
            float values[16];
            run_values(from, at, packed, run, start, values);
            for (int j = 0; j < 16; ++j) tile[place(row, start - column + j)] = CAST(values[j]);
        }
    }
}

KERNEL void gemm(const X *x, const uint8 *codes, const SCALE *scale, const SCALE *offset, const float *bias, float *y,
                 int tokens, int rows, int cols) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int local = item.get_local_linear_id();
    const int token = item.get_group(1) * TOKENS, row = item.get_group(2) * ROWS;
    const Affine weight{codes, scale, offset, cols};
    LOCAL(CAST, tile_x, TOKENS * STEP);
    LOCAL(CAST, tile_w, STEP * ROWS);
    const int part = local / LANES, lane = local % LANES;
#if DPAS
    // 4 by 4 results of 8 by 16, one a sub-group
    mx::joint_matrix<sycl::sub_group, float, mx::use::accumulator, 8, 16> sum;
    mx::joint_matrix_fill(lanes, sum, 0.0f);
#else
    float sum[2][4] = {};
#endif
    for (int column = 0; column < cols; column += STEP) {
        for (int i = local; i < TOKENS * STEP; i += ITEMS) {
            const int t = token + i / STEP;
            tile_x[i] = t < tokens ? CAST(static_cast<float>(x[static_cast<std::size_t>(t) * cols + column + i % STEP]))
                                   : CAST(0.0f);
        }
        load_weights(weight, tile_w, row, rows, column, local);
        sycl::group_barrier(item.get_group());
#if DPAS
        auto a_at = sycl::address_space_cast<sycl::access::address_space::local_space, sycl::access::decorated::no>(
            reinterpret_cast<ELEMENT *>(tile_x));
        auto b_at = sycl::address_space_cast<sycl::access::address_space::local_space, sycl::access::decorated::no>(
            reinterpret_cast<ELEMENT *>(tile_w));
        for (int k = 0; k < STEP; k += 16) {
            mx::joint_matrix<sycl::sub_group, ELEMENT, mx::use::a, 8, 16, mx::layout::row_major> a;
            mx::joint_matrix<sycl::sub_group, ELEMENT, mx::use::b, 16, 16, mx::layout::ext_intel_packed> b;
            mx::joint_matrix_load(lanes, a, a_at + part / 4 * 8 * STEP + k, STEP);
            mx::joint_matrix_load(lanes, b, b_at + k / 2 * (2 * ROWS) + part % 4 * 32, 2 * ROWS);
            mx::joint_matrix_mad(lanes, sum, a, b, sum);
        }
#else
        for (int k = 0; k < STEP; ++k) {
            const float a[2] = {tile_x[part * STEP + k], tile_x[(part + 16) * STEP + k]};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float b = tile_w[k * ROWS + lane + 16 * j];
                sum[0][j] += a[0] * b;
                sum[1][j] += a[1] * b;
            }
        }
#endif
        sycl::group_barrier(item.get_group());
    }
    LOCAL(float, result, TOKENS * ROWS);
#if DPAS
    mx::joint_matrix_store(
        lanes, sum,
        sycl::address_space_cast<sycl::access::address_space::local_space, sycl::access::decorated::no>(result) +
            part / 4 * 8 * ROWS + part % 4 * 16,
        ROWS, mx::layout::row_major);
#else
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) result[(part + 16 * i) * ROWS + lane + 16 * j] = sum[i][j];
    }
#endif
    sycl::group_barrier(item.get_group());
    for (int i = local; i < TOKENS * ROWS; i += ITEMS) {
        const int t = token + i / ROWS, r = row + i % ROWS;
        if (t < tokens && r < rows) y[static_cast<std::size_t>(t) * rows + r] = bias ? result[i] + bias[r] : result[i];
    }
}

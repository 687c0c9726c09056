// Reading weights of the affine group layout. Macros: SCALE type; BITS 4 or 8; ZERO, GROUP, SPAN; OFFSET 0 or 1.
constexpr int RUNS = BITS == 4 ? 2 : 1;

// a matrix: codes [rows, cols * BITS / 8]; scale and, with OFFSET, offset [rows, cols / GROUP]
struct Affine {
    const uint8 *codes;
    const SCALE *scale;
    const SCALE *offset;
    int cols;

    int bytes() const { return cols / 8 * BITS; }

    words packed(std::size_t row, int byte) const {
        return *reinterpret_cast<const words *>(codes + row * bytes() + byte);
    }
};

// column of the first of 16 codes that run `run` of the 16 bytes at `byte` of a row holds
inline int run_column(int byte, int run) {
    if constexpr (BITS == 8) return byte;
    return byte / (SPAN / 2) * SPAN + byte % (SPAN / 2) + run * (SPAN / 2);
}

// the 16 values of a run whose first column is `column`
inline void run_values(const Affine &from, std::size_t row, const words &packed, int run, int column, float *values) {
    const std::size_t group = row * (from.cols / GROUP) + column / GROUP;
    const float scale = static_cast<float>(from.scale[group]);
    float shift = -scale * ZERO;
    if constexpr (OFFSET) shift += static_cast<float>(from.offset[group]);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const std::uint32_t byte = packed[i / 4] >> (8 * (i % 4));
        values[i] = static_cast<float>(BITS == 8 ? byte & 255u : (byte >> (4 * run)) & 15u) * scale + shift;
    }
}

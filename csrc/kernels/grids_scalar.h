// Lattice points by their definition (core/grids.h), row by row. Inside the unit's namespace.
template <Format F>
inline void unpack_grid(const uint8_t* p, int blocks, const Unpacked& out) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    int8_t codes[256];
    float scale[16];
    for (int b = 0; b < blocks; b++, p += packed_block_bytes(I))
        for (int r = 0; r < kPanelRows; r++) {
            grid_int8(F, p, r, codes, scale);
            uint8_t* to = out.codes + (b * 128 + r / kHalfRows) * 64 + r % kHalfRows * 4;
            for (int q = 0; q < 64; q++, to += 128) {
                uint32_t quad;
                __builtin_memcpy(&quad, codes + q * 4, 4);
                quad = (quad ^ 0x80808080) - 0x40404040;
                __builtin_memcpy(to, &quad, 4);
            }
            for (int s = 0; s < 256 / I.group; s++) out.scale[(b * (256 / I.group) + s) * kPanelRows + r] = scale[s * I.group / 16];
        }
}

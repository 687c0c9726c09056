// The integer product on tiles: the records, integer sums and float steps of tile.h, so the same bits. Inside the unit's
// namespace. 16 tokens x 16 k times 16 k x 16 rows are one tile product; activations change their scale every 16 k, so
// each product is drained to memory and scaled by vector code while the next ones run. See docs/amx.md for what it costs.

// Codes less their offset, as signed bytes: sum a * (code - offset) is what tile.h's seeded accumulator ends at.
inline void recentre(uint8_t* codes, int vectors, int shift) {
    const VI top = seti(static_cast<int>(0x80808080)), offset = seti(-(0x01010101 << (shift & 7)));
    for (int i = 0; i < vectors; i++, codes += 64) {
        const VI v = ldi(codes);
        // The set top bit stops borrows between bytes; flipping what is left of it gives two's complement.
        sti(codes, xori(shift == 7 ? v : addi(ori(v, top), offset), top));
    }
}

// Starts the two products (16 k each) of a group and one row half, to end in dots [2][16 tokens][16 rows].
template <bool kMin, int C>
AI void start_group(Tiles& tiles, const uint8_t* x, size_t stride, const uint8_t* codes, int32_t* dots) {
    tiles.zero<C>();
    tiles.zero<C + 1>();
    tiles.load<0>(x, stride);
    tiles.load<2>(codes, 128);
    kMin ? tiles.dot_su<C, 0, 2>() : tiles.dot_ss<C, 0, 2>();
    tiles.load<1>(x + 16, stride);
    tiles.load<3>(codes + 512, 128);
    kMin ? tiles.dot_su<C + 1, 1, 3>() : tiles.dot_ss<C + 1, 1, 3>();
    tiles.store<C>(dots, 64);
    tiles.store<C + 1>(dots + 256, 64);
}

// One token's share of a group: tile.h's float steps, in its order.
template <int kGroup, bool kMin>
AI VF drain_row(VF sum, const int32_t* dots, const ActRow& a, int kp, int g32, const float* sc, const float* mn) {
    const VF d0 = cvtif(ldi(dots)), d1 = cvtif(ldi(dots + 256));
    const VF s0 = bcf(a.scale(kp, g32 * 2)), s1 = bcf(a.scale(kp, g32 * 2 + 1));
    if (kGroup == 16) {
        sum = fma(mulf(d0, s0), ldf(sc), sum);
        if (kMin) sum = fma(ldf(mn), bcf(a.ssum(kp, g32 * 2)), sum);
        sum = fma(mulf(d1, s1), ldf(sc + 32), sum);
        if (kMin) sum = fma(ldf(mn + 32), bcf(a.ssum(kp, g32 * 2 + 1)), sum);
        return sum;
    }
    sum = fma(fma(d1, s1, mulf(d0, s0)), ldf(sc), sum);
    if (kMin) sum = fma(ldf(mn), bcf(a.ssum32(kp, g32)), sum);
    return sum;
}

// Up to 16 tokens over a slice and one row half. Tokens before `from` were another block's: multiplied, not drained.
// kWhole: from 0 to 16, the sums in registers.
template <int kGroup, bool kMin, bool kWhole>
void block_int8(Tiles& tiles, const Unpacked& w, int half, int groups, int g0, const ActView& a, const uint8_t* act, int from,
                int to, float* acc) {
    constexpr int kScale = kGroup == 16 ? 64 : 32;
    alignas(64) int32_t dots[2][512];
    const size_t stride = a.stride;
    const uint8_t *codes = w.codes + half * 64, *x = act + w.x_at + g0 * 32;
    const float *sc = w.scale + half * 16, *mn = w.min + half * 16;
    if (kWhole) from = 0, to = 16;
    VF sum[16];
    UNR for (int t = 0; t < 16; t++)
        sum[t] = g0 > 0 && t >= from && t < to ? ldf(acc + t * 32 + half * 16) : setf(0.f);
    start_group<kMin, 4>(tiles, x, stride, codes, dots[0]);
    for (int g = 0; g < groups; g++, sc += kScale, mn += kScale) {
        if (g + 1 < groups) {
            x += 32;
            codes += 1024;
            if (g % 2 == 0)
                start_group<kMin, 6>(tiles, x, stride, codes, dots[1]);
            else
                start_group<kMin, 4>(tiles, x, stride, codes, dots[0]);
        }
        const int32_t* d = dots[g % 2];
        UNR for (int t = 0; t < 16; t++)
            if (t >= from && t < to)
                sum[t] = drain_row<kGroup, kMin>(sum[t], d + t * 16, ActRow{act + t * stride}, a.k, g0 + g, sc, mn);
    }
    UNR for (int t = 0; t < 16; t++)
        if (t >= from && t < to) stf(acc + t * 32 + half * 16, sum[t]);
}

// All tokens over an unpacked slice.
template <int kGroup, bool kMin>
void tiled_slice(Tiles& tiles, const Unpacked& u, int groups, int g0, const ActView& a, const uint8_t* act, int tokens,
                 int shift, float* acc, Ahead ahead) {
    if (!kMin) recentre(u.codes, groups * 16, shift);
    for (int t = 0; t < tokens; t += 16) {
        ahead.ask();
        // The last block reaches back over tokens that are done, so that all have the configured rows.
        const int at = tokens - t >= 16 || tokens < 16 ? t : tokens - 16, to = tokens < 16 ? tokens : 16;
        const uint8_t* x = act + at * a.stride;
        for (int half = 0; half < 2; half++) {
            if (at == t && to == 16)
                block_int8<kGroup, kMin, true>(tiles, u, half, groups, g0, a, x, 0, 16, acc + at * 32);
            else
                block_int8<kGroup, kMin, false>(tiles, u, half, groups, g0, a, x, t - at, to, acc + at * 32);
        }
    }
}

// As panel_int8, for more than a few tokens.
template <Format F>
void tiled_int8(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch, Reading) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    constexpr int kBytes = packed_block_bytes(I), kStep = kChunkK / I.packed_k, kGroups = I.packed_k / 32;
    static_assert(I.has_min == (I.offset_shift < 0), "codes are either unsigned with a min or recentred");
    const uint8_t* p = w.data + panel * w.panel_bytes;
    const uint8_t* act = a.base + t0 * a.stride;
    const int tokens = t1 - t0, rows = tokens < 16 ? tokens : 16, blocks = (tokens + 15) / 16;
    TileConfig config;
    for (int i = 0; i < 2; i++) {
        config.set(i, rows, 16);
        config.set(2 + i, 4, 64);
        config.set(4 + i, rows, 64);
        config.set(6 + i, rows, 64);
    }
    Tiles tiles(config);
    const Unpacked u = unpacked_at(scratch, I.kind == Kind::Grid && kGridVectors ? act_xt_at(a.k) : 0);
    const int share = (kStep * kBytes / 64 + blocks - 1) / blocks;
    for (int b = 0; b < w.kblocks; b += kStep) {
        const int n = w.kblocks - b < kStep ? w.kblocks - b : kStep;
        const uint8_t *slice = p + static_cast<size_t>(b) * kBytes, *next = slice + static_cast<size_t>(n) * kBytes;
        if constexpr (I.kind == Kind::Ternary)
            unpack_ternary<F>(slice, n, u);
        else if constexpr (I.kind == Kind::Grid)
            unpack_grid<F>(slice, n, u);
        else
            unpack_blocks<F>(slice, n, u);
        tiled_slice<I.group, I.has_min>(tiles, u, n * kGroups, b * kGroups, a, act, tokens, I.offset_shift, acc,
                                        {next, next + kStep * kBytes, share});
    }
}

// Integer kernels: unsigned codes times int8 activations. Inside the unit's namespace.
//
// All kernels add up in the same order (K ascending; per weight group: integer sums of two 16-value activation
// groups, each times its scale, then times the weight's scale, then the min's part), so a token's result does
// not depend on the kernel or on the batch that it arrives in.

// Once unpacked, formats of one group size, with or without mins, share a kernel.
// acc[t][32] (+)= unpacked groups [0, groups) times T tokens; g0 is the first group's index in K. shift: the format's
// offset_shift.
template <int kGroup, bool kMin, bool kWide, int T, int H>
void tile(const Unpacked& w, int groups, int g0, const ActView& a, const uint8_t* act, int shift, float* acc) {
    const size_t stride = a.stride;
    const int kp = a.k;
    for (int half = 0; half < 2; half += H) {
        VF sum[T][H];
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++)
            sum[t][h] = g0 == 0 ? setf(0.f) : ldf(acc + t * 32 + (half + h) * 16);
        const uint8_t* codes = w.codes + half * 64;
        const float *sc = w.scale + half * 16, *mn = w.min + half * 16;
        for (int g = 0; g < groups; g++, codes += 1024) {
            const int g16 = (g0 + g) * 2;
            const uint8_t* x = act + w.x_at + (g0 + g) * 32;
            VF part[T][H];
            UNR for (int s = 0; s < 2; s++) {
                VI dot[T][H];
                UNR for (int t = 0; t < T; t++) {
                    const VI start = seed<kMin, kWide>(ActRow{act + t * stride}, kp, g16 + s, shift);
                    UNR for (int h = 0; h < H; h++) dot[t][h] = start;
                }
                UNR for (int q = 0; q < 4; q++) {
                    Operand<kWide> v[H];
                    UNR for (int h = 0; h < H; h++) v[h] = operand<kWide>(ldi(codes + ((s * 4 + q) * 2 + h) * 64));
                    UNR for (int t = 0; t < T; t++) {
                        const VI x4 = bci(x + t * stride + s * 16 + q * 4);
                        UNR for (int h = 0; h < H; h++) dot[t][h] = dot4<kWide>(dot[t][h], v[h], x4);
                    }
                }
                UNR for (int t = 0; t < T; t++) {
                    const ActRow row{act + t * stride};
                    const VF scale = bcf(row.scale(kp, g16 + s));
                    UNR for (int h = 0; h < H; h++) {
                        const VF d = cvtif(dot[t][h]);
                        if (kGroup == 16) {
                            sum[t][h] = fma(mulf(d, scale), ldf(sc + s * 32 + h * 16), sum[t][h]);
                            if (kMin) sum[t][h] = fma(ldf(mn + s * 32 + h * 16), bcf(row.ssum(kp, g16 + s)), sum[t][h]);
                        } else {
                            part[t][h] = s == 0 ? mulf(d, scale) : fma(d, scale, part[t][h]);
                        }
                    }
                }
            }
            if (kGroup == 32) {
                UNR for (int t = 0; t < T; t++) {
                    const ActRow row{act + t * stride};
                    UNR for (int h = 0; h < H; h++) sum[t][h] = fma(part[t][h], ldf(sc + h * 16), sum[t][h]);
                    if (kMin) {
                        const VF m = bcf(row.ssum32(kp, g0 + g));
                        UNR for (int h = 0; h < H; h++) sum[t][h] = fma(ldf(mn + h * 16), m, sum[t][h]);
                    }
                }
            }
            sc += kGroup == 32 ? 32 : 64;
            mn += kGroup == 32 ? 32 : 64;
        }
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++) stf(acc + t * 32 + (half + h) * 16, sum[t][h]);
    }
}

// Where `direct` takes scales and mins from: each block's header, for few tokens ...
template <Format F>
struct HeaderScales {
    static constexpr bool kReadsAhead = true;
    using Block = typename Layout<F>::Header;
    int ahead;
    AI Block block(const uint8_t* p) { return Block(p); }
};
// ... or a slice's, unpacked once for many.
template <Format F>
struct SliceScales {
    static constexpr bool kReadsAhead = false;
    struct Block {
        const float *scales, *mins;
        AI void scale(int s, int h, VF& d, VF& m) const {
            d = ldf(scales + s * 32 + h * 16);
            m = Layout<F>::I.has_min ? ldf(mins + s * 32 + h * 16) : setf(0.f);
        }
    };
    const float *scale, *min;
    AI Block block(const uint8_t*) {
        const Block out{scale, min};
        scale += Layout<F>::kScales * 32, min += Layout<F>::kScales * 32;
        return out;
    }
};

// The same straight from the packed panel: codes are taken apart in registers, by other ports of the core than those that
// multiply them. Twice as many sums are under way as in a tile of as many tokens.
template <Format F, int T, class Scales>
void direct(const uint8_t* p, int blocks, int g0, const ActView& a, const uint8_t* act, Scales scales, float* acc) {
    using L = Layout<F>;
    constexpr const FormatInfo& I = L::I;
    // Each group asks for its share of a block's lines, the header's too.
    constexpr int kLines = L::kBytes / 64, kAsk = (kLines + L::kGroups - 1) / L::kGroups;
    const size_t stride = a.stride;
    const int kp = a.k;
    VF sum[T][2];
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++)
        sum[t][h] = g0 == 0 ? setf(0.f) : ldf(acc + t * 32 + h * 16);
    int g32 = g0;
    for (int b = 0; b < blocks; b++, p += L::kBytes) {
        const typename Scales::Block header = scales.block(p);
        const uint8_t* gp = p + I.header;
        for (int g = 0; g < L::kGroups; g++, g32++, gp += L::kGroupBytes) {
            const uint8_t* x = act + g32 * 32 + (I.kind == Kind::Grid ? act_xt_at(kp) : 0);
            VI dot[2][T][2];
            UNR for (int s = 0; s < 2; s++) UNR for (int t = 0; t < T; t++)
                dot[s][t][0] = dot[s][t][1] = seed<I.has_min, L::kWide>(ActRow{act + t * stride}, kp, g32 * 2 + s, I.offset_shift);
            if constexpr (Scales::kReadsAhead) {
                UNR for (int i = 0; i < kAsk; i++) touch(p + scales.ahead + (g * kLines / L::kGroups + i) * 64);
                if constexpr (asks_first(I, T)) asm volatile("" ::: "memory");
            }
            if constexpr (I.kind == Kind::Grid) {
                UNR for (int s = 0; s < 2; s++) {
                    VI v[4][2];
                    L::codes(p, g * 2 + s, v);
                    UNR for (int q = 0; q < 4; q++) UNR for (int t = 0; t < T; t++) {
                        const VI y = bci(x + t * stride + s * 16 + q * 4);
                        UNR for (int h = 0; h < 2; h++) dot[s][t][h] = dot4<L::kWide>(dot[s][t][h], v[q][h], y);
                    }
                }
            } else UNR for (int q = 0; q < 4; q++) UNR for (int s = 0; s < 2; s++) {
                const auto v0 = operand<L::kWide>(L::quad(gp, s * 4 + q, 0)), v1 = operand<L::kWide>(L::quad(gp, s * 4 + q, 1));
                UNR for (int t = 0; t < T; t++) {
                    const VI y = bci(x + t * stride + s * 16 + q * 4);
                    dot[s][t][0] = dot4<L::kWide>(dot[s][t][0], v0, y);
                    dot[s][t][1] = dot4<L::kWide>(dot[s][t][1], v1, y);
                }
            }
            UNR for (int h = 0; h < 2; h++) {
                VF d, m;
                if (I.group == 32) {
                    header.scale(g, h, d, m);
                    UNR for (int t = 0; t < T; t++) {
                        const ActRow row{act + t * stride};
                        VF part = mulf(cvtif(dot[0][t][h]), bcf(row.scale(kp, g32 * 2)));
                        part = fma(cvtif(dot[1][t][h]), bcf(row.scale(kp, g32 * 2 + 1)), part);
                        sum[t][h] = fma(part, d, sum[t][h]);
                        if (I.has_min) sum[t][h] = fma(m, bcf(row.ssum32(kp, g32)), sum[t][h]);
                    }
                } else {
                    UNR for (int s = 0; s < 2; s++) {
                        header.scale(g * 2 + s, h, d, m);
                        UNR for (int t = 0; t < T; t++) {
                            const ActRow row{act + t * stride};
                            const VF part = mulf(cvtif(dot[s][t][h]), bcf(row.scale(kp, g32 * 2 + s)));
                            sum[t][h] = fma(part, d, sum[t][h]);
                            if (I.has_min) sum[t][h] = fma(m, bcf(row.ssum(kp, g32 * 2 + s)), sum[t][h]);
                        }
                    }
                }
            }
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++) stf(acc + t * 32 + h * 16, sum[t][h]);
}

// Scratch of an unpacked slice.
AI Unpacked unpacked_at(uint8_t* scratch, size_t x_at) {
    float* scale = reinterpret_cast<float*>(scratch + kChunkK * kPanelRows);
    return {scratch, scale, scale + kChunkK / 16 * kPanelRows, x_at};
}

// Lines of the next slice, asked for while tiles run: `share` of them before each.
struct Ahead {
    const uint8_t *next = nullptr, *end = nullptr;
    int share = 0;
    AI void ask() {
        for (int i = 0; i < share && next < end; i++, next += 64) touch(next);
    }
};

// All tokens over an unpacked slice of `groups` groups that begins at group g0 of K.
template <int kGroup, bool kMin, bool kWide>
void run_tiles(const Unpacked& u, int groups, int g0, const ActView& a, const uint8_t* act, int tokens, int shift, float* acc,
               Ahead ahead) {
    // Tiles of like size: a small one at the end would load as much for less.
    const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
    for (int i = 0, t = 0; i < tiles; i++) {
        const int n = (tokens - t + tiles - i - 1) / (tiles - i);
        ahead.ask();
        const uint8_t* x = act + t * a.stride;
        switch (n) {
            case 1: tile<kGroup, kMin, kWide, 1, kTileHalves>(u, groups, g0, a, x, shift, acc + t * 32); break;
            case 2: tile<kGroup, kMin, kWide, 2, kTileHalves>(u, groups, g0, a, x, shift, acc + t * 32); break;
            case 3: tile<kGroup, kMin, kWide, 3, kTileHalves>(u, groups, g0, a, x, shift, acc + t * 32); break;
            case 4: tile<kGroup, kMin, kWide, 4, kTileHalves>(u, groups, g0, a, x, shift, acc + t * 32); break;
            default: tile<kGroup, kMin, kWide, kTileTokens, kTileHalves>(u, groups, g0, a, x, shift, acc + t * 32); break;
        }
        t += n;
    }
}

template <Format F, int T, class Scales>
AI void direct_tile(const uint8_t* p, int blocks, int g0, const ActView& a, const uint8_t* act, Scales scales, float* acc) {
    if constexpr (kFormats[static_cast<int>(F)].kind == Kind::Ternary)
        direct_ternary<F, T>(p, blocks, a, act, scales.ahead, acc);
    else
        direct<F, T>(p, blocks, g0, a, act, scales, acc);
}

// All tokens, four at once, over blocks from group g0 of K on.
template <Format F, class Scales>
AI void run_direct(const uint8_t* p, int blocks, int g0, const ActView& a, const uint8_t* act, int tokens, Scales scales,
                   float* acc, Ahead ahead) {
    const int tiles = (tokens + kDirectTokens - 1) / kDirectTokens;
    for (int i = 0, t = 0; i < tiles; i++) {
        const int n = (tokens - t + tiles - i - 1) / (tiles - i);
        ahead.ask();
        const uint8_t* x = act + t * a.stride;
        switch (n) {
            case 1: direct_tile<F, 1>(p, blocks, g0, a, x, scales, acc + t * 32); break;
            case 2: direct_tile<F, 2>(p, blocks, g0, a, x, scales, acc + t * 32); break;
            case 3: direct_tile<F, 3>(p, blocks, g0, a, x, scales, acc + t * 32); break;
            case 4: direct_tile<F, 4>(p, blocks, g0, a, x, scales, acc + t * 32); break;
            default: direct_tile<F, kDirectTokens>(p, blocks, g0, a, x, scales, acc + t * 32); break;
        }
        t += n;
    }
}

template <Format F>
void panel_int8(const PackedView& w, int panel, const ActView& a, int t0, int t1, float* acc, uint8_t* scratch,
                Reading how) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    constexpr int kBytes = packed_block_bytes(I), kStep = kChunkK / I.packed_k, kGroups = I.packed_k / 32;
    const uint8_t* p = w.data + panel * w.panel_bytes;
    const uint8_t* act = a.base + t0 * a.stride;
    const int tokens = t1 - t0;
    constexpr bool kGrid = I.kind == Kind::Grid;
    if constexpr (!kGrid || kGridVectors)
        if (tokens <= how.few) {
            // several passes over the panel: what lies far ahead comes while they multiply
            const int ahead = tokens > kDirectTokens ? kReadAhead : how.ahead;
            return run_direct<F>(p, w.kblocks, 0, a, act, tokens, HeaderScales<F>{ahead}, acc, Ahead{});
        }
    if constexpr (kGrid && kGridBytes)
        if (tokens <= how.few) return grid_direct<F>(p, w.kblocks, a, act, tokens, acc);
    const Unpacked u = unpacked_at(scratch, kGrid && kGridVectors ? act_xt_at(a.k) : 0);
    constexpr bool kDirect = kDirectMany && !kGrid && I.kind != Kind::Ternary;
    constexpr int kAtOnce = kDirect ? kDirectTokens : kTileTokens;
    const int share = (kStep * kBytes / 64 * kAtOnce + tokens - 1) / tokens;
    for (int b = 0; b < w.kblocks; b += kStep) {
        const int n = w.kblocks - b < kStep ? w.kblocks - b : kStep;
        const uint8_t* slice = p + static_cast<size_t>(b) * kBytes;
        // The next step's bytes (behind the last step lies the next panel) arrive while this one's tiles run.
        const uint8_t* next = slice + static_cast<size_t>(n) * kBytes;
        const Ahead ahead{next, next + kStep * kBytes, share};
        if constexpr (kDirect) {
            unpack_scales<F>(slice, n, u);
            run_direct<F>(slice, n, b * kGroups, a, act, tokens, SliceScales<F>{u.scale, u.min}, acc, ahead);
        } else {
            if constexpr (I.kind == Kind::Ternary)
                unpack_ternary<F>(slice, n, u);
            else if constexpr (kGrid)
                unpack_grid<F>(slice, n, u);
            else
                unpack_blocks<F>(slice, n, u);
            run_tiles<I.group, I.has_min, wide_codes(I)>(u, n * kGroups, b * kGroups, a, act, tokens, I.offset_shift, acc, ahead);
        }
    }
}

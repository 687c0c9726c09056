// Float weights times inputs rounded to bfloat16, where the CPU has dot products of such pairs. Inside the unit's
// namespace. K ascends in pairs, one accumulator a row and token (FP8: one for each 128 values, scaled afterwards), so a
// row's result does not depend on the tokens beside it.
constexpr int kBfTokens = 12, kBfStep = 256;  // a step's weights (16 KB) and inputs (6 KB) share L1

// Bytes of the bfloat16 of every FP8 E4M3 magnitude; 0x7f is NaN.
struct Table128 {
    uint8_t byte[128];
};
constexpr Table128 e4m3_table(int shift) {
    Table128 t{};
    for (int c = 0; c < 128; c++) {
        int bits = ((c >> 3) + 120) << 7 | (c & 7) << 4;
        if (c < 8) {  // c * 2^-9: its leading bit becomes the exponent
            int top = c >= 4 ? 2 : c >= 2 ? 1 : 0;
            bits = c == 0 ? 0 : (118 + top) << 7 | ((c << (7 - top)) & 0x7f);
        }
        if (c == 127) bits = 0x7fc0;
        t.byte[c] = static_cast<uint8_t>(bits >> shift);
    }
    return t;
}
constexpr Table128 kE4m3Low = e4m3_table(0), kE4m3High = e4m3_table(8);

// n values of each row as bfloat16, zeros up to a multiple of 32.
inline void round_rows(const float* x, size_t ldx, int tokens, int n, uint16_t* out, size_t ldo) {
    for (int t = 0; t < tokens; t++, x += ldx, out += ldo) {
        int i = 0;
        for (; i + 16 <= n; i += 16) stb(out + i, ldf(x + i));
        if (i < n) {
            float tail[16] = {};
            for (int j = i; j < n; j++) tail[j - i] = x[j];
            stb(out + i, ldf(tail));
            i += 16;
        }
        if (i < (n + 31) / 32 * 32) stb(out + i, setf(0.f));
    }
}

// sum[t][h] += pairs of w [pair][2][64] times rows of x, ldx apart.
template <int T, bool kStream>
AI void dot_pairs(const uint8_t* w, int pairs, const uint16_t* x, size_t ldx, VF (*sum)[2]) {
    for (int i = 0; i < pairs; i++, w += 128) {
        if (kStream) {
            touch(w + kReadAhead);
            touch(w + kReadAhead + 64);
        }
        const VI w0 = ldi(w), w1 = ldi(w + 64);
        UNR for (int t = 0; t < T; t++) {
            const VI a = bci(x + t * ldx + i * 2);
            sum[t][0] = dotbf(sum[t][0], w0, a);
            sum[t][1] = dotbf(sum[t][1], w1, a);
        }
    }
}

template <Format F, int T, bool kStream>
void tile_bf16(const uint8_t* w, const float* scale, int n, const uint16_t* x, size_t ldx, float* acc, bool first) {
    VF sum[T][2];
    if constexpr (F == Format::BF16) {
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++)
            sum[t][h] = first ? setf(0.f) : ldf(acc + t * 32 + h * 16);
        dot_pairs<T, kStream>(w, n / 2, x, ldx, sum);
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++) stf(acc + t * 32 + h * 16, sum[t][h]);
    } else {
        constexpr int kGroup = kFormats[static_cast<int>(F)].packed_k;
        for (int k = 0; k < n; k += kGroup, w += kGroup * 64, x += kGroup, scale += kPanelRows, first = false) {
            UNR for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = setf(0.f);
            dot_pairs<T, false>(w, kGroup / 2, x, ldx, sum);
            UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++) {
                float* to = acc + t * 32 + h * 16;
                stf(to, fma(sum[t][h], ldf(scale + h * 16), first ? setf(0.f) : ldf(to)));
            }
        }
    }
}

template <Format F, bool kStream>
AI void tiles_bf16(const uint8_t* w, const float* scale, int n, const uint16_t* x, size_t ldx, int tokens, float* acc,
                   bool first) {
    switch (tokens) {
        case 1: return tile_bf16<F, 1, kStream>(w, scale, n, x, ldx, acc, first);
        case 2: return tile_bf16<F, 2, kStream>(w, scale, n, x, ldx, acc, first);
        case 3: return tile_bf16<F, 3, kStream>(w, scale, n, x, ldx, acc, first);
        case 4: return tile_bf16<F, 4, kStream>(w, scale, n, x, ldx, acc, first);
        case 5: return tile_bf16<F, 5, kStream>(w, scale, n, x, ldx, acc, first);
        case 6: return tile_bf16<F, 6, kStream>(w, scale, n, x, ldx, acc, first);
        case 7: return tile_bf16<F, 7, kStream>(w, scale, n, x, ldx, acc, first);
        case 8: return tile_bf16<F, 8, kStream>(w, scale, n, x, ldx, acc, first);
        case 9: return tile_bf16<F, 9, kStream>(w, scale, n, x, ldx, acc, first);
        case 10: return tile_bf16<F, 10, kStream>(w, scale, n, x, ldx, acc, first);
        case 11: return tile_bf16<F, 11, kStream>(w, scale, n, x, ldx, acc, first);
        default: return tile_bf16<F, kBfTokens, kStream>(w, scale, n, x, ldx, acc, first);
    }
}

// Four FP8 codes a lane as bfloat16 pairs: even bytes, odd bytes. Exact, subnormals included.
AI void e4m3_pairs(VI v, VI& even, VI& odd) {
    if constexpr (kHasTables128) {
        // Both halves of each bfloat16 by table, then the sign.
        const VI low = lookup128(v, kE4m3Low.byte), high = ori(lookup128(v, kE4m3High.byte), andi(v, seti(static_cast<int>(0x80808080))));
        const VI mask = seti(0x00ff00ff);
        even = ori(andi(low, mask), sll(andi(high, mask), 8));
        odd = ori(andi(srl(low, 8), mask), andi(high, seti(~0x00ff00ff)));
    } else {
        even = pairbf(e4m3_f32(v), e4m3_f32(srl(v, 16)));
        odd = pairbf(e4m3_f32(srl(v, 8)), e4m3_f32(srl(v, 24)));
    }
}

// Codes of an FP8 block of so many values, behind its scales, as bfloat16 pairs [kGroup / 2][2][64].
template <int kGroup>
AI void unpack_fp8(const uint8_t* block, uint8_t* out) {
    block += kPanelRows * sizeof(float);
    for (int q = 0; q < kGroup / 2; q++, block += 64) {
        VI even, odd;
        e4m3_pairs(ldi(block), even, odd);
        uint8_t* to = out + (q / 2) * 256 + (q % 2) * 64;
        sti(to, even);
        sti(to + 128, odd);
    }
}

// Few tokens straight from FP8 blocks, which hold quads [group / 4][2][64] behind their scales.
template <Format F, int T>
void gemv_fp8(const uint8_t* p, int blocks, const float* x, size_t ldx, float* acc) {
    constexpr int kBytes = packed_block_bytes(kFormats[static_cast<int>(F)]);
    constexpr int kGroup = kFormats[static_cast<int>(F)].packed_k;
    uint16_t in[T * kGroup];
    VF total[T][2];
    UNR for (int t = 0; t < T; t++) total[t][0] = total[t][1] = setf(0.f);
    for (int b = 0; b < blocks; b++, p += kBytes, x += kGroup) {
        round_rows(x, ldx, T, kGroup, in, kGroup);
        VF sum[T][2];
        UNR for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = setf(0.f);
        touch(p + kReadAhead);
        touch(p + kReadAhead + 64);
        for (int q = 0; q < kGroup / 4; q++) {
            const uint8_t* codes = p + 128 + q * 128;
            touch(codes + kReadAhead);
            touch(codes + kReadAhead + 64);
            VI w[2][2];
            UNR for (int h = 0; h < 2; h++) e4m3_pairs(ldi(codes + h * 64), w[0][h], w[1][h]);
            UNR for (int i = 0; i < 2; i++) UNR for (int t = 0; t < T; t++) {
                const VI a = bci(in + t * kGroup + q * 4 + i * 2);
                UNR for (int h = 0; h < 2; h++) sum[t][h] = dotbf(sum[t][h], w[i][h], a);
            }
        }
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++)
            total[t][h] = fma(sum[t][h], ldf(reinterpret_cast<const float*>(p) + h * 16), total[t][h]);
    }
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++) stf(acc + t * 32 + h * 16, total[t][h]);
}

template <Format F>
void panel_bf16(const PackedView& w, int panel, const FloatRows& rows, int t0, int tokens, float* acc, uint8_t* scratch) {
    const float* x = rows.x + t0 * rows.ldx;
    const size_t ldx = rows.ldx;
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    constexpr int kStepBytes = packed_block_bytes(I) * kBfStep / I.packed_k;
    const uint8_t* p = w.data + panel * w.panel_bytes;
    if constexpr (is_fp8(F)) switch (tokens) {
            case 1: return gemv_fp8<F, 1>(p, w.kblocks, x, ldx, acc);
            case 2: return gemv_fp8<F, 2>(p, w.kblocks, x, ldx, acc);
            case 3: return gemv_fp8<F, 3>(p, w.kblocks, x, ldx, acc);
            case 4: return gemv_fp8<F, 4>(p, w.kblocks, x, ldx, acc);
            default: break;
        }
    uint16_t* in = reinterpret_cast<uint16_t*>(scratch);
    uint8_t* pairs = scratch + kBfTokens * kBfStep * 2;
    float* scale = reinterpret_cast<float*>(pairs + kBfStep * kPanelRows * 2);
    const int share = (kStepBytes / 64 * kBfTokens + tokens - 1) / tokens;
    for (int k = 0; k < w.cols; k += kBfStep, p += kStepBytes) {
        const int left = w.cols - k < kBfStep ? w.cols - k : kBfStep, n = (left + 31) / 32 * 32;
        const uint8_t* pair = p;
        if constexpr (is_fp8(F)) {
            for (int g = 0; g * I.packed_k < n; g++) {
                const uint8_t* block = p + g * packed_block_bytes(I);
                unpack_fp8<I.packed_k>(block, pairs + g * I.packed_k * 64);
                __builtin_memcpy(scale + g * kPanelRows, block, 128);
            }
            pair = pairs;
        }
        Ahead ahead{p + kStepBytes, p + 2 * kStepBytes, share};
        for (int t = 0; t < tokens; t += kBfTokens) {
            const int m = tokens - t < kBfTokens ? tokens - t : kBfTokens;
            const bool whole = rows.rounded != nullptr;
            const uint16_t* from = whole ? rows.rounded + (t0 + t) * rows.ld_rounded + k : in;
            const size_t ld = whole ? rows.ld_rounded : kBfStep;
            if (!whole) round_rows(x + t * ldx + k, ldx, m, left, in, ld);
            if (tokens <= kBfTokens && F == Format::BF16) {
                tiles_bf16<F, true>(pair, scale, n, from, ld, m, acc, k == 0);
            } else {
                ahead.ask();
                tiles_bf16<F, false>(pair, scale, n, from, ld, m, acc + t * 32, k == 0);
            }
        }
    }
}

template <Format F>
void panel_mixed(const PackedView& w, int panel, const FloatRows& rows, int t0, int t1, float* acc, uint8_t* scratch) {
    if constexpr (kHasBf16 && (F == Format::BF16 || is_fp8(F)))
        panel_bf16<F>(w, panel, rows, t0, t1 - t0, acc, scratch);
    else
        panel_float<F>(w, panel, rows.x, rows.ldx, t0, t1, acc, scratch);
}

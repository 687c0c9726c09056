// Float kernels: C[t][c] (+)= sum over k of x[t][k] * w[k][c], for exact mode, float formats and attention.
// Inside the unit's namespace. K ascends, one fused multiply-add a step: a row's result does not depend on T.
template <int T, int N>
AI void tile_f32(const float* w, size_t ldw, const float* x, size_t ldx, int k, float* c, size_t ldc, bool first) {
    VF sum[T][N];
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++)
        sum[t][n] = first ? setf(0.f) : ldf(c + t * ldc + n * 16);
    for (int i = 0; i < k; i++, w += ldw) {
        VF v[N];
        UNR for (int n = 0; n < N; n++) v[n] = ldf(w + n * 16);
        UNR for (int t = 0; t < T; t++) {
            const VF a = bcf(x + t * ldx + i);
            UNR for (int n = 0; n < N; n++) sum[t][n] = fma(a, v[n], sum[t][n]);
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) stf(c + t * ldc + n * 16, sum[t][n]);
}

template <int N>
void rows_f32(const float* w, size_t ldw, const float* x, size_t ldx, int tokens, int k, float* c, size_t ldc, bool first) {
    int t = 0;
    for (; t + kF32Tokens <= tokens; t += kF32Tokens)
        tile_f32<kF32Tokens, N>(w, ldw, x + t * ldx, ldx, k, c + t * ldc, ldc, first);
    x += t * ldx;
    c += t * ldc;
    switch (tokens - t) {
        case 1: return tile_f32<1, N>(w, ldw, x, ldx, k, c, ldc, first);
        case 2: return tile_f32<2, N>(w, ldw, x, ldx, k, c, ldc, first);
        case 3: return tile_f32<3, N>(w, ldw, x, ldx, k, c, ldc, first);
        case 4: return tile_f32<4, N>(w, ldw, x, ldx, k, c, ldc, first);
        case 5: return tile_f32<5, N>(w, ldw, x, ldx, k, c, ldc, first);
        default: return;
    }
}

// cols: a multiple of 16.
AI void gemm_f32(const float* w, size_t ldw, const float* x, size_t ldx, int tokens, int k, float* c, size_t ldc, int cols,
                 bool first) {
    int n = 0;
    for (; n + kF32Vectors * 16 <= cols; n += kF32Vectors * 16)
        rows_f32<kF32Vectors>(w + n, ldw, x, ldx, tokens, k, c + n, ldc, first);
    for (; n + 32 <= cols; n += 32) rows_f32<2>(w + n, ldw, x, ldx, tokens, k, c + n, ldc, first);
    for (; n < cols; n += 16) rows_f32<1>(w + n, ldw, x, ldx, tokens, k, c + n, ldc, first);
}

// Floats of the FP8 E4M3 codes in the lanes' lowest bytes, subnormals included: the seven bits of a magnitude, put where a
// float's exponent and mantissa are, are 2^-120 of its value.
AI VF e4m3_f32(VI v) {
    const VI bits = ori(sll(andi(v, seti(0x80)), 24), sll(andi(v, seti(0x7f)), 20));
    return mulf(castf(bits), setf(0x1p120f));
}

// Float formats: the weights of four neighbouring k, from k4 * 4 on, of both row halves.
template <Format F>
AI void quad_f32(const uint8_t* panel, int k4, VF (*w)[2]) {
    const size_t at = static_cast<size_t>(k4) * 4 * kPanelRows;
    UNR for (int h = 0; h < 2; h++) {
        if constexpr (F == Format::F32) {
            const float* p = reinterpret_cast<const float*>(panel) + at + h * 16;
            UNR for (int j = 0; j < 4; j++) w[j][h] = ldf(p + j * kPanelRows);
        } else if constexpr (F == Format::F16) {
            const uint16_t* p = reinterpret_cast<const uint16_t*>(panel) + at + h * 16;
            UNR for (int j = 0; j < 4; j++) w[j][h] = ldh(p + j * kPanelRows);
        } else if constexpr (F == Format::BF16) {
            UNR for (int j = 0; j < 4; j += 2) {
                const VI v = ldi(panel + at * 2 + j * 64 + h * 64);
                w[j][h] = castf(sll(v, 16));
                w[j + 1][h] = castf(andi(v, seti(INT32_MIN >> 15)));
            }
        } else {
            static_assert(is_fp8(F), "a float format without a kernel");
            constexpr int kBytes = packed_block_bytes(kFormats[static_cast<int>(F)]), kQuads = kFormats[static_cast<int>(F)].packed_k / 4;
            const uint8_t* p = panel + static_cast<size_t>(k4 / kQuads) * kBytes;
            const VF scale = ldf(reinterpret_cast<const float*>(p) + h * 16);
            const VI v = ldi(p + 128 + (k4 % kQuads) * 128 + h * 64);
            UNR for (int j = 0; j < 4; j++) {
                const int byte = j == 0 || j == 3 ? j : 3 - j;
                w[j][h] = mulf(e4m3_f32(srl(v, 8 * byte)), scale);
            }
        }
    }
}

// One 32-value group of a panel as floats [32 k][32 rows].
template <Format F>
AI void group_f32(const uint8_t* panel, int g32, float* out) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    constexpr int kGroups = I.packed_k / 32;
    const uint8_t* block = panel + static_cast<size_t>(g32 / kGroups) * packed_block_bytes(I);
    if constexpr (I.kind == Kind::Float) {
        for (int q = 0; q < 8; q++) {
            VF w[4][2];
            quad_f32<F>(panel, g32 * 8 + q, w);
            UNR for (int j = 0; j < 4; j++) UNR for (int h = 0; h < 2; h++) stf(out + (q * 4 + j) * 32 + h * 16, w[j][h]);
        }
    } else if constexpr (I.kind == Kind::Grid) {
        int8_t codes[256];
        float scale[16];
        for (int r = 0; r < kPanelRows; r++) {
            grid_int8(F, block, r, codes, scale);
            for (int k = 0; k < 32; k++) {
                const int at = g32 % kGroups * 32 + k;
                out[k * kPanelRows + r] = static_cast<float>(codes[at]) * scale[at / 16];
            }
        }
    } else {
        unpack_group_f32<F>(block, g32 % kGroups, out);
    }
}

// Few tokens over a float panel, straight from it: the order of additions is the tile's.
template <Format F, int T>
void gemv_f32(const uint8_t* panel, const float* x, size_t ldx, int quads, float* acc) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    constexpr int kQuadBytes = packed_block_bytes(I) * 4 / I.packed_k;
    VF sum[T][2];
    UNR for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = setf(0.f);
    for (int q = 0; q < quads; q++) {
        const uint8_t* ahead = panel + static_cast<size_t>(q) * kQuadBytes + kReadAhead;
        UNR for (int i = 0; i < kQuadBytes; i += 64) touch(ahead + i);
        VF w[4][2];
        quad_f32<F>(panel, q, w);
        UNR for (int j = 0; j < 4; j++) UNR for (int t = 0; t < T; t++) {
            const VF a = bcf(x + t * ldx + q * 4 + j);
            sum[t][0] = fma(a, w[j][0], sum[t][0]);
            sum[t][1] = fma(a, w[j][1], sum[t][1]);
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < 2; h++) stf(acc + t * 32 + h * 16, sum[t][h]);
}

// x has w.cols values a row; the panel's padding beyond them is never read.
template <Format F>
void panel_float(const PackedView& w, int panel, const float* x, size_t ldx, int t0, int t1, float* acc, uint8_t* scratch) {
    const uint8_t* p = w.data + panel * w.panel_bytes;
    float* buf = reinterpret_cast<float*>(scratch);
    x += t0 * ldx;
    const int tokens = t1 - t0;
    int k = 0;
    if constexpr (kFormats[static_cast<int>(F)].kind == Kind::Float) {
        if (tokens <= 4) {
            k = w.cols / 4 * 4;
            switch (tokens) {
                case 1: gemv_f32<F, 1>(p, x, ldx, k / 4, acc); break;
                case 2: gemv_f32<F, 2>(p, x, ldx, k / 4, acc); break;
                case 3: gemv_f32<F, 3>(p, x, ldx, k / 4, acc); break;
                default: gemv_f32<F, 4>(p, x, ldx, k / 4, acc); break;
            }
        }
        if (k > 0 && k < w.cols) {
            group_f32<F>(p, k / 32, buf);
            gemm_f32(buf + k % 32 * 32, 32, x + k, ldx, tokens, w.cols - k, acc, 32, 32, false);
            return;
        }
    }
    constexpr int kStep = kChunkK / 2;
    for (; k < w.cols; k += kStep) {
        const int n = w.cols - k < kStep ? w.cols - k : kStep;
        for (int g = 0; g * 32 < n; g++) group_f32<F>(p, k / 32 + g, buf + g * 1024);
        gemm_f32(buf, 32, x + k, ldx, tokens, n, acc, 32, 32, k == 0);
    }
}

template <Format F>
void panel_unpack(const PackedView& w, int panel, float* out, uint8_t*) {
    const uint8_t* p = w.data + panel * w.panel_bytes;
    const int groups = w.kblocks * kFormats[static_cast<int>(F)].packed_k / 32;
    for (int g = 0; g < groups; g++) group_f32<F>(p, g, out + g * 1024);
}

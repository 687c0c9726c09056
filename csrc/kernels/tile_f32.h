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

// One 32-value group of a panel as floats [32 k][32 rows].
template <Format F>
AI void group_f32(const uint8_t* panel, int g32, float* out) {
    if constexpr (F == Format::F32) {
        __builtin_memcpy(out, panel + static_cast<size_t>(g32) * 4096, 4096);
    } else if constexpr (F == Format::F16 || F == Format::BF16) {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(panel) + static_cast<size_t>(g32) * 1024;
        for (int i = 0; i < 1024; i += 16) stf(out + i, F == Format::F16 ? ldh(p + i) : ldb(p + i));
    } else {
        using L = Layout<F>;
        unpack_group_f32<F>(panel + static_cast<size_t>(g32 / L::kGroups) * L::kBytes, g32 % L::kGroups, out);
    }
}

// x has w.cols values a row; the panel's padding beyond them is never read.
template <Format F>
void panel_float(const PackedView& w, int panel, const float* x, size_t ldx, int t0, int t1, float* acc, uint8_t* scratch) {
    const uint8_t* p = w.data + panel * w.panel_bytes;
    float* buf = reinterpret_cast<float*>(scratch);
    constexpr int kStep = kChunkK / 2;
    for (int k = 0; k < w.cols; k += kStep) {
        const int n = w.cols - k < kStep ? w.cols - k : kStep;
        for (int g = 0; g * 32 < n; g++) group_f32<F>(p, k / 32 + g, buf + g * 1024);
        gemm_f32(buf, 32, x + t0 * ldx + k, ldx, t1 - t0, n, acc, 32, 32, k == 0);
    }
}

template <Format F>
void panel_unpack(const PackedView& w, int panel, float* out, uint8_t*) {
    const uint8_t* p = w.data + panel * w.panel_bytes;
    const int groups = w.kblocks * kFormats[static_cast<int>(F)].packed_k / 32;
    for (int g = 0; g < groups; g++) group_f32<F>(p, g, out + g * 1024);
}

// Row-wise work between the matrix products: normalise, quantise, activate, rotate, store. Inside the namespace.

// exp2 by a polynomial on [-0.5, 0.5]; relative error below 2e-7. Below -126 the result is zero or subnormal.
AI VF exp2v(VF x) {
    x = maxf(setf(-150.f), x);  // the second operand is the result where one is NaN
    const VF n = roundv(x), f = subf(x, n);
    VF p = setf(1.535336188e-4f);
    p = fma(p, f, setf(1.339887440e-3f));
    p = fma(p, f, setf(9.618437357e-3f));
    p = fma(p, f, setf(5.550332548e-2f));
    p = fma(p, f, setf(2.402264791e-1f));
    p = fma(p, f, setf(6.931472028e-1f));
    p = fma(p, f, setf(1.f));
    return scale2(p, n);
}

// 1 / (1 + exp(-x)), with the exponent clamped so that nothing overflows.
AI VF sigmoid(VF x) {
    const VF z = maxf(setf(-126.f), mulf(x, setf(-1.44269504f)));
    const VF top = setf(126.f);
    const VF clamped = subf(setf(0.f), maxf(subf(setf(0.f), top), subf(setf(0.f), z)));
    return divf(setf(1.f), addf(setf(1.f), exp2v(clamped)));
}

AI VF activate(VF g, Activation act) {
    if (act == Activation::Relu) return maxf(setf(0.f), g);  // in this order NaN stays
    if (act == Activation::Silu) return mulf(g, sigmoid(g));
    // 0.5 g (1 + tanh(u)) = g * sigmoid(2 u), u = sqrt(2/pi) (g + 0.044715 g^3)
    const VF u = mulf(g, fma(mulf(g, g), setf(0.044715f), setf(1.f)));
    return mulf(g, sigmoid(mulf(u, setf(1.5957691216f))));
}

// Sixteen values to one activation group. A group that holds NaN or Inf has no codes: its scale, NaN or Inf, times
// their zero makes every product with it NaN. Below 2^-120 (where 127 / top overflows) values count as zero.
AI void quantize16(VF x, const ActView& a, uint8_t* record, int g16, float& s_sum) {
    const float top = hmaxabs(x);
    const bool usable = top >= 0x1p-120f && top <= 3.40282347e38f;
    const VI q = usable ? cvtfi(mulf(x, setf(127.f / top))) : seti(0);
    st8(reinterpret_cast<int8_t*>(record) + g16 * 16, q);
    keep_transposed(record + act_xt_at(a.k) + g16 * 16, q);
    const int sum = hsumi(q);
    const float scale = top / 127.f;
    reinterpret_cast<float*>(record + act_scale_at(a.k))[g16] = scale;
    reinterpret_cast<int32_t*>(record + act_nsum_at(a.k))[g16] = -sum;
    s_sum = scale * static_cast<float>(sum);
    reinterpret_cast<float*>(record + act_ssum_at(a.k))[g16] = s_sum;
}

AI void quantize32(VF x0, VF x1, const ActView& a, uint8_t* record, int g32) {
    float s0, s1;
    quantize16(x0, a, record, g32 * 2, s0);
    quantize16(x1, a, record, g32 * 2 + 1, s1);
    reinterpret_cast<float*>(record + act_ssum32_at(a.k))[g32] = s0 + s1;
}

// Up to 16 values, zeros behind them.
AI VF load_part(const float* p, int n) {
    if (n >= 16) return ldf(p);
    float tmp[16] = {};
    for (int i = 0; i < n; i++) tmp[i] = p[i];
    return ldf(tmp);
}
AI void store_part(float* p, VF x, int n) {
    if (n >= 16) return stf(p, x);
    float tmp[16];
    stf(tmp, x);
    for (int i = 0; i < n; i++) p[i] = tmp[i];
}

AI float inverse_rms(const float* x, int n, float eps) {
    VF s0 = setf(0.f), s1 = setf(0.f);
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        const VF a = ldf(x + i), b = ldf(x + i + 16);
        s0 = fma(a, a, s0);
        s1 = fma(b, b, s1);
    }
    for (; i < n; i += 16) {
        const VF a = load_part(x + i, n - i);
        s0 = fma(a, a, s0);
    }
    return 1.f / sqrt1(hsum(addf(s0, s1)) / static_cast<float>(n) + eps);
}

inline void quantize_row(const float* x, int n, const float* weight, float eps, const ActView& a, int row) {
    uint8_t* record = a.base + row * a.stride;
    const VF r = setf(weight ? inverse_rms(x, n, eps) : 1.f);
    for (int i = 0; i < a.k; i += 32) {
        VF v[2];
        UNR for (int j = 0; j < 2; j++) {
            const int at = i + j * 16;
            v[j] = at < n ? load_part(x + at, n - at) : setf(0.f);
            if (weight && at < n) v[j] = mulf(mulf(v[j], r), load_part(weight + at, n - at));
        }
        quantize32(v[0], v[1], a, record, i / 32);
    }
}

inline void rms_norm_row(const float* x, int n, const float* weight, float eps, float* out, int padded) {
    const VF r = setf(inverse_rms(x, n, eps));
    for (int i = 0; i < n; i += 16)
        store_part(out + i, mulf(mulf(load_part(x + i, n - i), r), load_part(weight + i, n - i)), n - i);
    for (int i = n; i < padded; i++) out[i] = 0.f;
}

inline void store_rows(const float* acc, int tokens, int rows, float* out, size_t ldo, const float* bias,
                       const float* residual, size_t ldr) {
    for (int t = 0; t < tokens; t++, acc += 32)
        for (int r = 0; r < rows; r += 16) {
            VF v = ldf(acc + r);
            if (bias) v = addf(v, load_part(bias + r, rows - r));
            if (residual) v = addf(v, load_part(residual + t * ldr + r, rows - r));
            store_part(out + t * ldo + r, v, rows - r);
        }
}

inline void accumulate_rows(const float* acc, int count, int rows, float* out, size_t ldo, const int32_t* token,
                            const float* weight) {
    for (int i = 0; i < count; i++, acc += 32) {
        float* to = out + static_cast<size_t>(token[i]) * ldo;
        const VF w = setf(weight[i]);
        for (int r = 0; r < rows; r += 16)
            store_part(to + r, fma(w, ldf(acc + r), load_part(to + r, rows - r)), rows - r);
    }
}

inline void gated_quantize_rows(const float* gate, const float* up, int tokens, Activation act, const ActView& a, int t0,
                                int row0) {
    for (int t = 0; t < tokens; t++, gate += 32, up += 32)
        quantize32(mulf(activate(ldf(gate), act), ldf(up)), mulf(activate(ldf(gate + 16), act), ldf(up + 16)), a,
                   a.base + (t0 + t) * a.stride, row0 / 32);
}

inline void gated_store_rows(const float* gate, const float* up, int tokens, int rows, Activation act, float* out,
                             size_t ldo) {
    for (int t = 0; t < tokens; t++, gate += 32, up += 32)
        for (int r = 0; r < rows; r += 16)
            store_part(out + t * ldo + r, mulf(activate(ldf(gate + r), act), ldf(up + r)), rows - r);
}

inline void rope_row(float* x, int width, const float* cosine, const float* sine, bool interleaved) {
    const int half = width / 2;
    int i = 0;
    if (!interleaved) {
        for (; i + 16 <= half; i += 16) {
            const VF a = ldf(x + i), b = ldf(x + half + i), c = ldf(cosine + i), s = ldf(sine + i);
            stf(x + i, subf(mulf(a, c), mulf(b, s)));
            stf(x + half + i, addf(mulf(b, c), mulf(a, s)));
        }
    }
    for (; i < half; i++) {
        float& a = x[interleaved ? 2 * i : i];
        float& b = x[interleaved ? 2 * i + 1 : half + i];
        const float p = a * cosine[i] - b * sine[i];
        b = b * cosine[i] + a * sine[i];
        a = p;
    }
}

inline void sigmoid_gate(float* x, const float* gate, int n) {
    for (int i = 0; i < n; i += 16)
        store_part(x + i, mulf(load_part(x + i, n - i), sigmoid(load_part(gate + i, n - i))), n - i);
}

inline uint64_t sum_bytes(const uint8_t* p, size_t bytes) {
    VI a = seti(0), b = a, c = a, d = a;
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        a = addi(a, ldi(p + i));
        b = addi(b, ldi(p + i + 64));
        c = addi(c, ldi(p + i + 128));
        d = addi(d, ldi(p + i + 192));
    }
    return static_cast<uint64_t>(hsumi(addi(addi(a, b), addi(c, d))));
}

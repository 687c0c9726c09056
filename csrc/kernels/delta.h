// Gated delta rule of one value head (Yang et al., arXiv 2412.06464): token by token, or by products over chunks of 16
// tokens. Inside the unit's namespace.
//
// S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  out = S^T q.   S [key_dim][value_dim], both multiples of 16.

// silu of a causal depthwise convolution: out [n] from the rows of `width` tokens, the oldest first, and weight
// [width][stride].
inline void conv_silu_row(const float* const* rows, int width, const float* weight, size_t stride, int n, float* out) {
    for (int c = 0; c < n; c += 16) {
        VF sum = setf(0.f);
        for (int w = 0; w < width; w++)
            sum = fma(load_part(rows[w] + c, n - c), load_part(weight + w * stride + c, n - c), sum);
        store_part(out + c, mulf(sum, sigmoid(sum)), n - c);
    }
}

// One token on N*16 columns of the state: they depend on no other columns.
template <int N>
AI void delta_step(const DeltaItem& it, int t, int col, float fade) {
    const float* k = it.k + t * it.qk_stride;
    const float* q = it.q + t * it.qk_stride;
    const size_t dv = static_cast<size_t>(it.value_dim);
    VF seen[N], out[N];
    UNR for (int n = 0; n < N; n++) seen[n] = out[n] = setf(0.f);
    float* s = it.state + col;
    for (int i = 0; i < it.key_dim; i++, s += dv) {
        const VF a = bcf(k + i);
        UNR for (int n = 0; n < N; n++) seen[n] = fma(a, ldf(s + n * 16), seen[n]);
    }
    const VF e = setf(fade), beta = setf(it.beta[t * it.gate_stride]);
    UNR for (int n = 0; n < N; n++)
        seen[n] = mulf(beta, subf(ldf(it.v + t * it.v_stride + col + n * 16), mulf(e, seen[n])));
    s = it.state + col;
    for (int i = 0; i < it.key_dim; i++, s += dv) {
        const VF a = bcf(k + i), b = bcf(q + i);
        UNR for (int n = 0; n < N; n++) {
            const VF x = fma(a, seen[n], mulf(e, ldf(s + n * 16)));
            stf(s + n * 16, x);
            out[n] = fma(b, x, out[n]);
        }
    }
    UNR for (int n = 0; n < N; n++) stf(it.out + t * it.out_stride + col + n * 16, out[n]);
}

AI float exp_nat(float x) {
    float tmp[16];
    stf(tmp, exp2v(setf(x * 1.44269504f)));
    return tmp[0];
}

inline void delta_recurrent(const DeltaItem& it) {
    for (int t = 0; t < it.tokens; t++) {
        const float fade = exp_nat(it.g[t * it.gate_stride]);
        int col = 0;
        for (; col + 64 <= it.value_dim; col += 64) delta_step<4>(it, t, col, fade);
        for (; col < it.value_dim; col += 16) delta_step<1>(it, t, col, fade);
    }
}

// With G_t the sum of g up to t: (I + L) U = beta (V - e^G K S), L_tj = beta_t e^(G_t - G_j) k_t.k_j below the diagonal;
// out = e^G Q S + (e^(G_t - G_j) q_t.k_j up to the diagonal) U;  S <- e^G_last S + sum of e^(G_last - G_j) k_j u_j^T.
inline void delta_chunk(const DeltaItem& it, int t0, int n, float* scratch) {
    constexpr int kC = kDeltaChunk;
    const int dk = it.key_dim, dv = it.value_dim;
    float* kq = scratch;                      // [2 * 16][dk]: keys, queries
    float* kt = kq + 2 * kC * dk;             // [dk][16]: keys transposed
    float* dots = kt + kC * dk;               // [2 * 16][16]: keys with keys, queries with keys
    float* past = dots + 2 * kC * kC;         // [2 * 16][dv]: keys and queries through the state
    float* u = past + 2 * kC * dv;            // [16][dv]
    float total[kC], grown[kC], left[kC];     // G, e^G, e^(G_last - G)
    for (int t = 0; t < kC; t++) {
        for (int d = 0; d < dk; d += 16) {
            const size_t at = static_cast<size_t>(t0 + t) * it.qk_stride + static_cast<size_t>(d);
            stf(kq + t * dk + d, t < n ? ldf(it.k + at) : setf(0.f));
            stf(kq + (kC + t) * dk + d, t < n ? ldf(it.q + at) : setf(0.f));
        }
        total[t] = (t ? total[t - 1] : 0.f) + (t < n ? it.g[static_cast<size_t>(t0 + t) * it.gate_stride] : 0.f);
        grown[t] = exp_nat(total[t]);
    }
    for (int t = 0; t < kC; t++) left[t] = exp_nat(total[kC - 1] - total[t]);
    for (int d = 0; d < dk; d += 16) {
        VF m[16];
        UNR for (int i = 0; i < 16; i++) m[i] = ldf(kq + i * dk + d);
        transpose16(m);
        UNR for (int i = 0; i < 16; i++) stf(kt + (d + i) * kC, m[i]);
    }
    gemm_f32(kt, kC, kq, dk, 2 * kC, dk, dots, kC, kC, true);
    gemm_f32(it.state, dv, kq, dk, 2 * kC, dk, past, dv, dv, true);
    for (int t = 0; t < kC; t++)
        for (int j = 0; j <= t; j++) {
            const float fade = exp_nat(total[t] - total[j]);
            dots[t * kC + j] *= fade;
            dots[(kC + t) * kC + j] *= fade;
        }
    for (int t = 0; t < n; t++) {
        const size_t at = static_cast<size_t>(t0 + t);
        const VF beta = setf(it.beta[at * it.gate_stride]), e = setf(grown[t]);
        for (int c = 0; c < dv; c += 16) {
            VF x = subf(ldf(it.v + at * it.v_stride + c), mulf(e, ldf(past + t * dv + c)));
            for (int j = 0; j < t; j++) x = subf(x, mulf(bcf(dots + t * kC + j), ldf(u + j * dv + c)));
            stf(u + t * dv + c, mulf(beta, x));
        }
    }
    for (int t = 0; t < n; t++) {
        const VF e = setf(grown[t]);
        for (int c = 0; c < dv; c += 16) {
            VF x = mulf(e, ldf(past + (kC + t) * dv + c));
            for (int j = 0; j <= t; j++) x = fma(bcf(dots + (kC + t) * kC + j), ldf(u + j * dv + c), x);
            stf(it.out + static_cast<size_t>(t0 + t) * it.out_stride + c, x);
        }
    }
    const VF e = setf(grown[kC - 1]);
    for (int i = 0; i < dk; i++) {
        for (int j = 0; j < kC; j++) kt[i * kC + j] *= left[j];
        for (int c = 0; c < dv; c += 16) stf(it.state + i * dv + c, mulf(e, ldf(it.state + i * dv + c)));
    }
    gemm_f32(u, dv, kt, kC, dk, n, it.state, dv, dv, false);
}

inline void delta_item(const DeltaItem& it, uint8_t* scratch) {
    if (it.tokens <= kDeltaSerial) return delta_recurrent(it);
    for (int t = 0; t < it.tokens; t += kDeltaChunk)
        delta_chunk(it, t, it.tokens - t < kDeltaChunk ? it.tokens - t : kDeltaChunk, reinterpret_cast<float*>(scratch));
}

// Delta rule that decays by channel (Kimi Linear, arXiv 2510.26692), one head: token by token, or by products over chunks of
// 16 tokens. Inside the unit's namespace.
//
// S <- diag(e^g) S;  u = beta (v - S^T k);  S <- S + k u^T;  out = S^T q.   S [key_dim][value_dim], both multiples of 16.

// log(1 + e^x) = max(x, 0) + 2 atanh(y / (2 + y)), y = e^-|x|: the series is below 1e-8 from its eighth term on.
AI VF softplus(VF x) {
    const VF y = exp2v(mulf(absf(x), setf(-1.44269504f))), s = divf(y, addf(y, setf(2.f))), q = mulf(s, s);
    VF p = setf(1.f / 15.f);
    UNR for (int n = 13; n >= 3; n -= 2) p = fma(p, q, setf(1.f / static_cast<float>(n)));
    p = fma(p, q, setf(1.f));
    return fma(addf(s, s), p, maxf(x, setf(0.f)));
}

// e^g of one token, [key_dim]: g = -rate softplus(f + dt_bias), or bound sigmoid(rate (f + dt_bias)).
AI void kda_fades(const KdaItem& it, int t, float* fade) {
    const float* f = it.f + static_cast<size_t>(t) * it.f_stride;
    const VF rate = setf(it.rate), bound = setf(it.bound), log2e = setf(1.44269504f);
    for (int c = 0; c < it.key_dim; c += 16) {
        const VF x = addf(ldf(f + c), ldf(it.dt_bias + c));
        const VF g = it.bound != 0.f ? mulf(bound, sigmoid(mulf(rate, x))) : mulf(subf(setf(0.f), rate), softplus(x));
        stf(fade + c, exp2v(mulf(g, log2e)));
    }
}

// One token on N*16 columns of the state: they depend on no other columns. faded: keys times fades.
template <int N>
AI void kda_step(const KdaItem& it, int t, int col, const float* fade, const float* faded) {
    const float* k = it.k + static_cast<size_t>(t) * it.stride;
    const float* q = it.q + static_cast<size_t>(t) * it.stride;
    const float* v = it.v + static_cast<size_t>(t) * it.stride + col;
    const size_t dv = static_cast<size_t>(it.value_dim);
    VF u[N], out[N];
    UNR for (int n = 0; n < N; n++) u[n] = out[n] = setf(0.f);
    float* s = it.state + col;
    for (int i = 0; i < it.key_dim; i++, s += dv) {
        const VF a = bcf(faded + i);
        UNR for (int n = 0; n < N; n++) u[n] = fma(a, ldf(s + n * 16), u[n]);
    }
    const VF beta = setf(it.beta[static_cast<size_t>(t) * it.beta_stride]);
    UNR for (int n = 0; n < N; n++) u[n] = mulf(beta, subf(ldf(v + n * 16), u[n]));
    s = it.state + col;
    for (int i = 0; i < it.key_dim; i++, s += dv) {
        const VF a = bcf(k + i), b = bcf(q + i), e = bcf(fade + i);
        UNR for (int n = 0; n < N; n++) {
            const VF x = fma(a, u[n], mulf(e, ldf(s + n * 16)));
            stf(s + n * 16, x);
            out[n] = fma(b, x, out[n]);
        }
    }
    UNR for (int n = 0; n < N; n++) stf(it.out + static_cast<size_t>(t) * it.out_stride + col + n * 16, out[n]);
}

inline void kda_recurrent(const KdaItem& it, float* scratch) {
    float *fade = scratch, *faded = scratch + it.key_dim;
    for (int t = 0; t < it.tokens; t++) {
        kda_fades(it, t, fade);
        const float* k = it.k + static_cast<size_t>(t) * it.stride;
        for (int c = 0; c < it.key_dim; c += 16) stf(faded + c, mulf(ldf(k + c), ldf(fade + c)));
        int col = 0;
        for (; col + 64 <= it.value_dim; col += 64) kda_step<4>(it, t, col, fade, faded);
        for (; col < it.value_dim; col += 16) kda_step<1>(it, t, col, fade, faded);
    }
}

// With G_t the sum of g up to t and a channel, D_tj = e^(G_t - G_j): (I + L) U = beta (V - (K e^G) S), L_tj = beta_t k_t D_tj
// k_j below the diagonal;  out = (Q e^G) S + (q_t D_tj k_j up to the diagonal) U;  S <- e^G_last S + sum of (D_last,j k_j)
// u_j^T. Every D is a product of fades, so that nothing is ever divided by a decay.
inline void kda_chunk(const KdaItem& it, int t0, int n, float* scratch) {
    constexpr int kC = kDeltaChunk;
    const int dk = it.key_dim, dv = it.value_dim;
    float* grown = scratch;             // [2 * 16][dk]: keys, queries, times e^G
    float* fade = grown + 2 * kC * dk;  // [16][dk]
    float* left = fade + kC * dk;       // [16][dk]: keys times what is left of them at the end
    float* kt = left + kC * dk;         // [dk][16]: the same transposed
    float* dots = kt + kC * dk;         // [2 * 16][16]: keys with keys, queries with keys
    float* past = dots + 2 * kC * kC;   // [2 * 16][dv]: keys and queries through the state
    float* u = past + 2 * kC * dv;      // [16][dv]
    float* whole = u + kC * dv;         // [dk]: e^G
    const auto key = [&](int t) { return it.k + static_cast<size_t>(t0 + t) * it.stride; };
    const auto query = [&](int t) { return it.q + static_cast<size_t>(t0 + t) * it.stride; };
    for (int c = 0; c < dk; c += 16) stf(whole + c, setf(1.f));
    for (int t = 0; t < kC; t++) {
        if (t < n) kda_fades(it, t0 + t, fade + t * dk);
        for (int c = 0; c < dk; c += 16) {
            VF k = setf(0.f), q = setf(0.f);
            if (t < n) {
                const VF e = mulf(ldf(whole + c), ldf(fade + t * dk + c));
                stf(whole + c, e);
                k = mulf(e, ldf(key(t) + c));
                q = mulf(e, ldf(query(t) + c));
            }
            stf(grown + t * dk + c, k);
            stf(grown + (kC + t) * dk + c, q);
        }
    }
    for (int j = 0; j < kC; j++) {
        float* w = left + j * dk;
        if (j >= n) {
            for (int c = 0; c < dk; c += 16) stf(w + c, setf(0.f));
            continue;
        }
        VF own = setf(0.f);
        for (int c = 0; c < dk; c += 16) {
            const VF k = ldf(key(j) + c);
            stf(w + c, k);
            own = fma(k, ldf(query(j) + c), own);
        }
        dots[(kC + j) * kC + j] = hsum(own);
        for (int t = j + 1; t < n; t++) {
            const float *k = key(t), *q = query(t), *f = fade + t * dk;
            VF with_k = setf(0.f), with_q = setf(0.f);
            for (int c = 0; c < dk; c += 16) {
                const VF x = mulf(ldf(w + c), ldf(f + c));
                stf(w + c, x);
                with_k = fma(x, ldf(k + c), with_k);
                with_q = fma(x, ldf(q + c), with_q);
            }
            dots[t * kC + j] = hsum(with_k);
            dots[(kC + t) * kC + j] = hsum(with_q);
        }
    }
    for (int c = 0; c < dk; c += 16) {
        VF m[16];
        UNR for (int i = 0; i < 16; i++) m[i] = ldf(left + i * dk + c);
        transpose16(m);
        UNR for (int i = 0; i < 16; i++) stf(kt + (c + i) * kC, m[i]);
    }
    gemm_f32(it.state, dv, grown, dk, 2 * kC, dk, past, dv, dv, true);
    for (int t = 0; t < n; t++) {
        const VF beta = setf(it.beta[static_cast<size_t>(t0 + t) * it.beta_stride]);
        const float* v = it.v + static_cast<size_t>(t0 + t) * it.stride;
        for (int c = 0; c < dv; c += 16) {
            VF x = subf(ldf(v + c), ldf(past + t * dv + c));
            for (int j = 0; j < t; j++) x = subf(x, mulf(bcf(dots + t * kC + j), ldf(u + j * dv + c)));
            stf(u + t * dv + c, mulf(beta, x));
        }
        for (int c = 0; c < dv; c += 16) {
            VF x = ldf(past + (kC + t) * dv + c);
            for (int j = 0; j <= t; j++) x = fma(bcf(dots + (kC + t) * kC + j), ldf(u + j * dv + c), x);
            stf(it.out + static_cast<size_t>(t0 + t) * it.out_stride + c, x);
        }
    }
    for (int i = 0; i < dk; i++) {
        const VF e = bcf(whole + i);
        for (int c = 0; c < dv; c += 16) stf(it.state + i * dv + c, mulf(e, ldf(it.state + i * dv + c)));
    }
    gemm_f32(u, dv, kt, kC, dk, n, it.state, dv, dv, false);
}

inline void kda_item(const KdaItem& it, uint8_t* scratch) {
    float* floats = reinterpret_cast<float*>(scratch);
    if (it.tokens <= kDeltaSerial) return kda_recurrent(it, floats);
    for (int t = 0; t < it.tokens; t += kDeltaChunk)
        kda_chunk(it, t, it.tokens - t < kDeltaChunk ? it.tokens - t : kDeltaChunk, floats);
}

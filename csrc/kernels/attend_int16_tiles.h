// The tiles of attention by 16-bit integers: scores, softmax, weighted values. Inside the unit's namespace.

// s [T keys][N * 16 rows] (+)= integers' products times both scales. q: N runs of 64 pairs.
template <int T, int N>
AI void fix_score(const uint8_t* k, size_t ldk, const uint8_t* q, int pairs, const float* k_scale, const float* q_scale,
                  float* s, int R, bool first) {
    VI sum[T][N];
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) sum[t][n] = seti(0);
    for (int i = 0; i < pairs; i++) {
        VI x[N];
        UNR for (int n = 0; n < N; n++) x[n] = ldi(q + (n * kFixPairs + i) * 64);
        UNR for (int t = 0; t < T; t++) {
            const VI a = bci(k + static_cast<size_t>(t) * ldk + i * 4);
            UNR for (int n = 0; n < N; n++) sum[t][n] = dot2(sum[t][n], x[n], a);
        }
    }
    UNR for (int n = 0; n < N; n++) {
        const VF qs = ldf(q_scale + n * 16);
        UNR for (int t = 0; t < T; t++) {
            float* to = s + t * R + n * 16;
            const VF x = mulf(cvtif(sum[t][n]), qs), ks = bcf(k_scale + t);
            stf(to, first ? mulf(x, ks) : fma(x, ks, ldf(to)));
        }
    }
}
template <int T, int N>
AI void fix_scores_by(const FixShape& f, const FixRows& b, int g, int v) {
    const uint8_t* q = b.q + static_cast<size_t>(g * (b.R / 16) + v) * kFixPairs * 64;
    const int part = f.group_part[g];
    for (int t = 0; t < b.n; t += T)
        fix_score<T, N>(b.k[t / 16].row + static_cast<size_t>(t % 16) * b.k[t / 16].stride + f.group_at[g] * 2,
                        b.k[t / 16].stride, q, f.group_pairs[g], b.k_scale + part * kKeyBlock + t,
                        b.q_scale + part * b.R + v * 16, b.s + t * b.R + v * 16, b.R, g == 0);
}
inline void fix_scores(const FixShape& f, const FixRows& b, int from, int to) {
    for (int g = 0; g < f.groups; g++) {
        int v = from;
        for (; v + kFixVectors <= to; v += kFixVectors) fix_scores_by<kFixKeys, kFixVectors>(f, b, g, v);
        for (; v < to; v++) fix_scores_by<kFixKeysOne, 1>(f, b, g, v);
    }
}

// One vector of rows: what a key costs is reading it.
//
// kHalf: eight rows at most; row r has lanes 2 r and 2 r + 1, for two pairs of neighbouring values.
template <int T, bool kHalf>
AI void fix_score_few(const uint8_t* k, size_t ldk, const uint8_t* q, int pairs, const float* k_scale, VF q_scale, float* s,
                      bool first, FixAhead& ahead) {
    constexpr int kRun = T < 8 ? T : 8;
    VI sum[T];
    UNR for (int t = 0; t < T; t++) sum[t] = seti(0);
    const int steps = kHalf ? (pairs + 1) / 2 : pairs;
    // Eight keys are addressed from one register and four distances: a register each is more than there are.
    const size_t ld3 = 3 * ldk, ld5 = 5 * ldk, ld7 = 7 * ldk;
    const uint8_t* runs[T / kRun];
    UNR for (int e = 0; e < T / kRun; e++) runs[e] = k + static_cast<size_t>(e * kRun) * ldk;
    for (int i = 0; i < steps; i++) {
        ahead.step();
        const VI x = ldi(q + i * 64);
        UNR for (int e = 0; e < T / kRun; e++) {
            const uint8_t* a = runs[e];
            asm("" : "+r"(a));  // or the compiler makes a register of each after all
            const uint8_t* keys[8] = {a, a + ldk, a + 2 * ldk, a + ld3, a + 4 * ldk, a + ld5, a + 2 * ld3, a + ld7};
            UNR for (int t = 0; t < kRun; t++) {
                VI& to = sum[e * kRun + t];
                to = dot2(to, x, kHalf ? bci2(keys[t]) : bci(keys[t]));
            }
            runs[e] = a + (kHalf ? 8 : 4);
        }
    }
    UNR for (int t = 0; t < T; t++) {
        const VF x = mulf(cvtif(kHalf ? sum2(sum[t]) : sum[t]), q_scale), ks = bcf(k_scale + t);
        stf(s + t * 16, first ? mulf(x, ks) : fma(x, ks, ldf(s + t * 16)));
    }
}
template <bool kHalf>
void fix_scores_few(const FixShape& f, const FixRows& b, FixAhead& ahead) {
    FixAhead& own = ahead;
    for (int j = 0; j < b.n; j += 16) {
        const FixRun run = b.k[j / 16];
        for (int g = 0; g < f.groups; g++) {
            const uint8_t* q = b.q + static_cast<size_t>(g) * kFixPairs * 64;
            const float* scale = b.k_scale + f.group_part[g] * kKeyBlock;
            const VF q_scale = ldf(b.q_scale + f.group_part[g] * b.R);
            for (int t = j; t < j + 16; t += kFixKeysOne)
                fix_score_few<kFixKeysOne, kHalf>(run.row + static_cast<size_t>(t - j) * run.stride + f.group_at[g] * 2,
                                                  run.stride, q, f.group_pairs[g], scale + t, q_scale, b.s + t * b.R, g == 0,
                                                  own);
        }
    }
}

// Scores of 16 rows with a block's keys to integer weights of its values; p [32] pairs, R apart.
template <bool kMasked>
AI void fix_softmax(const FixRows& b, int v, int key) {
    float* s = b.s + v * 16;
    const VF none = setf(-__builtin_inff());
    const VI last = ldi(b.last + v * 16), first = ldi(b.first + v * 16);
    const auto hidden = [&](int k) { return ori(subi(last, seti(key + k)), subi(seti(key + k), first)); };  // sign bits
    VF top = none;
    for (int k = 0; k < b.n; k++, s += b.R) {
        VF x = ldf(s);
        if (kMasked) stf(s, x = selectf(hidden(k), none, x));
        top = maxf(top, x);
    }
    const VF level = maxf(top, setf(-1e30f));
    VF total = setf(0.f), most = setf(0.f), bound = setf(0.f);
    s = b.s + v * 16;
    for (int k = 0; k < b.n; k++, s += b.R) {
        const VF p = exp2v(subf(ldf(s), level));
        VF w = mulf(p, bcf(b.v_scale + k)), most_here = mulf(p, bcf(b.v_most + k));
        if (kMasked) {  // what a row does not see may be no number
            w = selectf(hidden(k), setf(0.f), w);
            most_here = selectf(hidden(k), setf(0.f), most_here);
        }
        total = addf(total, p);
        most = maxf(most, w);
        bound = addf(bound, most_here);
        stf(s, w);
    }
    // In these orders NaN stays.
    const VF step = maxf(setf(1e-30f), maxf(mulf(most, setf(1.f / kFixMost)), mulf(bound, setf(1.f / kFixWeights))));
    const VF inv = divf(setf(1.f), step);
    s = b.s + v * 16;
    for (int k = 0; k < b.n; k += 2, s += 2 * b.R) {
        const VI even = cvtfi(mulf(ldf(s), inv)), odd = cvtfi(mulf(ldf(s + b.R), inv));
        sti(b.p + static_cast<size_t>(k / 2 * b.R + v * 16) * 4, pack2(even, odd));
    }
    const VF before = ldf(b.top + v * 16), now = maxf(before, level);
    const VF keep = exp2v(subf(before, now)), gain = exp2v(subf(level, now));
    stf(b.sum + v * 16, fma(ldf(b.sum + v * 16), keep, mulf(total, gain)));
    stf(b.top + v * 16, now);
    stf(b.keep + v * 16, keep);
    stf(b.gain + v * 16, mulf(gain, step));
}

// o [T rows][N * 16] = o * keep + sum * gain.
template <int T, int N>
AI void fix_add(const FixRows& b, const VI (*sum)[N], int dv, int r, int d) {
    UNR for (int t = 0; t < T; t++) {
        const VF keep = bcf(b.keep + r + t), gain = bcf(b.gain + r + t);
        UNR for (int n = 0; n < N; n++) {
            float* o = b.o + (r + t) * dv + d + n * 16;
            stf(o, fma(cvtif(sum[t][n]), gain, mulf(ldf(o), keep)));
        }
    }
}
// The weighted values of T rows.
template <int T, int N>
AI void fix_weigh(const FixRows& b, int dv, int r, int d) {
    VI sum[T][N];
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) sum[t][n] = seti(0);
    const uint8_t* v = b.v + d * 4;
    const uint8_t* p = b.p + r * 4;
    for (int k = 0; k < b.n; k += 2, v += dv * 4, p += b.R * 4) {
        VI x[N];
        UNR for (int n = 0; n < N; n++) x[n] = ldi(v + n * 64);
        UNR for (int t = 0; t < T; t++) {
            const VI a = bci(p + t * 4);
            UNR for (int n = 0; n < N; n++) sum[t][n] = dot2(sum[t][n], x[n], a);
        }
    }
    fix_add<T, N>(b, sum, dv, r, d);
}
inline void fix_values(const FixRows& b, int dv, int from, int to) {
    int d = 0;
    for (; d + kFixVectors * 16 <= dv; d += kFixVectors * 16)
        for (int r = from; r < to; r += kFixKeys) fix_weigh<kFixKeys, kFixVectors>(b, dv, r, d);
    for (; d < dv; d += 16)
        for (int r = from; r < to; r += kFixKeys) fix_weigh<kFixKeys, 1>(b, dv, r, d);
}

// The same for one vector of rows, whose values are paired as they are read.
template <int T, int N>
AI void fix_weigh_few(const FixRows& b, int dv, int r, int d, FixAhead& ahead) {
    VI sum[T][N];
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) sum[t][n] = seti(0);
    const uint8_t* p = b.p + r * 4;
    for (int j = 0; j < b.n; j += 16) {
        const uint8_t* even = b.values[j / 16].row;
        const size_t stride = b.values[j / 16].stride;
        for (int k = 0; k < 8; k++, even += 2 * stride, p += b.R * 4) {
            ahead.step();
            VI x[N];
            UNR for (int n = 0; n < N; n++) x[n] = fix_pair(even, even + stride, d + n * 16);
            UNR for (int t = 0; t < T; t++) {
                const VI a = bci(p + t * 4);
                UNR for (int n = 0; n < N; n++) sum[t][n] = dot2(sum[t][n], x[n], a);
            }
        }
    }
    fix_add<T, N>(b, sum, dv, r, d);
}
template <int T>
void fix_values_few(const FixRows& b, int dv, int rows, FixAhead& ahead) {
    constexpr int N = kFixVectors > 1 ? 2 : 1;
    FixAhead& own = ahead;
    int d = 0;
    for (; d + N * 16 <= dv; d += N * 16)
        for (int r = 0; r < rows; r += T) fix_weigh_few<T, N>(b, dv, r, d, own);
    for (; d < dv; d += 16)
        for (int r = 0; r < rows; r += T) fix_weigh_few<T, 1>(b, dv, r, d, own);
}

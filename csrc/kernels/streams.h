// Residual streams: a few rows of float32 by a token's streams, sums over streams, and streams after a branch. Inside the
// unit's namespace.

// out[t][r] = row r . x[t] over n columns; each sum has one chain of its own, so that it depends on nothing beside it.
template <int R, int T>
AI void stream_dots(const float* w, size_t ldw, const float* x, size_t ldx, int n, float* out, size_t ldo) {
    VF acc[R][T];
    UNR for (int r = 0; r < R; r++) UNR for (int t = 0; t < T; t++) acc[r][t] = setf(0.f);
    for (int i = 0; i < n; i += 16) {
        VF v[T];
        UNR for (int t = 0; t < T; t++) v[t] = ldf(x + static_cast<size_t>(t) * ldx + i);
        UNR for (int r = 0; r < R; r++) {
            const VF row = ldf(w + static_cast<size_t>(r) * ldw + i);
            UNR for (int t = 0; t < T; t++) acc[r][t] = fma(row, v[t], acc[r][t]);
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int r = 0; r < R; r++) out[static_cast<size_t>(t) * ldo + r] = hsum(acc[r][t]);
}

template <int T>
inline void stream_tokens(const StreamRows& s, const float* x, float* out) {
    int r = 0;
    for (; r + 4 <= s.rows; r += 4)
        stream_dots<4, T>(s.w + static_cast<size_t>(r) * s.ldw, s.ldw, x, s.ldx, s.n, out + r, s.ldo);
    for (; r < s.rows; r++) stream_dots<1, T>(s.w + static_cast<size_t>(r) * s.ldw, s.ldw, x, s.ldx, s.n, out + r, s.ldo);
    for (int t = 0; t < T; t++) {
        const float* row = x + static_cast<size_t>(t) * s.ldx;
        VF square = setf(0.f);
        for (int i = 0; i < s.n; i += 16) {
            const VF v = ldf(row + i);
            square = fma(v, v, square);
        }
        out[static_cast<size_t>(t) * s.ldo + static_cast<size_t>(s.rows)] = hsum(square);
    }
}

inline void stream_rows(const StreamRows& s) {
    int t = 0;
    for (; t + 2 <= s.tokens; t += 2)
        stream_tokens<2>(s, s.x + static_cast<size_t>(t) * s.ldx, s.out + static_cast<size_t>(t) * s.ldo);
    if (t < s.tokens) stream_tokens<1>(s, s.x + static_cast<size_t>(t) * s.ldx, s.out + static_cast<size_t>(t) * s.ldo);
}

inline void stream_enter(const float* x, int streams, int hidden, const float* pre, float* out) {
    for (int i = 0; i < hidden; i += 16) {
        VF sum = setf(0.f);
        for (int s = 0; s < streams; s++) sum = fma(bcf(pre + s), ldf(x + static_cast<size_t>(s) * hidden + i), sum);
        stf(out + i, sum);
    }
}

inline void stream_leave(const float* x, const float* y, int streams, int hidden, const float* post, const float* mix,
                         float* out) {
    for (int i = 0; i < hidden; i += 16) {
        VF before[kMaxStreams];
        for (int s = 0; s < streams; s++) before[s] = ldf(x + static_cast<size_t>(s) * hidden + i);
        const VF branch = ldf(y + i);
        for (int k = 0; k < streams; k++) {
            VF sum = mulf(bcf(post + k), branch);
            for (int j = 0; j < streams; j++) sum = fma(bcf(mix + j * streams + k), before[j], sum);
            stf(out + static_cast<size_t>(k) * hidden + i, sum);
        }
    }
}

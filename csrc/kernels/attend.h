// Grouped-query attention over a paged cache: online softmax, 64 keys a step. Inside the unit's namespace.
//
// Rows are (token, query head of the group): row = token * group + head. Keys are transposed once a step into
// [d][64], so scores and the weighted sum of values are both the float tile.

AI const uint8_t* cache_slot(const void* pages, const AttendItem& it, int key) {
    const size_t width = it.type == CacheType::F16 ? 2 : 4;
    const size_t page = static_cast<size_t>(it.blocks[key / it.page_size]);
    const size_t slot = static_cast<size_t>(key % it.page_size);
    const size_t row = (page * it.kv_heads + it.kv_head) * it.page_size + slot;
    return static_cast<const uint8_t*>(pages) + row * it.head_dim * width;
}

// Values d..d+15 of a cached row; n = how many exist.
AI VF cache_load(const uint8_t* row, int d, int n, CacheType type) {
    if (type == CacheType::F32) return load_part(reinterpret_cast<const float*>(row) + d, n);
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + d;
    if (n >= 16) return ldh(p);
    uint16_t tmp[16] = {};
    for (int i = 0; i < n; i++) tmp[i] = p[i];
    return ldh(tmp);
}

// Transposed keys kt [dp][64] and values v [64][dp] of `count` keys from key0; the rest are zeros.
AI void load_keys(const AttendItem& it, int key0, int count, int dp, float* kt, float* v) {
    const uint8_t* rows[16];
    for (int j = 0; j < kKeyBlock; j += 16) {
        for (int i = 0; i < 16; i++) rows[i] = j + i < count ? cache_slot(it.k_pages, it, key0 + j + i) : nullptr;
        for (int d = 0; d < dp; d += 16) {
            VF m[16];
            UNR for (int i = 0; i < 16; i++) m[i] = rows[i] ? cache_load(rows[i], d, it.head_dim - d, it.type) : setf(0.f);
            transpose16(m);
            UNR for (int i = 0; i < 16; i++) stf(kt + (d + i) * kKeyBlock + j, m[i]);
        }
    }
    for (int j = 0; j < kKeyBlock; j++) {
        const uint8_t* row = j < count ? cache_slot(it.v_pages, it, key0 + j) : nullptr;
        for (int d = 0; d < dp; d += 16)
            stf(v + j * dp + d, row ? cache_load(row, d, it.head_dim - d, it.type) : setf(0.f));
    }
}

// Scores of one row to probabilities; updates the running max and sum, rescales the row's output.
AI void softmax_step(float* s, float* ml, float* out, int dp, int lo, int hi) {
    const float none = -__builtin_inff();
    VF v[4];
    UNR for (int i = 0; i < 4; i++) v[i] = ldf(s + i * 16);
    if (lo > 0 || hi < kKeyBlock) UNR for (int i = 0; i < 4; i++) v[i] = keep(v[i], lo - i * 16, hi - i * 16, none);
    const float top = hmax(maxf(maxf(v[0], v[1]), maxf(v[2], v[3])));
    const float m = top > ml[0] ? top : ml[0];
    VF total = setf(0.f);
    UNR for (int i = 0; i < 4; i++) {
        v[i] = exp2v(subf(v[i], setf(m)));
        stf(s + i * 16, v[i]);
        total = addf(total, v[i]);
    }
    if (m > ml[0]) {
        const VF c = exp2v(setf(ml[0] - m));
        float tmp[16];
        stf(tmp, c);
        for (int d = 0; d < dp; d += 16) stf(out + d, mulf(ldf(out + d), c));
        ml[1] *= tmp[0];
        ml[0] = m;
    }
    ml[1] += hsum(total);
}

inline void attend_item(const AttendItem& it, uint8_t* scratch) {
    const int dp = dpad(it.head_dim), rows = it.tokens * it.group;
    float* kt = reinterpret_cast<float*>(scratch);
    float* v = kt + dp * kKeyBlock;
    float* q = v + dp * kKeyBlock;
    float* s = q + rows * dp;
    float* o = it.partial_out ? it.partial_out : s + rows * kKeyBlock;
    float* ml = it.partial_ml ? it.partial_ml : s + rows * kKeyBlock + rows * dp;
    const VF scale = setf(it.scale * 1.44269504f);  // scores in powers of two
    for (int r = 0; r < rows; r++) {
        const float* src = it.q + (r / it.group) * it.q_stride + (r % it.group) * it.head_dim;
        for (int d = 0; d < dp; d += 16) {
            stf(q + r * dp + d, mulf(load_part(src + d, it.head_dim - d), scale));
            stf(o + r * dp + d, setf(0.f));
        }
        ml[2 * r] = -1e30f;
        ml[2 * r + 1] = 0.f;
    }
    for (int key = it.key0; key < it.key1; key += kKeyBlock) {
        const int count = it.key1 - key < kKeyBlock ? it.key1 - key : kKeyBlock;
        load_keys(it, key, count, dp, kt, v);
        // Rows whose token is before this step's first key see nothing of it: they are a prefix.
        const int skip = key > it.first_pos ? (key - it.first_pos) * it.group : 0;
        if (skip >= rows) break;
        const int n = rows - skip;
        gemm_f32(kt, kKeyBlock, q + skip * dp, dp, n, dp, s + skip * kKeyBlock, kKeyBlock, kKeyBlock, true);
        for (int r = skip; r < rows; r++) {
            const int pos = it.first_pos + r / it.group;
            const int last = pos + 1 - key, first = it.window > 0 ? pos + 1 - it.window - key : 0;
            softmax_step(s + r * kKeyBlock, ml + 2 * r, o + r * dp, dp, first > 0 ? first : 0, last < count ? last : count);
        }
        gemm_f32(v, dp, s + skip * kKeyBlock, kKeyBlock, n, kKeyBlock, o + skip * dp, dp, dp, false);
    }
    if (it.partial_out) return;
    for (int r = 0; r < rows; r++) {
        const VF inv = setf(ml[2 * r + 1] > 0.f ? 1.f / ml[2 * r + 1] : 0.f);
        float* dst = it.out + (r / it.group) * it.out_stride + (r % it.group) * it.head_dim;
        for (int d = 0; d < it.head_dim; d += 16)
            store_part(dst + d, mulf(ldf(o + r * dp + d), inv), it.head_dim - d);
    }
}

// parts x rows partial results, part-major; merged in part order.
inline void merge_parts(const float* ml, const float* parts_out, int parts, int rows, int head_dim, int group, float* out,
                        size_t out_stride) {
    const int dp = dpad(head_dim);
    for (int r = 0; r < rows; r++) {
        float top = -1e30f;
        for (int p = 0; p < parts; p++) top = ml[2 * (p * rows + r)] > top ? ml[2 * (p * rows + r)] : top;
        float total = 0.f, w[16];
        float* dst = out + (r / group) * out_stride + (r % group) * head_dim;
        for (int p = 0; p < parts; p++) {
            stf(w, exp2v(setf(ml[2 * (p * rows + r)] - top)));
            total += w[0] * ml[2 * (p * rows + r) + 1];
        }
        const float inv = total > 0.f ? 1.f / total : 0.f;
        for (int d = 0; d < head_dim; d += 16) {
            VF sum = setf(0.f);
            for (int p = 0; p < parts; p++) {
                const VF c = exp2v(setf(ml[2 * (p * rows + r)] - top));
                sum = fma(c, ldf(parts_out + (static_cast<size_t>(p) * rows + r) * dp + d), sum);
            }
            store_part(dst + d, mulf(sum, setf(inv)), head_dim - d);
        }
    }
}

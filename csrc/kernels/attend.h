// Grouped-query attention over a paged cache: online softmax, 64 keys a step. Inside the unit's namespace.
//
// Rows are (token, query head of the group): row = token * group + head. Keys are transposed once a step into
// [d][64], so scores and the weighted sum of values are both the float tile.

AI const uint8_t* cache_slot(const void* pages, const AttendItem& it, int key, int step) {
    const size_t width = it.type == CacheType::F16 ? 2 : 4;
    const size_t page = static_cast<size_t>(it.blocks[key / it.page_size]);
    const size_t slot = static_cast<size_t>(key % it.page_size);
    const size_t row = (page * it.kv_heads + it.kv_head) * it.page_size + slot;
    return static_cast<const uint8_t*>(pages) + row * step * width;
}

// Addresses of 16 cached rows from `key`; the first `count` exist, the rest repeat the first of them (their
// scores are masked and their probabilities are zero).
AI void cache_rows(const void* pages, const AttendItem& it, int key, int count, int step, const uint8_t** rows) {
    const size_t bytes = static_cast<size_t>(step) * (it.type == CacheType::F16 ? 2 : 4);
    if (count >= 16 && it.page_size % 16 == 0 && key % 16 == 0) {
        const uint8_t* first = cache_slot(pages, it, key, step);
        for (int i = 0; i < 16; i++) rows[i] = first + i * bytes;
        return;
    }
    for (int i = 0; i < 16; i++) rows[i] = i < count ? cache_slot(pages, it, key + i, step) : rows[0];
}

// Values d..d+15 of a cached row, zeros beyond n; kWhole: none is beyond.
template <CacheType C, bool kWhole>
AI VF cache_load(const uint8_t* row, int d, int n) {
    if constexpr (C == CacheType::F32) {
        const float* p = reinterpret_cast<const float*>(row) + d;
        return kWhole ? ldf(p) : load_part(p, n);
    } else {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + d;
        if (kWhole || n >= 16) return ldh(p);
        uint16_t tmp[16] = {};
        for (int i = 0; i < n; i++) tmp[i] = p[i];
        return ldh(tmp);
    }
}

// Asks for 16 rows of keys or values one block ahead: pages are short and scattered, hardware streams stop at each.
AI void prefetch_rows(const void* pages, const AttendItem& it, int key, int count, int step) {
    if (count <= 0) return;
    const size_t bytes = static_cast<size_t>(step) * (it.type == CacheType::F16 ? 2 : 4);
    const uint8_t* rows[16];
    cache_rows(pages, it, key, count, step, rows);
    for (int i = 0; i < 16; i++)
        for (size_t b = 0; b < bytes; b += 64) touch(rows[i] + b);
}

// Transposed keys kt [dk][64] and values v [64][dv] of `count` keys from key0.
template <CacheType C, bool kWhole>
void load_block(const AttendItem& it, int key0, int count, float* kt, float* v) {
    const uint8_t* rows[16];
    const int dk = dpad(it.head_dim), dv = dpad(it.value_dim);
    for (int j = 0; j < kKeyBlock; j += 16) {
        if (j >= count) {
            for (int d = 0; d < dk; d++) stf(kt + d * kKeyBlock + j, setf(0.f));
            for (int i = 0; i < 16 * dv; i += 16) stf(v + j * dv + i, setf(0.f));
            continue;
        }
        const int left = it.key1 - key0 - kKeyBlock - j;
        prefetch_rows(it.k_pages, it, key0 + kKeyBlock + j, left, it.k_row);
        if (it.v_pages != it.k_pages) prefetch_rows(it.v_pages, it, key0 + kKeyBlock + j, left, it.v_row);
        cache_rows(it.k_pages, it, key0 + j, count - j, it.k_row, rows);
        for (int d = 0; d < dk; d += 16) {
            VF m[16];
            UNR for (int i = 0; i < 16; i++) m[i] = cache_load<C, kWhole>(rows[i], d, it.head_dim - d);
            transpose16(m);
            UNR for (int i = 0; i < 16; i++) stf(kt + (d + i) * kKeyBlock + j, m[i]);
        }
        cache_rows(it.v_pages, it, key0 + j, count - j, it.v_row, rows);
        for (int i = 0; i < 16; i++)
            for (int d = 0; d < dv; d += 16) stf(v + (j + i) * dv + d, cache_load<C, kWhole>(rows[i], d, it.value_dim - d));
    }
}

inline void load_keys(const AttendItem& it, int key0, int count, float* kt, float* v) {
    const bool whole = it.head_dim == dpad(it.head_dim) && it.value_dim == dpad(it.value_dim);
    if (it.type == CacheType::F16)
        return whole ? load_block<CacheType::F16, true>(it, key0, count, kt, v)
                     : load_block<CacheType::F16, false>(it, key0, count, kt, v);
    return whole ? load_block<CacheType::F32, true>(it, key0, count, kt, v)
                 : load_block<CacheType::F32, false>(it, key0, count, kt, v);
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

// Folds a part of the context into the running result. Folding a part that a row sees nothing of changes nothing, to
// the last bit: so a row's result depends on its own context alone, not on how a batch was cut into items.
AI void fold(float* run_ml, float* run, const float* ml, const float* part, int dp) {
    const float top = ml[0] > run_ml[0] ? ml[0] : run_ml[0];
    const VF a = exp2v(setf(run_ml[0] - top)), b = exp2v(setf(ml[0] - top));
    for (int d = 0; d < dp; d += 16) stf(run + d, fma(ldf(run + d), a, mulf(ldf(part + d), b)));
    float wa[16], wb[16];
    stf(wa, a);
    stf(wb, b);
    run_ml[1] = run_ml[1] * wa[0] + ml[1] * wb[0];
    run_ml[0] = top;
}

AI void clear_rows(float* ml, float* out, int rows, int dp) {
    for (int r = 0; r < rows; r++) {
        ml[2 * r] = -1e30f;
        ml[2 * r + 1] = 0.f;
    }
    for (int i = 0; i < rows * dp; i += 16) stf(out + i, setf(0.f));
}

AI void finish_row(const float* ml, const float* sum, float* out, int width) {
    const VF inv = setf(ml[1] == 0.f ? 0.f : 1.f / ml[1]);
    for (int d = 0; d < width; d += 16) store_part(out + d, mulf(ldf(sum + d), inv), width - d);
}

inline void attend_item(const AttendItem& it, uint8_t* scratch) {
    const int dk = dpad(it.head_dim), dv = dpad(it.value_dim), rows = it.tokens * it.group;
    float* kt = reinterpret_cast<float*>(scratch);
    float* v = kt + dk * kKeyBlock;
    float* q = v + dv * kKeyBlock;
    float* s = q + rows * dk;
    float* run = s + rows * kKeyBlock;
    float* run_ml = run + rows * dv;
    float* o = it.partial_out ? it.partial_out : run_ml + rows * 2;
    float* ml = it.partial_ml ? it.partial_ml : o + rows * dv;
    const VF scale = setf(it.scale * 1.44269504f);  // scores in powers of two
    for (int r = 0; r < rows; r++) {
        const float* src = it.q + (r / it.group) * it.q_stride + (r % it.group) * it.head_dim;
        for (int d = 0; d < dk; d += 16) stf(q + r * dk + d, mulf(load_part(src + d, it.head_dim - d), scale));
    }
    clear_rows(ml, o, rows, dv);
    clear_rows(run_ml, run, rows, dv);
    int from = 0;  // first row that sees anything of the current part
    for (int key = it.key0; key < it.key1; key += kKeyBlock) {
        const int count = it.key1 - key < kKeyBlock ? it.key1 - key : kKeyBlock;
        // Rows whose token is before this block see nothing of it: they are a prefix.
        const int skip = key > it.first_pos ? (key - it.first_pos) * it.group : 0, n = rows - skip;
        load_keys(it, key, count, kt, v);
        gemm_f32(kt, kKeyBlock, q + skip * dk, dk, n, dk, s + skip * kKeyBlock, kKeyBlock, kKeyBlock, true);
        for (int r = skip; r < rows; r++) {
            const int pos = it.first_pos + r / it.group;
            const int last = pos + 1 - key, first = it.window > 0 ? pos + 1 - it.window - key : 0;
            softmax_step(s + r * kKeyBlock, ml + 2 * r, o + r * dv, dv, first > 0 ? first : 0, last < count ? last : count);
        }
        gemm_f32(v, dv, s + skip * kKeyBlock, kKeyBlock, n, kKeyBlock, o + skip * dv, dv, dv, false);
        const bool part_ends = (key + kKeyBlock) % kSplitKeys == 0 || key + kKeyBlock >= it.key1;
        if (it.partial_out || !part_ends) continue;
        for (int r = from; r < rows; r++) fold(run_ml + 2 * r, run + r * dv, ml + 2 * r, o + r * dv, dv);
        clear_rows(ml, o, rows, dv);
        from = key + kKeyBlock > it.first_pos ? (key + kKeyBlock - it.first_pos) * it.group : 0;
    }
    if (it.partial_out) return;
    for (int r = 0; r < rows; r++)
        finish_row(run_ml + 2 * r, run + r * dv, it.out + (r / it.group) * it.out_stride + (r % it.group) * it.value_dim,
                   it.value_dim);
}

// parts x rows partial results, part-major; folded into the first in part order.
inline void merge_parts(float* ml, float* sums, int parts, int rows, int value_dim, int group, float* out,
                        size_t out_stride) {
    const int dp = dpad(value_dim);
    for (int r = 0; r < rows; r++) {
        for (int p = 1; p < parts; p++) {
            const size_t at = static_cast<size_t>(p) * rows + r;
            fold(ml + 2 * r, sums + static_cast<size_t>(r) * dp, ml + 2 * at, sums + at * dp, dp);
        }
        finish_row(ml + 2 * r, sums + static_cast<size_t>(r) * dp, out + (r / group) * out_stride + (r % group) * value_dim,
                   value_dim);
    }
}

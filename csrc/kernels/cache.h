// Rows of a KV cache: addresses in its pages, stores with rounding, loads as floats. Inside the unit's namespace.

AI void quantize_cache32(VF a, VF b, int8_t* codes, uint8_t* scale) {
    const float top = hmaxabs(a), other = hmaxabs(b);
    const float step = (top > other || top != top ? top : other) / 127.f;
    const VF inv = setf(step > 0.f ? 1.f / step : 0.f);
    st8(codes, cvtfi(mulf(a, inv)));
    st8(codes + 16, cvtfi(mulf(b, inv)));
    const uint16_t half = float_to_half(step);
    __builtin_memcpy(scale, &half, 2);
}

// I16: integers of a part of a row. Its scale makes the norm of every 128 of them kFixNorm at most, so that their products
// with a query of like kind are exact in 32 bits.
constexpr int kFixGroup = 128;
constexpr float kFixNorm = 32767.f;

// The largest norm of a group of 128 values, or somewhat more: each lane is its largest over the groups. NaN if a value is
// NaN or Inf.
AI float fix_norm(const float* x, int n) {
    VF most = setf(0.f), all = setf(0.f);
    for (int d = 0; d < n; d += kFixGroup) {
        VF sum = setf(0.f);
        for (int i = d; i < n && i < d + kFixGroup; i += 16) {
            const VF v = load_part(x + i, n - i);
            sum = fma(v, v, sum);
        }
        most = maxf(most, sum);
        all = addf(all, sum);
    }
    return sqrt1(hsum(fma(all, setf(0.f), most)));
}
// Codes of x [n] at `step` a unit; the largest magnitude. A step that is no number, or too small, has codes of zero.
AI float fix_codes(const float* x, int n, float step, int16_t* out) {
    const bool usable = step >= 0x1p-120f && step <= 3.40282347e38f;
    const VF inv = setf(usable ? 1.f / step : 0.f);
    VF top = setf(0.f);
    for (int i = 0; i < n; i += 16) {
        const VI codes = usable ? cvtfi(mulf(load_part(x + i, n - i), inv)) : seti(0);
        top = maxf(top, absf(cvtif(codes)));
        if (n - i >= 16) {
            st16(out + i, codes);
        } else {
            int16_t tail[16];
            st16(tail, codes);
            __builtin_memcpy(out + i, tail, sizeof(int16_t) * static_cast<size_t>(n - i));
        }
    }
    return hmax(top);
}
struct FixScales {
    float scale;
    uint16_t rest;  // bfloat16
    uint16_t most;
};
AI FixScales fix_scales(const uint8_t* row, int n) {
    FixScales s;
    __builtin_memcpy(&s, row + 2 * (n + n % 2), sizeof s);
    return s;
}
AI void cache_fix(const float* x, int n, int split, uint8_t* out) {
    int16_t* codes = reinterpret_cast<int16_t*>(out);
    if (n % 2) codes[n] = 0;
    FixScales s{fix_norm(x, split) / kFixNorm, 0, 0};
    s.most = static_cast<uint16_t>(fix_codes(x, split, s.scale, codes));
    if (split < n) {
        const float step = fix_norm(x + split, n - split) / kFixNorm;
        uint32_t bits;
        __builtin_memcpy(&bits, &step, 4);
        if (step <= 3e38f) bits += 0xffff;  // up: codes must not exceed 16 bits
        s.rest = static_cast<uint16_t>(bits >> 16);
        fix_codes(x + split, n - split, bf16_to_float(s.rest), codes + split);
    }
    __builtin_memcpy(out + 2 * (n + n % 2), &s, sizeof s);
}
inline void uncache_fix(const uint8_t* row, int n, int split, float* out) {
    const int16_t* codes = reinterpret_cast<const int16_t*>(row);
    const FixScales s = fix_scales(row, n);
    const float rest = bf16_to_float(s.rest);
    for (int i = 0; i < split; i++) out[i] = static_cast<float>(codes[i]) * s.scale;
    for (int i = split; i < n; i++) out[i] = static_cast<float>(codes[i]) * rest;
}

// x [n] as one cached row. Q8 is GGUF's Q8_0 but for where the scales are.
inline void cache_row(const float* x, int n, int split, void* out, CacheType type) {
    if (type == CacheType::I16) return cache_fix(x, n, split, static_cast<uint8_t*>(out));
    if (type == CacheType::F32) {
        __builtin_memcpy(out, x, 4 * static_cast<size_t>(n));
        return;
    }
    if (type == CacheType::Q8) {
        int8_t* codes = static_cast<int8_t*>(out);
        uint8_t* scales = static_cast<uint8_t*>(out) + cache_codes(n);
        for (int i = 0; i < n; i += kCacheGroup)
            quantize_cache32(load_part(x + i, n - i), n - i > 16 ? load_part(x + i + 16, n - i - 16) : setf(0.f), codes + i,
                             scales + i / kCacheGroup * 2);
        return;
    }
    uint16_t* o = static_cast<uint16_t*>(out);
    const bool half = type == CacheType::F16;
    for (int i = 0; i < n; i += 16) {
        const VF v = load_part(x + i, n - i);
        uint16_t tmp[16];
        uint16_t* to = n - i >= 16 ? o + i : tmp;
        half ? sth(to, v) : stb(to, v);
        if (to == tmp)
            for (int j = 0; i + j < n; j++) o[i + j] = tmp[j];
    }
}

// Values d..d+15 of a cached row of `width` values, zeros from n on; kWhole: n is no less than 16.
template <CacheType C, bool kWhole>
AI VF cache_load(const uint8_t* row, int d, int n, int width) {
    if constexpr (C == CacheType::F32) {
        const float* p = reinterpret_cast<const float*>(row) + d;
        return kWhole ? ldf(p) : load_part(p, n);
    } else if constexpr (C == CacheType::Q8) {
        const VF v = mulf(ld8(row + d), bch(row + cache_codes(width) + static_cast<size_t>(d / kCacheGroup) * 2));
        return kWhole || n >= 16 ? v : keep(v, 0, n, 0.f);
    } else {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + d;
        if (kWhole || n >= 16) return C == CacheType::F16 ? ldh(p) : ldb(p);
        uint16_t tmp[16] = {};
        for (int i = 0; i < n; i++) tmp[i] = p[i];
        return C == CacheType::F16 ? ldh(tmp) : ldb(tmp);
    }
}

template <CacheType C>
void uncache(const uint8_t* row, int n, float* out) {
    for (int i = 0; i < n; i += 16) store_part(out + i, cache_load<C, false>(row, i, n - i, n), n - i);
}

// A whole cached row of n values.
inline void uncache_row(const void* row, int n, int split, float* out, CacheType type) {
    const uint8_t* p = static_cast<const uint8_t*>(row);
    switch (type) {
        case CacheType::F32: return uncache<CacheType::F32>(p, n, out);
        case CacheType::F16: return uncache<CacheType::F16>(p, n, out);
        case CacheType::BF16: return uncache<CacheType::BF16>(p, n, out);
        case CacheType::Q8: return uncache<CacheType::Q8>(p, n, out);
        case CacheType::I16: return uncache_fix(p, n, split, out);
    }
}

AI const uint8_t* cache_slot(const void* pages, const AttendItem& it, int key, size_t bytes) {
    const size_t page = static_cast<size_t>(it.blocks[key / it.page_size]);
    const size_t slot = static_cast<size_t>(key % it.page_size);
    const size_t row = (page * it.kv_heads + it.kv_head) * it.page_size + slot;
    return static_cast<const uint8_t*>(pages) + row * bytes;
}

// Addresses of 16 cached rows from `key`; the first `count` exist, the rest repeat the first of them (their
// scores are masked and their probabilities are zero).
AI void cache_rows(const void* pages, const AttendItem& it, int key, int count, size_t bytes, const uint8_t** rows) {
    if (count >= 16 && it.page_size % 16 == 0 && key % 16 == 0) {
        const uint8_t* first = cache_slot(pages, it, key, bytes);
        for (int i = 0; i < 16; i++) rows[i] = first + i * bytes;
        return;
    }
    for (int i = 0; i < 16; i++) rows[i] = i < count ? cache_slot(pages, it, key + i, bytes) : rows[0];
}

// Asks for 16 rows of keys or values one block ahead: pages are short and scattered, hardware streams stop at each.
AI void prefetch_rows(const void* pages, const AttendItem& it, int key, int count, size_t bytes) {
    if (count <= 0) return;
    const uint8_t* rows[16];
    cache_rows(pages, it, key, count, bytes, rows);
    for (int i = 0; i < 16; i++)
        for (size_t b = 0; b < bytes; b += 64) touch(rows[i] + b);
}

// Grouped-query attention over a paged cache: online softmax, 64 keys a step. Inside the unit's namespace.
//
// Rows are (token, query head of the group): row = token * group + head. Keys are transposed once a step into
// [d][64], so scores and the weighted sum of values are both the float tile.

// Transposed keys kt [dk][64] and values v [64][dv] of `count` keys from key0.
template <CacheType C, bool kWhole>
void load_block(const AttendItem& it, int key0, int count, float* kt, float* v) {
    const uint8_t* rows[16];
    const int dk = dpad(it.head_dim), dv = dpad(it.value_dim);
    const size_t k_bytes = cache_row_bytes(C, it.k_row), v_bytes = cache_row_bytes(C, it.v_row);
    for (int j = 0; j < kKeyBlock; j += 16) {
        if (j >= count) {
            for (int d = 0; d < dk; d++) stf(kt + d * kKeyBlock + j, setf(0.f));
            for (int i = 0; i < 16 * dv; i += 16) stf(v + j * dv + i, setf(0.f));
            continue;
        }
        const int left = it.key1 - key0 - kKeyBlock - j;
        prefetch_rows(it.k_pages, it, key0 + kKeyBlock + j, left, k_bytes);
        if (it.v_pages != it.k_pages) prefetch_rows(it.v_pages, it, key0 + kKeyBlock + j, left, v_bytes);
        cache_rows(it.k_pages, it, key0 + j, count - j, k_bytes, rows);
        for (int d = 0; d < dk; d += 16) {
            VF m[16];
            UNR for (int i = 0; i < 16; i++) m[i] = cache_load<C, kWhole>(rows[i], d, it.head_dim - d, it.k_row);
            transpose16(m);
            UNR for (int i = 0; i < 16; i++) stf(kt + (d + i) * kKeyBlock + j, m[i]);
        }
        cache_rows(it.v_pages, it, key0 + j, count - j, v_bytes, rows);
        for (int i = 0; i < 16; i++)
            for (int d = 0; d < dv; d += 16)
                stf(v + (j + i) * dv + d, cache_load<C, kWhole>(rows[i], d, it.value_dim - d, it.v_row));
    }
}

template <CacheType C>
void load_keys(const AttendItem& it, int key0, int count, float* kt, float* v) {
    if (it.head_dim == dpad(it.head_dim) && it.value_dim == dpad(it.value_dim))
        load_block<C, true>(it, key0, count, kt, v);
    else
        load_block<C, false>(it, key0, count, kt, v);
}

// Few rows (decode): what a key costs is reading it, so it goes from the cache to registers and is used there. The sums
// run in the order of the float tile: a row's result is the same to the last bit either way.
constexpr int kFewRows = 32, kRowGroup = 8;
constexpr int kReadAheadKeys = 128;  // 64 to 256 read equally fast

// Cache lines of keys and values ahead, asked for a few at a time: 16 rows of both at once are more than a core has open
// misses for. One Zen 5 core reads a half-precision cache of 16k tokens at 15.7 GB/s so, 6.5 with a burst a block.
struct KeysAhead {
    const uint8_t* at[2] = {};
    size_t left[2] = {};

    AI void step(int lines) {
        for (int w = 0; w < 2; w++)
            for (int i = 0; i < lines && left[w]; i++, left[w]--, at[w] += 64) touch(at[w]);
    }
};

// s [T][64]: scores of T rows of q [T][dk] with 16 keys.
template <CacheType C, int T>
AI void score16(const uint8_t* const* keys, int dk, int width, const float* q, float* s, KeysAhead& ahead, int lines) {
    VF sum[T];
    UNR for (int t = 0; t < T; t++) sum[t] = setf(0.f);
    for (int d = 0; d < dk; d += 16) {
        ahead.step(lines);
        VF m[16];
        UNR for (int i = 0; i < 16; i++) m[i] = cache_load<C, true>(keys[i], d, 16, width);
        transpose16(m);
        UNR for (int i = 0; i < 16; i++) UNR for (int t = 0; t < T; t++) sum[t] = fma(bcf(q + t * dk + d + i), m[i], sum[t]);
    }
    UNR for (int t = 0; t < T; t++) stf(s + t * kKeyBlock, sum[t]);
}

// out [T][dv] += p [T][64] times the first `count` of these values.
template <CacheType C, int T, int N>
AI void weigh_values(const uint8_t* const* values, int count, int d, int width, const float* p, float* out, int dv) {
    VF sum[T][N];
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) sum[t][n] = ldf(out + t * dv + d + n * 16);
    for (int i = 0; i < count; i++) {
        VF v[N];
        UNR for (int n = 0; n < N; n++) v[n] = cache_load<C, true>(values[i], d + n * 16, 16, width);
        UNR for (int t = 0; t < T; t++) {
            const VF a = bcf(p + t * kKeyBlock + i);
            UNR for (int n = 0; n < N; n++) sum[t][n] = fma(a, v[n], sum[t][n]);
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int n = 0; n < N; n++) stf(out + t * dv + d + n * 16, sum[t][n]);
}

template <CacheType C, int T>
void score_few(const AttendItem& it, int key0, int count, int rows, const float* q, float* s) {
    const int dk = it.head_dim;
    const size_t bytes = cache_row_bytes(C, it.k_row), v_bytes = cache_row_bytes(C, it.v_row);
    const size_t lines = (16 * bytes + 63) / 64, v_lines = it.v_pages == it.k_pages ? 0 : (16 * v_bytes + 63) / 64;
    const int pace = static_cast<int>((lines * 16 + static_cast<size_t>(dk) - 1) / static_cast<size_t>(dk));
    for (int j = 0; j < count; j += 16) {
        const uint8_t* keys[16];
        KeysAhead ahead;
        const int next = key0 + kReadAheadKeys + j;
        if (next + 16 <= it.key_end && it.page_size % 16 == 0) {
            ahead = {{cache_slot(it.k_pages, it, next, bytes), cache_slot(it.v_pages, it, next, v_bytes)}, {lines, v_lines}};
        }
        cache_rows(it.k_pages, it, key0 + j, count - j, bytes, keys);
        for (int r = 0; r < rows; r += T) score16<C, T>(keys, dk, it.k_row, q + r * dk, s + r * kKeyBlock + j, ahead, pace);
    }
}

template <CacheType C, int T>
void weigh_few(const AttendItem& it, int key0, int count, int rows, const float* p, float* out) {
    const uint8_t* values[kKeyBlock];
    const size_t bytes = cache_row_bytes(C, it.v_row);
    for (int j = 0; j < count; j += 16) cache_rows(it.v_pages, it, key0 + j, count - j, bytes, values + j);
    const int dv = it.value_dim;
    for (int r = 0; r < rows; r += T) {
        int d = 0;
        for (; d + 32 <= dv; d += 32)
            weigh_values<C, T, 2>(values, count, d, it.v_row, p + r * kKeyBlock, out + r * dv, dv);
        if (d < dv) weigh_values<C, T, 1>(values, count, d, it.v_row, p + r * kKeyBlock, out + r * dv, dv);
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

// sink: null, or a logit that takes its share of the softmax and brings no value.
AI void finish_row(const float* ml, const float* sum, const float* sink, float* out, int width) {
    float total = ml[1], gain = 1.f;
    if (sink) {
        const float level = *sink * 1.44269504f, top = level > ml[0] ? level : ml[0];
        float own[16], rest[16];
        stf(own, exp2v(setf(level - top)));
        stf(rest, exp2v(setf(ml[0] - top)));
        gain = rest[0];
        total = total * gain + own[0];
    }
    const VF inv = setf(total == 0.f ? 0.f : gain / total);
    for (int d = 0; d < width; d += 16) store_part(out + d, mulf(ldf(sum + d), inv), width - d);
}

// First key that the query at `pos` sees, and the position behind the last one that sees `key`.
AI int first_seen(const AttendItem& it, int pos) {
    const int window = it.window > 0 ? pos + 1 - it.window : 0, chunk = it.chunk > 0 ? pos / it.chunk * it.chunk : 0;
    return window > chunk ? window : chunk;
}
AI int64_t last_seer(const AttendItem& it, int key) {
    const int64_t window = it.window > 0 ? int64_t{key} + it.window : INT64_MAX;
    const int64_t chunk = it.chunk > 0 ? (int64_t{key} / it.chunk + 1) * it.chunk : INT64_MAX;
    return window < chunk ? window : chunk;
}

// Scores, probabilities and weighted values of rows [from, to) with the keys of one block.
struct Rows64 {
    int key, count, from, to;
    float *q, *s, *ml, *o;
};
AI void softmax_rows(const AttendItem& it, const Rows64& b, int dv) {
    for (int r = b.from; r < b.to; r++) {
        const int pos = it.first_pos + r / it.group, last = pos + 1 - b.key, first = first_seen(it, pos) - b.key;
        softmax_step(b.s + r * kKeyBlock, b.ml + 2 * r, b.o + r * dv, dv, first > 0 ? first : 0,
                     last < b.count ? last : b.count);
    }
}
template <CacheType C>
AI void block_many(const AttendItem& it, const Rows64& b, float* kt, float* v) {
    const int dk = dpad(it.head_dim), dv = dpad(it.value_dim), n = b.to - b.from;
    load_keys<C>(it, b.key, b.count, kt, v);
    gemm_f32(kt, kKeyBlock, b.q + b.from * dk, dk, n, dk, b.s + b.from * kKeyBlock, kKeyBlock, kKeyBlock, true);
    softmax_rows(it, b, dv);
    gemm_f32(v, dv, b.s + b.from * kKeyBlock, kKeyBlock, n, kKeyBlock, b.o + b.from * dv, dv, dv, false);
}
template <CacheType C, int T>
void block_few(const AttendItem& it, const Rows64& b) {
    score_few<C, T>(it, b.key, b.count, b.to, b.q, b.s);
    softmax_rows(it, b, it.value_dim);
    weigh_few<C, T>(it, b.key, b.count, b.to, b.s, b.o);
}

template <CacheType C>
void attend_keys(const AttendItem& it, uint8_t* scratch) {
    const int dk = dpad(it.head_dim), dv = dpad(it.value_dim), rows = it.tokens * it.group;
    const bool few = rows <= kFewRows && it.head_dim == dk && it.value_dim == dv;
    const int step = rows == 1 ? 1 : rows == 2 ? 2 : rows <= 4 ? 4 : kRowGroup;
    const int padded = few ? (rows + step - 1) / step * step : rows;
    float* kt = reinterpret_cast<float*>(scratch);
    float* v = kt + dk * kKeyBlock;
    float* q = v + dv * kKeyBlock;
    float* s = q + padded * dk;
    float* run = s + padded * kKeyBlock;
    float* run_ml = run + padded * dv;
    float* o = run_ml + padded * 2;
    float* ml = o + padded * dv;
    const VF scale = setf(it.scale * 1.44269504f);  // scores in powers of two
    for (int r = 0; r < rows; r++) {
        const float* src = it.q + (r / it.group) * it.q_stride + (r % it.group) * it.head_dim;
        for (int d = 0; d < dk; d += 16) stf(q + r * dk + d, mulf(load_part(src + d, it.head_dim - d), scale));
    }
    for (int i = rows * dk; i < padded * dk; i += 16) stf(q + i, setf(0.f));
    for (int i = rows * kKeyBlock; i < padded * kKeyBlock; i += 16) stf(s + i, setf(0.f));
    clear_rows(ml, o, padded, dv);
    clear_rows(run_ml, run, rows, dv);
    int part_from = 0;  // first row that sees anything of the current part
    for (int key = it.key0; key < it.key1; key += kKeyBlock) {
        Rows64 b{key, it.key1 - key < kKeyBlock ? it.key1 - key : kKeyBlock, 0, rows, q, s, ml, o};
        if (few) {
            switch (step) {
                case 1: block_few<C, 1>(it, b); break;
                case 2: block_few<C, 2>(it, b); break;
                case 4: block_few<C, 4>(it, b); break;
                default: block_few<C, kRowGroup>(it, b);
            }
        } else {
            // Rows that see nothing of this block: tokens before it, and tokens whose window or chunk is behind it.
            const int64_t end = last_seer(it, key + b.count - 1) - it.first_pos;
            b.from = key > it.first_pos ? (key - it.first_pos) * it.group : 0;
            b.to = end < it.tokens ? static_cast<int>(end < 0 ? 0 : end) * it.group : rows;
            if (b.from < b.to) block_many<C>(it, b, kt, v);
        }
        const bool part_ends = (key + kKeyBlock) % kSplitKeys == 0 || key + kKeyBlock >= it.key1;
        if (it.partial_out || !part_ends) continue;
        for (int r = part_from; r < rows; r++) fold(run_ml + 2 * r, run + r * dv, ml + 2 * r, o + r * dv, dv);
        clear_rows(ml, o, rows, dv);
        part_from = key + kKeyBlock > it.first_pos ? (key + kKeyBlock - it.first_pos) * it.group : 0;
    }
    if (it.partial_out) {
        __builtin_memcpy(it.partial_out, o, sizeof(float) * static_cast<size_t>(rows) * dv);
        __builtin_memcpy(it.partial_ml, ml, sizeof(float) * 2 * static_cast<size_t>(rows));
        return;
    }
    for (int r = 0; r < rows; r++)
        finish_row(run_ml + 2 * r, run + r * dv, it.sinks ? it.sinks + r % it.group : nullptr,
                   it.out + (r / it.group) * it.out_stride + (r % it.group) * it.value_dim, it.value_dim);
}

#include "kernels/attend_int16.h"

inline void attend_item(const AttendItem& it, uint8_t* scratch) {
    switch (it.type) {
        case CacheType::F32: return attend_keys<CacheType::F32>(it, scratch);
        case CacheType::F16: return attend_keys<CacheType::F16>(it, scratch);
        case CacheType::BF16: return attend_keys<CacheType::BF16>(it, scratch);
        case CacheType::Q8: return attend_keys<CacheType::Q8>(it, scratch);
        case CacheType::I16: return attend_int16(it, scratch);
    }
}

// parts x rows partial results, part-major; folded into the first in part order.
inline void merge_parts(float* ml, float* sums, int parts, int rows, int value_dim, int group, const float* sinks,
                        float* out, size_t out_stride) {
    const int dp = dpad(value_dim);
    for (int r = 0; r < rows; r++) {
        for (int p = 1; p < parts; p++) {
            const size_t at = static_cast<size_t>(p) * rows + r;
            fold(ml + 2 * r, sums + static_cast<size_t>(r) * dp, ml + 2 * at, sums + at * dp, dp);
        }
        finish_row(ml + 2 * r, sums + static_cast<size_t>(r) * dp, sinks ? sinks + r % group : nullptr,
                   out + (r / group) * out_stride + (r % group) * value_dim, value_dim);
    }
}

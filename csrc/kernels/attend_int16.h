// Attention by products of 16-bit integers, over a cache that holds such. Inside the unit's namespace.
//
// Queries become integers with a scale a row (over latents two: latent and rotated part). Sums of products of up to 128
// values are exact in 32 bits, whatever tile they are formed in: a row's result depends on no row or key beside it. Scores
// lie [key][row], one vector for 16 rows: keys are read as they lie, for all rows of an item, and the softmax runs on whole
// vectors. Weights of a block's 64 values are integers with a scale a row.
constexpr float kFixQuery = 65000.f;     // norm of a group of a query's codes: times kFixNorm, with roundings, below 2^31
constexpr float kFixMost = 32767.f;      // a code
constexpr float kFixWeights = 2.145e9f;  // a block's weighted values, roundings apart
constexpr int kFixPairs = kFixGroup / 2;

// What a row of keys is cut into: ranges of values with a scale of their own, and groups of them.
struct FixShape {
    int parts, groups, ld, dv;  // ld: int16 of a buffered row; dv: padded width of a value
    int part_at[3];             // in values; padded
    int group_at[12], group_pairs[12], group_part[12];
    bool shared;  // values are the first part of keys
};
AI FixShape fix_shape(const AttendItem& it) {
    FixShape s{};
    s.shared = it.k_pages == it.v_pages && it.value_dim % 16 == 0 && it.value_dim < it.head_dim;
    s.parts = s.shared ? 2 : 1;
    s.part_at[0] = 0;
    s.part_at[1] = s.shared ? it.value_dim : it.head_dim;
    s.part_at[2] = it.head_dim;
    s.ld = (it.head_dim + 31) / 32 * 32;
    s.dv = dpad(it.value_dim);
    for (int p = 0; p < s.parts; p++)
        for (int d = s.part_at[p]; d < s.part_at[p + 1]; d += kFixGroup) {
            const int left = s.part_at[p + 1] - d, n = left < kFixGroup ? left : kFixGroup;
            s.group_at[s.groups] = d;
            s.group_pairs[s.groups] = (n + 1) / 2;
            s.group_part[s.groups++] = p;
        }
    return s;
}

// 16 neighbouring rows of the cache.
struct FixRun {
    const uint8_t* row;
    size_t stride;
};

// Scratch of one item; R rows, a multiple of 16.
struct FixRows {
    int rows, R, n;  // n: keys of the block, padded to 16
    int o_rows;      // of o: R, or those that are there
    bool few;        // as fix_few has it
    FixRun k[kKeyBlock / 16], values[kKeyBlock / 16];
    uint8_t *copy, *copy_v, *line;  // rows that pages hold in pieces; 16 rows of queries
    uint8_t *v, *q, *p;             // pairs: [32][dv], [group][R / 16][64][16], [32][R]
    float *s, *o, *run;             // [64][R], [o_rows][dv], [R][dv]
    float* q_scale;                 // [2][R]
    float *top, *sum;               // a row's largest score and sum of weights in the current part
    float *keep, *gain;             // what its sums so far, and the block's integers, are multiplied by
    float* run_ml;                  // as top and sum, [R][2], over the parts before
    int32_t *first, *last;          // keys that a row sees
    // A key's scales, its value's, and the largest magnitude in its value: [2][64], [64], [64].
    float *k_scale, *v_scale, *v_most;
};
AI uint8_t* fix_take(uint8_t*& p, size_t bytes) {
    uint8_t* at = p;
    p += (bytes + 63) / 64 * 64;
    return at;
}
template <class T>
AI void fix_take(uint8_t*& p, T*& to, size_t count) { to = reinterpret_cast<T*>(fix_take(p, count * sizeof(T))); }

AI FixRows fix_rows(const FixShape& f, int rows, uint8_t* scratch) {
    FixRows b{};
    b.rows = rows;
    b.R = b.o_rows = (rows + 15) / 16 * 16;
    const size_t R = static_cast<size_t>(b.R), dv = static_cast<size_t>(f.dv), ld = static_cast<size_t>(f.ld);
    fix_take(scratch, b.copy, kKeyBlock * (2 * ld + 8));
    fix_take(scratch, b.copy_v, kKeyBlock * (2 * dv + 8));
    fix_take(scratch, b.line, 16 * 2 * ld + 64);
    fix_take(scratch, b.v, kKeyBlock / 2 * dv * 4);
    fix_take(scratch, b.q, static_cast<size_t>(f.groups) * R * kFixPairs * 4);
    fix_take(scratch, b.p, kKeyBlock / 2 * R * 4);
    fix_take(scratch, b.s, kKeyBlock * R);
    fix_take(scratch, b.o, R * dv);
    fix_take(scratch, b.run, R * dv);
    fix_take(scratch, b.q_scale, 2 * R);
    for (float** p : {&b.top, &b.sum, &b.keep, &b.gain}) fix_take(scratch, *p, R);
    fix_take(scratch, b.run_ml, 2 * R);
    fix_take(scratch, b.first, R);
    fix_take(scratch, b.last, R);
    fix_take(scratch, b.k_scale, 2 * kKeyBlock);
    fix_take(scratch, b.v_scale, kKeyBlock);
    fix_take(scratch, b.v_most, kKeyBlock);
    return b;
}

// What `fix_queries` makes, in memory that items share.
AI void fix_ready(const FixShape& f, FixRows& b, uint8_t* at) {
    const size_t R = static_cast<size_t>(b.R);
    fix_take(at, b.q, static_cast<size_t>(f.groups) * R * kFixPairs * 4);
    fix_take(at, b.q_scale, 2 * R);
    fix_take(at, b.first, R);
    fix_take(at, b.last, R);
}
// One vector of rows, and values of whole vectors.
AI bool fix_few(const AttendItem& it) { return it.tokens * it.group <= 16 && it.value_dim % 16 == 0; }

// Rows [j, j + 16) of a block as they lie in their page; copied together where a page holds them in pieces. The first
// `here` exist: what lies behind them is not looked at, or repeats one of them.
AI FixRun fix_run(const void* pages, const AttendItem& it, int key, int here, size_t bytes, uint8_t* copy) {
    if (it.page_size % 16 == 0) return {cache_slot(pages, it, key, bytes), bytes};
    const uint8_t* rows[16];
    cache_rows(pages, it, key, here, bytes, rows);
    for (int i = 0; i < 16; i++) __builtin_memcpy(copy + static_cast<size_t>(i) * bytes, rows[i], bytes);
    return {copy, bytes};
}
AI void fix_ahead(const void* pages, const AttendItem& it, int key, size_t bytes) {
    if (it.page_size % 16 || key + 16 > it.key_end) return;
    const uint8_t* p = cache_slot(pages, it, key, bytes);
    for (size_t i = 0; i < 16 * bytes; i += 64) touch(p + i);
}
// Rows that come a block later, asked for a line or two at every step of the tiles: evenly and in the order that they lie
// in, into L2. A block is more than L1 holds beside queries and sums, and asking for it there takes a core's few places for
// misses.
struct FixAhead {
    const AttendItem* it;
    const void* pages;
    size_t bytes;
    int key, end, lines;
    int left = 0;
    const uint8_t* at = nullptr;

    AI void step() {
        for (int i = 0; i < lines; i++) {
            if (left == 0 && !next()) return;
            touch_far(at);
            at += 64;
            left--;
        }
    }
    bool next() {
        if (key + 16 > end) return false;
        at = cache_slot(pages, *it, key, bytes);
        left = static_cast<int>((16 * bytes + 63) / 64);
        key += 16;
        return true;
    }
};
// The block at `key`, within `steps` calls of `step`.
AI FixAhead fix_ahead_of(const AttendItem& it, bool values, int key, int steps) {
    const size_t bytes = cache_row_bytes(CacheType::I16, values ? it.v_row : it.k_row);
    const int lines = static_cast<int>(kKeyBlock * bytes / 64) / steps;
    const int end = it.page_size % 16 ? 0 : key + kKeyBlock < it.key_end ? key + kKeyBlock : it.key_end;
    return {&it, values ? it.v_pages : it.k_pages, bytes, key, end, lines < 1 ? 1 : lines};
}
// Values as pairs of two keys: 16 from d on.
AI VI fix_pair(const uint8_t* even, const uint8_t* odd, int d) { return ori(ldw(even + d * 2), sll(ldw(odd + d * 2), 16)); }

// Where a block's keys and values lie, and their scales; for many rows its values as pairs of keys [32][dv] too.
inline void fix_keys(const AttendItem& it, const FixShape& f, FixRows& b, int key0, int count) {
    const size_t k_bytes = cache_row_bytes(CacheType::I16, it.k_row), v_bytes = cache_row_bytes(CacheType::I16, it.v_row);
    b.n = (count + 15) / 16 * 16;
    for (int j = 0; j < b.n; j += 16) {
        const int here = count - j < 16 ? count - j : 16;
        if (!b.few) fix_ahead(it.k_pages, it, key0 + kKeyBlock + j, k_bytes);
        if (!b.few && !f.shared) fix_ahead(it.v_pages, it, key0 + kKeyBlock + j, v_bytes);
        const FixRun k = fix_run(it.k_pages, it, key0 + j, here, k_bytes, b.copy + static_cast<size_t>(j) * k_bytes);
        FixRun v = k;
        if (!f.shared) v = fix_run(it.v_pages, it, key0 + j, here, v_bytes, b.copy_v + static_cast<size_t>(j) * v_bytes);
        b.k[j / 16] = k;
        b.values[j / 16] = v;
        for (int i = 0; i < 16; i++) {
            const FixScales ks = fix_scales(k.row + static_cast<size_t>(i) * k.stride, it.k_row);
            const FixScales vs = f.shared ? ks : fix_scales(v.row + static_cast<size_t>(i) * v.stride, it.v_row);
            b.k_scale[j + i] = ks.scale;
            b.k_scale[kKeyBlock + j + i] = bf16_to_float(ks.rest);
            b.v_scale[j + i] = vs.scale;
            b.v_most[j + i] = vs.scale * static_cast<float>(vs.most);
        }
        for (int i = 0; i < 16 && !b.few; i += 2) {
            const uint8_t* even = v.row + static_cast<size_t>(i) * v.stride;
            const uint8_t* odd = even + v.stride;
            uint8_t* to = b.v + static_cast<size_t>((j + i) / 2) * static_cast<size_t>(f.dv) * 4;
            int d = 0;
            for (; d + 16 <= it.value_dim; d += 16) sti(to + d * 4, fix_pair(even, odd, d));
            for (; d < it.value_dim; d++) {
                __builtin_memcpy(to + d * 4, even + d * 2, 2);
                __builtin_memcpy(to + d * 4 + 2, odd + d * 2, 2);
            }
        }
    }
}

// Query rows as integers, 16 beside each other: pairs [group][R / 16][64][16 rows].
AI void fix_queries(const AttendItem& it, const FixShape& f, FixRows& b) {
    const float scale = it.scale * 1.44269504f;  // scores in powers of two
    for (int v = 0; v < b.R; v += 16) {
        for (int i = 0; i < 16; i++) {
            const int r = v + i;
            int16_t* line = reinterpret_cast<int16_t*>(b.line) + i * f.ld;
            b.q_scale[r] = b.q_scale[b.R + r] = 0.f;
            b.last[r] = INT32_MAX / 2;  // rows that pad a vector see everything, and nobody sees them
            b.first[r] = 0;
            for (int d = 0; d < f.ld; d += 16) st16(line + d, seti(0));
            if (r >= b.rows) continue;
            const int token = r / it.group, pos = it.first_pos + token;
            b.last[r] = pos;
            b.first[r] = first_seen(it, pos);
            const float* q = it.q + token * it.q_stride + (r % it.group) * it.head_dim;
            for (int p = 0; p < f.parts; p++) {
                const int from = f.part_at[p], n = f.part_at[p + 1] - from;
                VF top = setf(0.f);
                for (int d = 0; d < n; d += 16) top = maxf(top, absf(load_part(q + from + d, n - d)));
                const float a = fix_norm(q + from, n) / kFixQuery, c = hmax(top) / kFixMost, step = c > a ? c : a;
                b.q_scale[p * b.R + r] = step * scale;
                fix_codes(q + from, n, step, line + from);
            }
        }
        for (int g = 0; g < f.groups; g++) {
            uint8_t* to = b.q + static_cast<size_t>(g * (b.R / 16) + v / 16) * kFixPairs * 64;
            if (b.few && b.rows <= 8) {  // the lanes of fix_score_few<.., true>
                for (int at = 0; at < f.group_pairs[g]; at += 2)
                    for (int i = 0; i < 8; i++)
                        __builtin_memcpy(to + at * 32 + i * 8, b.line + (i * f.ld + f.group_at[g] + at * 2) * 2, 8);
                continue;
            }
            for (int at = 0; at < f.group_pairs[g]; at += 16) {
                VF m[16];
                UNR for (int i = 0; i < 16; i++) m[i] = castf(ldi(b.line + (i * f.ld + f.group_at[g] + at * 2) * 2));
                transpose16(m);
                UNR for (int i = 0; i < 16; i++) stf(reinterpret_cast<float*>(to + (at + i) * 64), m[i]);
            }
        }
    }
}

#include "kernels/attend_int16_tiles.h"

// Steps of the tiles of few rows over a block: of its scores, of its values.
AI int fix_score_steps(const FixShape& f, int rows) {
    int pairs = 0;
    for (int g = 0; g < f.groups; g++) pairs += f.group_pairs[g];
    return kKeyBlock / kFixKeysOne * (rows <= 8 ? (pairs + 1) / 2 : pairs);
}
AI int fix_value_steps(const FixShape& f, int rows) {
    const int t = kFixVectors == 1 || rows <= 4 ? 4 : 8, d = kFixVectors == 1 ? 16 : 32;
    return (rows + t - 1) / t * ((f.dv + d - 1) / d) * (kKeyBlock / 2);
}

AI void fix_clear(const FixRows& b, int dv) {
    for (int r = 0; r < b.R; r += 16) {
        stf(b.top + r, setf(-1e30f));
        stf(b.sum + r, setf(0.f));
    }
    for (int i = 0; i < b.o_rows * dv; i += 16) stf(b.o + i, setf(0.f));
}

// The queries of items that differ in their keys alone. Other caches' rows need none.
inline void attend_ready(const AttendItem& it, uint8_t* to, uint8_t* scratch) {
    const FixShape f = fix_shape(it);
    FixRows b = fix_rows(f, it.tokens * it.group, scratch);
    b.few = fix_few(it);
    fix_ready(f, b, to);
    fix_queries(it, f, b);
}

inline void attend_int16(const AttendItem& it, uint8_t* scratch) {
    const FixShape f = fix_shape(it);
    const int rows = it.tokens * it.group, dv = f.dv;
    FixRows b = fix_rows(f, rows, scratch);
    b.few = fix_few(it);
    if (it.partial_out && rows % 8 == 0) {  // what the tiles write are whole rows of it
        b.o = it.partial_out;
        b.o_rows = rows;
    }
    if (it.ready)
        fix_ready(f, b, const_cast<uint8_t*>(it.ready));
    else
        fix_queries(it, f, b);
    fix_clear(b, dv);
    clear_rows(b.run_ml, b.run, rows, dv);
    int part_from = 0;  // first row that sees anything of the current part
    for (int key = it.key0; key < it.key1; key += kKeyBlock) {
        const int count = it.key1 - key < kKeyBlock ? it.key1 - key : kKeyBlock;
        // Rows that see nothing of this block: tokens before it, and tokens whose window or chunk is behind it.
        const int64_t end = last_seer(it, key + count - 1) - it.first_pos;
        const int from = key > it.first_pos ? (key - it.first_pos) * it.group / 16 : 0;
        const int to = end < it.tokens ? (static_cast<int>(end < 0 ? 0 : end) * it.group + 15) / 16 : b.R / 16;
        if (from < to) {
            fix_keys(it, f, b, key, count);
            const int next = key + kKeyBlock;
            FixAhead ahead = fix_ahead_of(it, false, next, fix_score_steps(f, rows));
            if (!b.few)
                fix_scores(f, b, from, to);
            else
                rows <= 8 ? fix_scores_few<true>(f, b, ahead) : fix_scores_few<false>(f, b, ahead);
            const int last_pos = it.first_pos + it.tokens - 1;
            const bool masked = count % 16 || key + count - 1 > it.first_pos || first_seen(it, last_pos) > key;
            for (int v = from; v < to; v++) masked ? fix_softmax<true>(b, v, key) : fix_softmax<false>(b, v, key);
            if (!f.shared) ahead = fix_ahead_of(it, true, next, fix_value_steps(f, rows));
            if (b.few && (rows <= 4 || kFixVectors == 1))
                fix_values_few<4>(b, dv, rows, ahead);
            else if (b.few)
                fix_values_few<8>(b, dv, rows, ahead);
            else
                fix_values(b, dv, from * 16, to * 16 < rows ? to * 16 : (rows + kFixKeys - 1) / kFixKeys * kFixKeys);
        }
        const bool part_ends = (key + kKeyBlock) % kSplitKeys == 0 || key + kKeyBlock >= it.key1;
        if (it.partial_out || !part_ends) continue;
        for (int r = part_from; r < rows; r++) {
            const float ml[2] = {b.top[r], b.sum[r]};
            fold(b.run_ml + 2 * r, b.run + r * dv, ml, b.o + r * dv, dv);
        }
        fix_clear(b, dv);
        part_from = key + kKeyBlock > it.first_pos ? (key + kKeyBlock - it.first_pos) * it.group : 0;
    }
    if (it.partial_out) {
        if (b.o != it.partial_out)
            __builtin_memcpy(it.partial_out, b.o, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(dv));
        for (int r = 0; r < rows; r++) {
            it.partial_ml[2 * r] = b.top[r];
            it.partial_ml[2 * r + 1] = b.sum[r];
        }
        return;
    }
    for (int r = 0; r < rows; r++)
        finish_row(b.run_ml + 2 * r, b.run + r * dv, it.sinks ? it.sinks + r % it.group : nullptr,
                   it.out + (r / it.group) * it.out_stride + (r % it.group) * it.value_dim, it.value_dim);
}

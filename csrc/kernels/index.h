// Scores of a token indexer: sum over heads of weight * relu(q . key), 64 keys a step. Inside the unit's namespace.
//
// Keys are transposed, so that a lane is a key. A cache of 16-bit integers is multiplied as it is, queries becoming integers
// with a scale a head: sums of products are exact, in whatever tile. Others become floats, heads rows of the float tile.
constexpr int kIndexHeads = 4;   // heads of one integer tile
constexpr int kIndexVectors = kF32Vectors;  // and its vectors of 16 keys

// Rows of one token's heads and weights; heads are padded to whole tiles with zeros.
struct IndexRows {
    const int16_t* codes;  // [heads][dim]
    const float* floats;   // [heads][dim]
    const float* weights;  // [heads]
};

// Adds what one tile of heads gives to the scores of N * 16 keys.
template <int N>
AI void index_tile(const uint8_t* pairs, const int16_t* q, int dim, const float* weights, float* out) {
    VI sum[kIndexHeads][N];
    UNR for (int t = 0; t < kIndexHeads; t++) UNR for (int n = 0; n < N; n++) sum[t][n] = seti(0);
    for (int p = 0; p < dim / 2; p++) {
        VI key[N];
        UNR for (int n = 0; n < N; n++) key[n] = ldi(pairs + (p * (kKeyBlock / 16) + n) * 64);
        UNR for (int t = 0; t < kIndexHeads; t++) {
            const VI pair = bci(q + t * dim + 2 * p);
            UNR for (int n = 0; n < N; n++) sum[t][n] = dot2(sum[t][n], pair, key[n]);
        }
    }
    UNR for (int n = 0; n < N; n++) {
        VF total = ldf(out + n * 16);
        UNR for (int t = 0; t < kIndexHeads; t++)
            total = fma(setf(weights[t]), maxf(cvtif(sum[t][n]), setf(0.f)), total);
        stf(out + n * 16, total);
    }
}

// The block's keys as pairs [dim / 2][64] of their integers, and their scales [64].
inline void index_pairs(const AttendItem& at, int key, int count, int dim, uint8_t* pairs, float* scales) {
    const size_t bytes = cache_row_bytes(CacheType::I16, dim);
    for (int j = 0; j < kKeyBlock; j += 16) {
        const uint8_t* rows[16];
        if (j < count) cache_rows(at.k_pages, at, key + j, count - j, bytes, rows);
        for (int i = 0; i < 16; i++) scales[j + i] = j + i < count ? fix_scales(rows[i], dim).scale : 0.f;
        for (int d = 0; d < dim / 2; d += 16) {
            VF m[16];
            UNR for (int i = 0; i < 16; i++) m[i] = j < count ? ldf(reinterpret_cast<const float*>(rows[i]) + d) : setf(0.f);
            transpose16(m);
            for (int i = 0; i < 16 && d + i < dim / 2; i++) stf(reinterpret_cast<float*>(pairs) + (d + i) * kKeyBlock + j, m[i]);
        }
    }
}

AI void index_integers(const IndexRows& q, int heads, int dim, const uint8_t* pairs, const float* scales, float* s) {
    for (int j = 0; j < kKeyBlock; j += 16) stf(s + j, setf(0.f));
    for (int h = 0; h < heads; h += kIndexHeads)
        for (int j = 0; j < kKeyBlock; j += 16 * kIndexVectors)
            index_tile<kIndexVectors>(pairs + j * 4, q.codes + h * dim, dim, q.weights + h, s + j);
    for (int j = 0; j < kKeyBlock; j += 16) stf(s + j, mulf(ldf(s + j), ldf(scales + j)));
}

// The block's keys as floats [dim][64].
inline void index_floats(const IndexItem& it, const AttendItem& at, int key, int count, float* kt, float* line) {
    const size_t bytes = cache_row_bytes(it.type, it.dim);
    const int dim = dpad(it.dim);
    for (int j = 0; j < kKeyBlock; j += 16) {
        const uint8_t* rows[16];
        if (j < count) cache_rows(at.k_pages, at, key + j, count - j, bytes, rows);
        for (int i = 0; i < 16 * dim; i += 16) stf(line + i, setf(0.f));
        for (int i = 0; i < 16 && j + i < count; i++) uncache_row(rows[i], it.dim, it.dim, line + i * dim, it.type);
        for (int d = 0; d < dim; d += 16) {
            VF m[16];
            UNR for (int i = 0; i < 16; i++) m[i] = ldf(line + i * dim + d);
            transpose16(m);
            UNR for (int i = 0; i < 16; i++) stf(kt + (d + i) * kKeyBlock + j, m[i]);
        }
    }
}

AI void index_products(const IndexRows& q, int heads, int dim, const float* kt, float* product, float* s) {
    gemm_f32(kt, kKeyBlock, q.floats, static_cast<size_t>(dim), heads, dim, product, kKeyBlock, kKeyBlock, true);
    for (int j = 0; j < kKeyBlock; j += 16) {
        VF total = setf(0.f);
        for (int h = 0; h < heads; h++)
            total = fma(setf(q.weights[h]), maxf(ldf(product + h * kKeyBlock + j), setf(0.f)), total);
        stf(s + j, total);
    }
}

// Codes of one head's query, and its weight times what a code is worth.
AI float index_codes(const float* x, int dim, int16_t* out) {
    VF top = setf(0.f);
    for (int i = 0; i < dim; i += 16) top = maxf(top, absf(ldf(x + i)));
    const float by_norm = fix_norm(x, dim) / kFixQuery, by_top = hmax(top) / kFixMost;
    const float step = by_norm > by_top || by_norm != by_norm ? by_norm : by_top;
    fix_codes(x, dim, step, out);
    return step;
}

inline void index_item(const IndexItem& it, uint8_t* scratch) {
    AttendItem at{};
    at.k_pages = it.pages;
    at.blocks = it.blocks;
    at.page_size = it.page_size;
    at.kv_heads = 1;
    const bool integers = it.type == CacheType::I16 && it.dim % 32 == 0 && it.dim <= kFixGroup;
    const int dim = dpad(it.dim), heads = (it.heads + kIndexHeads - 1) / kIndexHeads * kIndexHeads;
    const size_t values = static_cast<size_t>(heads) * static_cast<size_t>(dim);
    float* kt = reinterpret_cast<float*>(scratch);  // or pairs
    float* line = kt + dim * kKeyBlock;             // or the keys' scales
    float* product = line + 16 * dim + kKeyBlock;
    float* s = product + heads * kKeyBlock;
    float* weights = s + kKeyBlock;
    float* floats = weights + static_cast<size_t>(it.tokens) * static_cast<size_t>(heads);
    int16_t* codes = reinterpret_cast<int16_t*>(floats);
    for (int t = 0; t < it.tokens; t++)
        for (int h = 0; h < heads; h++) {
            const float* q = it.q + static_cast<size_t>(t) * it.q_stride + static_cast<size_t>(h) * static_cast<size_t>(it.dim);
            const size_t row = static_cast<size_t>(t) * values + static_cast<size_t>(h * dim);
            float& weight = weights[t * heads + h];
            weight = h < it.heads ? it.weights[static_cast<size_t>(t) * it.weight_stride + static_cast<size_t>(h)] : 0.f;
            if (integers && h < it.heads)
                weight *= index_codes(q, dim, codes + row);
            else if (integers)
                __builtin_memset(codes + row, 0, sizeof(int16_t) * static_cast<size_t>(dim));
            else
                for (int d = 0; d < dim; d++) floats[row + static_cast<size_t>(d)] = h < it.heads && d < it.dim ? q[d] : 0.f;
        }
    for (int key = it.key0; key < it.key1; key += kKeyBlock) {
        const int count = it.key1 - key < kKeyBlock ? it.key1 - key : kKeyBlock;
        if (integers)
            index_pairs(at, key, count, dim, scratch, line);
        else
            index_floats(it, at, key, count, kt, line);
        for (int t = 0; t < it.tokens; t++) {
            const size_t row = static_cast<size_t>(t) * values;
            const IndexRows q{codes + row, floats + row, weights + t * heads};
            if (integers)
                index_integers(q, heads, dim, scratch, line, s);
            else
                index_products(q, heads, dim, kt, product, s);
            __builtin_memcpy(it.out + static_cast<size_t>(t) * it.out_stride + key - it.key0, s,
                             sizeof(float) * static_cast<size_t>(count));
        }
    }
}

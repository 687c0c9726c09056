// Float weights times inputs rounded to bfloat16, on tiles. Inside the unit's namespace. Every token count goes this way,
// missing tokens are rows of zeros: the CPU adds up pairs in another order than vdpbf16ps does, and a row's result shall
// not depend on the tokens beside it.
constexpr int kTokenGroup = 32, kRoundedK = 512;  // inputs rounded at once: 32 KB
constexpr int kStepBytes = 32 * kPanelRows * 2;   // of weights, for 32 k

// n values of each row of x as [step of 32 k][32 tokens][32], zeros behind a row's end and for tokens up to `padded`.
inline void round_tokens(const float* x, size_t ldx, int tokens, int padded, int n, uint8_t* out) {
    for (int t = 0; t < padded; t++)
        for (int i = 0; i < n; i += 16) {
            uint16_t* to = reinterpret_cast<uint16_t*>(out + (i / 32 * kTokenGroup + t) * 64) + i % 32;
            float part[16] = {};
            const float* from = x + t * ldx + i;
            if (t >= tokens || n - i < 16) {
                for (int j = 0; t < tokens && i + j < n; j++) part[j] = from[j];
                from = part;
            }
            stb(to, ldf(from));
            if (i % 32 == 0 && n - i <= 16) stb(to + 16, setf(0.f));
        }
}

// C tiles 0 to 3: [token tile][row half]; 4, 5: inputs; 6, 7: weights.
template <int kTokenTiles>
AI void clear_sums(Tiles& tiles) {
    tiles.zero<0>();
    tiles.zero<1>();
    if (kTokenTiles == 2) tiles.zero<2>(), tiles.zero<3>();
}
template <int kTokenTiles>
AI void store_sums(Tiles& tiles, float* to) {
    tiles.store<0>(to, 128);
    tiles.store<1>(to + 16, 128);
    if (kTokenTiles == 2) tiles.store<2>(to + 16 * 32, 128), tiles.store<3>(to + 16 * 32 + 16, 128);
}
// w: pairs of k [pair][32 rows][2]. stream: each weight is used once, ask for those further on.
template <int kTokenTiles>
AI void multiply_steps(Tiles& tiles, const uint8_t* x, const uint8_t* w, int steps, bool stream) {
    for (int s = 0; s < steps; s++, x += kTokenGroup * 64, w += kStepBytes) {
        if (stream)
            for (int i = 0; i < kStepBytes; i += 64) touch(w + kReadAhead + i);
        tiles.load<4>(x, 64);
        tiles.load<6>(w, 128);
        tiles.dot_bf<0, 4, 6>();
        tiles.load<7>(w + 64, 128);
        tiles.dot_bf<1, 4, 7>();
        if (kTokenTiles == 1) continue;
        tiles.load<5>(x + 16 * 64, 64);
        tiles.dot_bf<2, 5, 6>();
        tiles.dot_bf<3, 5, 7>();
    }
}

// BF16 weights lie in memory as the tiles want them; the sums stay in tiles over all of K.
template <int kTokenTiles>
void group_bf16(Tiles& tiles, const uint8_t* p, int cols, const float* x, size_t ldx, int tokens, bool stream, float* acc,
                uint8_t* scratch) {
    clear_sums<kTokenTiles>(tiles);
    for (int k = 0; k < cols; k += kRoundedK, p += kRoundedK * kPanelRows * 2) {
        const int n = cols - k < kRoundedK ? cols - k : kRoundedK;
        round_tokens(x + k, ldx, tokens, kTokenTiles * 16, n, scratch);
        multiply_steps<kTokenTiles>(tiles, scratch, p, (n + 31) / 32, stream);
    }
    const bool whole = tokens == kTokenTiles * 16;
    float* to = whole ? acc : reinterpret_cast<float*>(scratch);
    store_sums<kTokenTiles>(tiles, to);
    if (!whole) __builtin_memcpy(acc, to, static_cast<size_t>(tokens) * kPanelRows * sizeof(float));
}

// FP8 weights: each group of k is multiplied as it is, then scaled.
template <int kTokenTiles, int kGroup>
void group_fp8(Tiles& tiles, const uint8_t* pairs, const float* scale, int k, int cols, const float* x, size_t ldx, int tokens,
               float* acc, float* sums, uint8_t* rounded) {
    const int n = cols - k < kGroup ? cols - k : kGroup;
    round_tokens(x + k, ldx, tokens, kTokenTiles * 16, n, rounded);
    clear_sums<kTokenTiles>(tiles);
    multiply_steps<kTokenTiles>(tiles, rounded, pairs, (n + 31) / 32, false);
    store_sums<kTokenTiles>(tiles, sums);
    const VF s0 = ldf(scale), s1 = ldf(scale + 16);
    for (int t = 0; t < tokens; t++, sums += 32, acc += 32) {
        stf(acc, fma(ldf(sums), s0, k == 0 ? setf(0.f) : ldf(acc)));
        stf(acc + 16, fma(ldf(sums + 16), s1, k == 0 ? setf(0.f) : ldf(acc + 16)));
    }
}

template <Format F>
void tiled_bf16(const PackedView& w, int panel, const FloatRows& rows, int t0, int t1, float* acc, uint8_t* scratch) {
    const uint8_t* p = w.data + panel * w.panel_bytes;
    const int tokens = t1 - t0;
    const float* x = rows.x + t0 * rows.ldx;
    const size_t ldx = rows.ldx;
    TileConfig config;
    for (int i = 0; i < 8; i++) config.set(i, 16, 64);
    Tiles tiles(config);
    if constexpr (F == Format::BF16) {
        for (int t = 0; t < tokens; t += kTokenGroup) {
            const int n = tokens - t < kTokenGroup ? tokens - t : kTokenGroup;
            (n > 16 ? group_bf16<2> : group_bf16<1>)(tiles, p, w.cols, x + t * ldx, ldx, n, t == 0, acc + t * 32, scratch);
        }
    } else {
        static_assert(is_fp8(F), "a float format without a tile kernel");
        constexpr int kBytes = packed_block_bytes(kFormats[static_cast<int>(F)]), kGroup = kFormats[static_cast<int>(F)].packed_k;
        uint8_t *pairs = scratch, *rounded = scratch + kGroup * kPanelRows * 2;
        float* sums = reinterpret_cast<float*>(rounded + kGroup * kTokenGroup * 2);
        for (int k = 0; k < w.cols; k += kGroup, p += kBytes) {
            for (int i = 0; i < kBytes; i += 64) touch(p + kReadAhead + i);
            unpack_fp8<kGroup>(p, pairs);
            const float* scale = reinterpret_cast<const float*>(p);
            for (int t = 0; t < tokens; t += kTokenGroup) {
                const int n = tokens - t < kTokenGroup ? tokens - t : kTokenGroup;
                (n > 16 ? group_fp8<2, kGroup> : group_fp8<1, kGroup>)(tiles, pairs, scale, k, w.cols, x + t * ldx, ldx, n, acc + t * 32, sums,
                                                       rounded);
            }
        }
    }
}

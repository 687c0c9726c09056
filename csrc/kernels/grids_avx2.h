// Lattice points (core/grids.h) from tables in L1, for vectors of 256 bits. Inside the unit's namespace.
//
// A point's levels are eight (four) bytes of a table, loaded by an index that went through a scalar register. A vector is
// eight rows of four neighbouring k, half of what is one elsewhere. Signs are given to the activations: codes are magnitudes
// then, small enough for sums of 16 bits.
using W = __m256i;

template <Format F>
struct GridTable {
    static constexpr Grid G = grid_of(F);
    using Entry = std::conditional_t<G.quads, uint32_t, uint64_t>;
    // Of IQ1 by t << 10 | q << 8 | the first table's entry (core/rectangles.h); no packed t is 3. kPad: vectors are loaded
    // around a quad.
    static constexpr int kEntries = G.rectangles ? 4096 : G.entries, kPad = G.quads ? 4 : 0;
    alignas(64) Entry of[kEntries + 2 * kPad]{};

    static constexpr uint64_t levels(unsigned bits, int count) {
        uint64_t out = 0;
        for (int k = 0; k < count; k++) {
            const int code = bits >> ((G.quads ? 3 : 2) * k) & (G.quads ? 7 : 3);
            out |= static_cast<uint64_t>(G.rectangles ? 8 * code : grid_levels(F)[code]) << (8 * k);
        }
        return out;
    }
    constexpr GridTable() {
        for (int i = 0; i < (G.rectangles ? 3072 : G.entries); i++) {
            if (G.rectangles)
                of[i] = static_cast<Entry>(
                    levels(kCover.first[i >> 10][i & 255] | kCover.second[i >> 10][(i & 124) | (i >> 8 & 3)] << 8, 8));
            else
                of[i + kPad] = static_cast<Entry>(levels(points_of(F)[i], G.quads ? 4 : 8));
        }
    }
};

AI W loadw(const void* p) { return _mm256_loadu_si256(static_cast<const W*>(p)); }
AI void storew(void* p, W x) { _mm256_storeu_si256(static_cast<W*>(p), x); }
AI W bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
AI int load4(const uint8_t* p) {
    int x;
    __builtin_memcpy(&x, p, 4);
    return x;
}
AI __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
// Four octets: lanes of two.
AI W four(const uint64_t* a, const uint64_t* b, const uint64_t* c, const uint64_t* d) {
    const auto two = [](const uint64_t* x, const uint64_t* y) __attribute__((always_inline)) {
        return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(load8(x)), reinterpret_cast<const __m64*>(y)));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(two(a, b)), two(c, d), 1);
}
// 32 bits as bytes, zero or not, in an order of two lanes of 16.
AI W spread(const uint8_t* mask) {
    const W each = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const W bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(load4(mask)), each), bit), bit);
}
// u8 codes [4 quads] times activations of 16 k: four products of codes below 64 fit 16 bits, eight of small ones.
template <bool kSmall>
AI W dot16(const W* v, const W* x) {
#if defined(__AVX512VNNI__)
    W dot = _mm256_setzero_si256();
    UNR for (int q = 0; q < 4; q++) dot = _mm256_dpbusd_epi32(dot, v[q], x[q]);
    return dot;
#elif defined(__AVXVNNI__) || defined(KTCORE_EMULATE_VNNI)
    W dot = _mm256_setzero_si256();
    UNR for (int q = 0; q < 4; q++) dot = dot4h(dot, v[q], x[q]);
    return dot;
#else
    const W one = _mm256_set1_epi16(1);
    const W a = _mm256_add_epi16(_mm256_maddubs_epi16(v[0], x[0]), _mm256_maddubs_epi16(v[1], x[1]));
    const W b = _mm256_add_epi16(_mm256_maddubs_epi16(v[2], x[2]), _mm256_maddubs_epi16(v[3], x[3]));
    if (kSmall) return _mm256_madd_epi16(_mm256_add_epi16(a, b), one);
    return _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
#endif
}

// Rows are taken by eights: part j (0, 1) of row half h is rows 16 h + 8 j and on. The octets of both row halves' parts j lie
// in the bytes 32 j .. 32 j + 31 of a vector (grid_byte): in each lane eight bytes of h = 0, then eight of h = 1.
template <Format F>
struct GridRows {
    static constexpr FormatInfo I = kFormats[static_cast<int>(F)];
    static constexpr Grid G = grid_of(F);
    static constexpr GridTable<F> T{};
    static constexpr int kGroup = grid_group_bytes(G), kBytes = packed_block_bytes(I);
    static constexpr bool kWide = G.entries > 256;  // indices of more than a byte
    static constexpr bool kSmall = G.rectangles || F == Format::IQ3_S;  // magnitudes below 32

    // What a block's groups share: d of the rows, twice d, and the last 32-group's t's.
    struct Head {
        alignas(32) float d[kPanelRows], d2[kPanelRows];
        alignas(32) uint8_t last[kPanelRows];
    };
    // Indices of a 16-group, put together: part, row half.
    struct Wide {
        alignas(32) uint16_t of[2][2][G.quads ? 32 : 16];
    };

    AI static void head(const uint8_t* p, Head& to) {
        UNR for (int r = 0; r < kPanelRows; r += 8) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * r));
            const __m256 d = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(G.unit));
            _mm256_store_ps(to.d + r, d);
            _mm256_store_ps(to.d2 + r, _mm256_add_ps(d, d));
        }
        if (!G.rectangles) return;
        W last = _mm256_setzero_si256();
        UNR for (int n = 0; n < 7; n++) {
            const W bit = _mm256_srli_epi16(loadw(p + grid_threes_at(G) + n * 32), 7 - n);
            last = _mm256_or_si256(last, _mm256_and_si256(bit, bytes(1 << n)));
        }
        storew(to.last, last);
    }

    AI static const uint8_t* group(const uint8_t* p, int g) { return p + 64 + g * kGroup; }
    AI static W sign_bytes(const uint8_t* p, int g, int j) { return loadw(group(p, g) + kGroup - 64 + 32 * j); }

    // A 32-group's t's of 16 rows, a word for each row's four: divisions undo t0 + 3 t1 + 9 t2 + 27 t3 to two bits each.
    AI static W threes(const uint8_t* p, int g32, int j, const Head& head) {
        const uint8_t* from = g32 == 7 ? head.last : p + grid_threes_at(G) + g32 * 32;
        const __m128i sevens = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * j)), _mm_set1_epi8(127));
        const W v = _mm256_cvtepu8_epi16(sevens);
        const auto by = [&](int n) __attribute__((always_inline)) {
            return _mm256_mulhi_epu16(v, _mm256_set1_epi16(static_cast<short>(65536 / n + 1)));
        };
        const W high = _mm256_add_epi16(_mm256_slli_epi16(by(9), 2), _mm256_slli_epi16(by(27), 4));
        return _mm256_add_epi16(_mm256_add_epi16(v, by(3)), high);
    }
    // Of IQ1 q and t << 2, of an index's byte above the first.
    AI static W columns(const uint8_t* p, int g, int j, W four) {
        const W q = _mm256_srl_epi16(loadw(p + grid_high_at(G) + g / 4 * 64 + 32 * j), _mm_cvtsi32_si128(2 * (g % 4)));
        const W even = g % 2 ? _mm256_srli_epi16(four, 2) : _mm256_slli_epi16(four, 2);
        const W odd = g % 2 ? _mm256_slli_epi16(four, 4) : _mm256_slli_epi16(four, 8);
        const W t = _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0x000c)), _mm256_and_si256(odd, _mm256_set1_epi16(0x0c00)));
        return _mm256_or_si256(_mm256_and_si256(q, bytes(3)), t);
    }
    // What the octets' indices have above their byte.
    AI static W above(const uint8_t* p, int g, int j) {
        if (F == Format::IQ2_XS) return _mm256_and_si256(sign_bytes(p, g, j), bytes(1));
        const uint8_t* high = p + grid_high_at(G) + g * G.high_bytes + 4 * j;
        return _mm256_or_si256(_mm256_and_si256(spread(high), bytes(1)), _mm256_and_si256(spread(high + 8), bytes(2)));
    }
    // Indices of a 32-group's two.
    AI static void put_together(const uint8_t* p, int g32, const Head& head, Wide* to) {
        UNR for (int j = 0; j < 2; j++) {
            const W four = G.rectangles ? threes(p, g32, j, head) : W{};
            UNR for (int s = 0; s < 2; s++) {
                const int g = g32 * 2 + s;
                if (G.quads) {
                    UNR for (int h = 0; h < 2; h++) {
                        const W low = loadw(group(p, g) + 64 * h + 32 * j);
                        const W high = _mm256_and_si256(spread(p + grid_high_at(G) + g * G.high_bytes + h * 8 + 4 * j), bytes(1));
                        storew(to[s].of[j][h], _mm256_unpacklo_epi8(low, high));
                        storew(to[s].of[j][h] + 16, _mm256_unpackhi_epi8(low, high));
                    }
                    continue;
                }
                const W low = loadw(group(p, g) + 32 * j), high = G.rectangles ? columns(p, g, j, four) : above(p, g, j);
                storew(to[s].of[j][0], _mm256_unpacklo_epi8(low, high));
                storew(to[s].of[j][1], _mm256_unpackhi_epi8(low, high));
            }
        }
    }

    // Magnitudes (IQ1: eight times the code) of eight rows and 16 k: v [4 quads]. Indices come eight bytes a load: a load for
    // each would be what bounds it.
    AI static void magnitudes(const uint8_t* p, int g, int j, int h, const Wide& wide, W* v) {
        if constexpr (kWide && G.quads)
            quads<16, 8>(wide.of[j][h], v);  // rows 0, 1, 4, 5, then the others
        else if constexpr (kWide)
            octets<8>(wide.of[j][h], v);
        else if constexpr (G.quads)
            quads<8, 16>(group(p, g) + 64 * h + 32 * j, v);
        else
            octets<16>(group(p, g) + 32 * j + 8 * h, v);
    }
    // Rows 4 to 7 have their indices kLane further.
    template <int kLane, class Index>
    AI static void octets(const Index* from, W* v) {
        constexpr int kBits = 8 * sizeof(Index), kPer = 64 / kBits;
        uint64_t w[2][sizeof(Index)];
        UNR for (int l = 0; l < 2; l++) __builtin_memcpy(w[l], from + l * kLane, 8 * sizeof(Index));
        const auto at = [&](int l, int n) __attribute__((always_inline)) {
            return T.of + (w[l][n / kPer] >> (kBits * (n % kPer)) & ((1 << kBits) - 1));
        };
        UNR for (int o = 0; o < 2; o++) {
            const W a = four(at(0, o), at(0, 2 + o), at(1, o), at(1, 2 + o));
            const W b = four(at(0, 4 + o), at(0, 6 + o), at(1, 4 + o), at(1, 6 + o));
            v[2 * o] = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
            v[2 * o + 1] = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
        }
    }
    // Rows 2 and 3 of a lane have theirs kTwo further.
    template <int kTwo, int kLane, class Index>
    AI static void quads(const Index* from, W* v) {
        constexpr int kBits = 8 * sizeof(Index);
        __m128i lane[2][4];
        UNR for (int l = 0; l < 2; l++) UNR for (int r = 0; r < 4; r++) {
            uint64_t w = 0;
            __builtin_memcpy(&w, from + l * kLane + r / 2 * kTwo + r % 2 * 4, 4 * sizeof(Index));
            // Whole vectors around an entry, which then is in its place.
            UNR for (int q = 0; q < 4; q++) {
                const uint32_t* e = T.of + GridTable<F>::kPad + (w >> (kBits * q) & ((1 << kBits) - 1)) - r;
                const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(e));
                __m128i& to = lane[l][q];
                to = r == 0 ? x : r == 1 ? _mm_blend_epi32(to, x, 2) : r == 2 ? _mm_blend_epi32(to, x, 4) : _mm_blend_epi32(to, x, 8);
            }
        }
        UNR for (int q = 0; q < 4; q++) v[q] = _mm256_inserti128_si256(_mm256_castsi128_si256(lane[0][q]), lane[1][q], 1);
    }

    // Bytes that are negative where a value is and positive elsewhere, never zero: c [4 quads].
    AI static void signs(const uint8_t* p, int g, int j, int h, W* c) {
        W e = sign_bytes(p, g, j);
        if (G.even_signs) {  // running xors undone
            e = _mm256_and_si256(e, bytes(-2));
            e = _mm256_xor_si256(e, _mm256_srli_epi16(e, 1));
        }
        const __m128i rows = _mm_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
        UNR for (int o = 0; o < 2; o++) {
            const W each = _mm256_shuffle_epi8(e, _mm256_add_epi8(_mm256_broadcastsi128_si256(rows), bytes(8 * h + o)));
            UNR for (int n = 0; n < 2; n++) {
                const W bit = _mm256_set1_epi32(static_cast<int>(n ? 0x80402010 : 0x08040201));
                c[2 * o + n] = _mm256_add_epi8(_mm256_and_si256(each, bit), bytes(127));
            }
        }
    }
    // What IQ1's values have above their least, 0 or two eighths: [octet].
    AI static void eighths(const uint8_t* p, int g, int j, int h, W* plus) {
        const W nibbles = loadw(p + grid_scales_at(G) + (G.scales == 16 ? g / 8 * 128 : 0) + (16 * h + 8 * j) * 4);
        const W bit = _mm256_set1_epi32(static_cast<int>(8u << 4 * (G.scales == 16 ? g % 8 : g / 2)));
        plus[0] = plus[1] = _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_and_si256(nibbles, bit), bit), bytes(2));
        if (G.scales == 8) return;
        const W rows = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const W odd = _mm256_set1_epi32(p[grid_deltas_at(G) + (g * 2 + h) * 2 + j]);
        plus[1] = _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_and_si256(odd, rows), rows), bytes(2));
    }

    // Scale number s, d (2 n + 1), of eight rows: exact.
    AI static __m256 scale(const uint8_t* p, int s, int j, int h, const Head& head) {
        const __m256 d = _mm256_load_ps(head.d + 16 * h + 8 * j), d2 = _mm256_load_ps(head.d2 + 16 * h + 8 * j);
        W n;
        if (G.scales) {
            n = loadw(p + grid_scales_at(G) + s / 8 * 128 + (16 * h + 8 * j) * 4);
            n = _mm256_and_si256(_mm256_srl_epi32(n, _mm_cvtsi32_si128(4 * (s % 8))), _mm256_set1_epi32(G.rectangles ? 7 : 15));
        } else {
            const auto two = [&](int i) __attribute__((always_inline)) {
                const W bits = _mm256_and_si256(sign_bytes(p, s * 2 + i, j), bytes(1));
                return _mm256_maddubs_epi16(bits, _mm256_set1_epi16(i ? 0x0804 : 0x0201));
            };
            const W w = _mm256_or_si256(two(0), two(1)), zero = _mm256_setzero_si256();
            n = h ? _mm256_unpackhi_epi16(w, zero) : _mm256_unpacklo_epi16(w, zero);
        }
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), d2, d);
    }
};

// T tokens times the 32-group g32 of a block, which is the panel's `at`; acc is added to.
template <Format F, int T>
AI void grid_group(const uint8_t* p, const typename GridRows<F>::Head& head, int g32, int at, int kp, size_t stride,
                   const uint8_t* act, float* acc) {
    using L = GridRows<F>;
    constexpr bool kIq1 = L::G.rectangles, k16 = L::I.group == 16;
    typename L::Wide wide[2];
    if (L::kWide) L::put_together(p, g32, head, wide);
    for (int j = 0; j < 2; j++) {
        float* to = acc + 8 * j;
        __m256 part[2][T];
        UNR for (int s = 0; s < 2; s++) {
            const int g = g32 * 2 + s;
            W x1[4];  // of the only token
            UNR for (int q = 0; q < 4; q++) x1[q] = _mm256_set1_epi32(load4(act + at * 32 + s * 16 + q * 4));
            UNR for (int h = 0; h < 2; h++) {
                W v[4], c[4];
                L::magnitudes(p, g, j, h, wide[s], v);
                if (kIq1) {
                    L::eighths(p, g, j, h, c);
                    UNR for (int q = 0; q < 4; q++) v[q] = _mm256_add_epi8(v[q], c[q / 2]);
                } else {
                    L::signs(p, g, j, h, c);
                }
                const __m256 d = k16 ? L::scale(p, g, j, h, head) : _mm256_setzero_ps();
                UNR for (int t = 0; t < T; t++) {
                    const ActRow row{act + t * stride};
                    W x[4];
                    UNR for (int q = 0; q < 4; q++) {
                        x[q] = T == 1 ? x1[q] : _mm256_set1_epi32(load4(row.x(at * 32 + s * 16 + q * 4)));
                        if (!kIq1) x[q] = _mm256_sign_epi8(x[q], c[q]);
                    }
                    W dot = dot16<L::kSmall>(v, x);
                    if (kIq1) {
                        const W n = _mm256_set1_epi32(*row.nsum(kp, at * 2 + s));
                        dot = _mm256_add_epi32(dot, _mm256_add_epi32(n, _mm256_slli_epi32(n, 3)));
                    }
                    const __m256 scale = _mm256_broadcast_ss(row.scale(kp, at * 2 + s)), f = _mm256_cvtepi32_ps(dot);
                    if (k16) {
                        float* sum = to + t * 32 + 16 * h;
                        _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_mul_ps(f, scale), d, _mm256_loadu_ps(sum)));
                    } else {
                        part[h][t] = s == 0 ? _mm256_mul_ps(f, scale) : _mm256_fmadd_ps(f, scale, part[h][t]);
                    }
                }
            }
        }
        if (k16) continue;
        UNR for (int h = 0; h < 2; h++) {
            const __m256 d = L::scale(p, g32, j, h, head);
            UNR for (int t = 0; t < T; t++) {
                float* sum = to + t * 32 + 16 * h;
                _mm256_storeu_ps(sum, _mm256_fmadd_ps(part[h][t], d, _mm256_loadu_ps(sum)));
            }
        }
    }
}

template <Format F, int T>
void grid_tokens(const uint8_t* p, int blocks, const ActView& a, const uint8_t* act, float* acc) {
    constexpr int kBytes = GridRows<F>::kBytes, kAsk = kBytes / 8;
    const int kp = a.k;
    const size_t stride = a.stride;
    for (int i = 0; i < T * 32; i += 16) stf(acc + i, setf(0.f));
    for (int b = 0; b < blocks; b++, p += kBytes) {
        typename GridRows<F>::Head head;
        GridRows<F>::head(p, head);
        for (int g = 0; g < 8; g++) {
            UNR for (int i = 0; i < kAsk; i += 64) touch(p + kReadAhead + g * kAsk + i);
            grid_group<F, T>(p, head, g, b * 8 + g, kp, stride, act, acc);
        }
    }
}

template <Format F>
void grid_direct(const uint8_t* p, int blocks, const ActView& a, const uint8_t* act, int tokens, float* acc) {
    const int runs = (tokens + 3) / 4;
    for (int i = 0, t = 0; i < runs; i++) {
        const int n = (tokens - t + runs - i - 1) / (runs - i);
        const uint8_t* x = act + t * a.stride;
        switch (n) {
            case 1: grid_tokens<F, 1>(p, blocks, a, x, acc + t * 32); break;
            case 2: grid_tokens<F, 2>(p, blocks, a, x, acc + t * 32); break;
            case 3: grid_tokens<F, 3>(p, blocks, a, x, acc + t * 32); break;
            default: grid_tokens<F, 4>(p, blocks, a, x, acc + t * 32); break;
        }
        t += n;
    }
}

// u8 codes, 64 + value, and scales.
template <Format F>
void unpack_grid(const uint8_t* p, int blocks, const Unpacked& out) {
    using L = GridRows<F>;
    constexpr int kScales = 256 / L::I.group;
    uint8_t* codes = out.codes;
    float* scales = out.scale;
    for (int b = 0; b < blocks; b++, p += L::kBytes) {
        typename L::Head head;
        L::head(p, head);
        for (int s = 0; s < kScales; s++, scales += kPanelRows)
            UNR for (int h = 0; h < 2; h++) UNR for (int j = 0; j < 2; j++)
                _mm256_storeu_ps(scales + 16 * h + 8 * j, L::scale(p, s, j, h, head));
        for (int g32 = 0; g32 < 8; g32++) {
            typename L::Wide wide[2];
            if (L::kWide) L::put_together(p, g32, head, wide);
            for (int s = 0; s < 2; s++, codes += 512)
                for (int j = 0; j < 2; j++) UNR for (int h = 0; h < 2; h++) {
                    const int g = g32 * 2 + s;
                    W v[4], c[4];
                    L::magnitudes(p, g, j, h, wide[s], v);
                    L::G.rectangles ? L::eighths(p, g, j, h, c) : L::signs(p, g, j, h, c);
                    UNR for (int q = 0; q < 4; q++)
                        storew(codes + q * 128 + 64 * h + 32 * j,
                               L::G.rectangles ? _mm256_add_epi8(_mm256_add_epi8(v[q], c[q / 2]), bytes(55))
                                               : _mm256_add_epi8(_mm256_sign_epi8(v[q], c[q]), bytes(64)));
                }
        }
    }
}

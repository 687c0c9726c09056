// Lattice points (core/grids.h) looked up in registers: byte permutations of two vectors, products of bit matrices. Inside
// the unit's namespace.
//
// A point's values are split over two planes of small codes, and a plane of 256 is four vectors: an index byte becomes a
// plane's byte by two permutations and a blend, 64 of them at once. A byte of a plane holds several codes; the four fields
// of a dword are the k's f, 4 + f, 8 + f, 12 + f of a 16-group, which is why activations are there in that order too. Signs
// are moved next to the code by a matrix product, and a permutation makes 64 + signed level of both: its index has bits to
// spare, so that other fields' bits may stand in them.
struct GridPlanes {
    alignas(64) uint8_t at[2][1024];
};
// Octets: values 0-3 and 4-7, two bits each; quads: values 0-1 and 2-3, three bits each.
constexpr GridPlanes grid_planes(const uint16_t* points, int entries, bool quads) {
    GridPlanes out{};
    if (entries > 1024) return out;  // IQ1's lie in rectangles
    for (int i = 0; i < entries; i++) {
        out.at[0][i] = static_cast<uint8_t>(quads ? points[i] & 63 : points[i]);
        out.at[1][i] = static_cast<uint8_t>(points[i] >> (quads ? 6 : 8));
    }
    return out;
}
struct GridValues {
    alignas(64) uint8_t of[4][64];
};
// Where a field's code and its sign stand in the index.
constexpr int kCodeAt[2][4] = {{0, 2, 4, 4}, {0, 3, 0, 3}}, kSignAt[2][4] = {{4, 5, 0, 1}, {3, 0, 4, 1}};
constexpr int kCodeBits[2][4] = {{0x03, 0x0c, 0x30, 0x30}, {0x07, 0x38, 0x07, 0x38}};
// IQ1: eighths, the sign is that of the one beside the level.
constexpr GridValues grid_values(const int8_t* levels, const Grid& g) {
    GridValues out{};
    for (int f = 0; f < 4; f++)
        for (int i = 0; i < 64; i++) {
            const int code = i >> kCodeAt[g.quads][f] & (g.quads ? 7 : 3), sign = i >> kSignAt[g.quads][f] & 1 ? -1 : 1;
            out.of[f][i] = static_cast<uint8_t>(64 + (g.rectangles ? 8 * (code - 1) + sign : sign * levels[code]));
        }
    return out;
}
constexpr Threes kThrees = make_threes();
struct Doubled {
    alignas(64) uint8_t of[64];
};
constexpr Doubled make_doubled() {
    Doubled out{};
    for (int i = 0; i < 64; i++) out.of[i] = static_cast<uint8_t>(i / 2);
    return out;
}
constexpr Doubled kDoubled = make_doubled();
// The matrix that brings signs base .. base + 3 of a byte to where fields have them.
constexpr long long sign_matrix(int base, bool quads, bool even) {
    unsigned long long m = 0;
    for (int f = 0; f < 4; f++) {
        const int i = base + f;
        const unsigned long long row = !even ? 1u << i : i == 0 ? 2u : i == 7 ? 128u : 3u << i;
        m |= row << (8 * (7 - kSignAt[quads][f]));
    }
    return static_cast<long long>(m);
}
template <Format F>
struct Layout<F, Kind::Grid> {
    static constexpr FormatInfo I = kFormats[static_cast<int>(F)];
    static constexpr Grid G = grid_of(F);
    static constexpr int kGroups = I.packed_k / 32, kBytes = packed_block_bytes(I), kScales = I.packed_k / I.group;
    static constexpr int kGroupBytes = 2 * grid_group_bytes(G);
    static constexpr bool kWide = false;
    static constexpr GridPlanes kPlanes = grid_planes(points_of(F), G.entries, G.quads);
    static constexpr GridValues kValues = grid_values(grid_levels(F), G);

    AI static VI look256(const uint8_t* t, VI i, __mmask64 top) {
        return _mm512_mask_blend_epi8(top, _mm512_permutex2var_epi8(ldi(t), i, ldi(t + 64)),
                                      _mm512_permutex2var_epi8(ldi(t + 128), i, ldi(t + 192)));
    }
    // high: masks of the index bits above a byte.
    AI static VI look(const uint8_t* t, VI i, __mmask64 top, const __mmask64* high) {
        if (G.entries == 256) return look256(t, i, top);
        const VI low = _mm512_mask_blend_epi8(high[0], look256(t, i, top), look256(t + 256, i, top));
        if (G.entries == 512) return low;
        return _mm512_mask_blend_epi8(high[1], low,
                                      _mm512_mask_blend_epi8(high[0], look256(t + 512, i, top), look256(t + 768, i, top)));
    }
    AI static VI interleave(VI low, VI high, int h) {
        return h ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
    }
    AI static __mmask64 mask(const uint8_t* p) {
        uint64_t m;
        __builtin_memcpy(&m, p, 8);
        return m;
    }

    // By t: the first of three vectors, the second where `one`, the third where `two`.
    AI static VI by_t(VI v0, VI v1, VI v2, __mmask64 one, __mmask64 two) {
        return _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(v0, one, v1), two, v2);
    }
    AI static VI second128(int t, VI i) {
        return _mm512_permutex2var_epi8(ldi(kCover.second[t]), i, ldi(kCover.second[t] + 64));
    }
    // A 32-group's t's, a byte for a row's four in the order of `grid_byte` / 2; the last group's are the others' top bits.
    AI static __m256i threes(const uint8_t* block, int g32) {
        const auto at = [&](int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + grid_threes_at(G) + n * 32)); };
        if (g32 < 7) return at(g32);
        __m256i last = _mm256_setzero_si256();
        UNR for (int n = 0; n < 7; n++) {
            const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(at(n), 7 - n), _mm256_set1_epi8(static_cast<char>(1 << n)));
            last = _mm256_or_si256(last, bit);
        }
        return last;
    }
    // Codes of a 16-group's octets, and all bits of a byte set where one eighth is taken off: row half, the codes' pairs.
    AI static void rectangles(const uint8_t* block, int g, VI (*c)[2], VI* e) {
        const VI i = ldi(block + 64 + g * 64), q = srl(ldi(block + grid_high_at(G) + g / 4 * 64), 2 * (g % 4));
        const VI t4 = _mm512_permutexvar_epi8(ldi(kDoubled.of), _mm512_castsi256_si512(threes(block, g / 2)));
        const VI t = _mm512_permutex2var_epi8(ldi(kThrees.of), t4, ldi(kThrees.of + 64));
        const VI ones = _mm512_set1_epi16(g % 2 ? 0x4010 : 0x0401), twos = _mm512_add_epi16(ones, ones);
        const __mmask64 top = _mm512_movepi8_mask(i), one = _mm512_test_epi8_mask(t, ones), two = _mm512_test_epi8_mask(t, twos);
        const VI j = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x7c), i, q, 0xca);
        const VI first = by_t(look256(kCover.first[0], i, top), look256(kCover.first[1], i, top), look256(kCover.first[2], i, top), one, two);
        const VI second = by_t(second128(0, j), second128(1, j), second128(2, j), one, two);
        UNR for (int h = 0; h < 2; h++) {
            c[h][0] = interleave(first, second, h);
            c[h][1] = _mm512_srli_epi16(c[h][0], 2);
            const VI nibbles = ldi(block + grid_scales_at(G) + (G.scales == 16 ? g / 8 * 128 : 0) + h * 64);
            const __mmask16 minus = _mm512_test_epi32_mask(nibbles, seti(8 << 4 * (G.scales == 16 ? g % 8 : g / 2)));
            if (G.scales == 8) {
                e[h] = _mm512_maskz_set1_epi32(minus, -1);
                continue;
            }
            uint16_t odd;
            __builtin_memcpy(&odd, block + grid_deltas_at(G) + (g * 2 + h) * 2, 2);
            e[h] = _mm512_mask_or_epi32(_mm512_maskz_set1_epi32(minus, 0xffff), odd, _mm512_maskz_set1_epi32(minus, 0xffff), seti(-65536));
        }
    }

    // u8 codes, 64 + value, of 16-group `g` of the block: field, row half.
    AI static void codes(const uint8_t* block, int g, VI (*v)[2]) {
        VI c[2][2], e[2];
        if constexpr (G.rectangles)
            rectangles(block, g, c, e);
        else
            points(block, g, c, e);
        UNR for (int h = 0; h < 2; h++) UNR for (int f = 0; f < 4; f++) {
            const VI bits = _mm512_set1_epi8(static_cast<char>(kCodeBits[G.quads][f]));
            const VI code = c[h][G.quads ? f / 2 : f / 3];
            v[f][h] = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(bits, code, e[h], 0xca), ldi(kValues.of[f]));
        }
    }
    AI static void points(const uint8_t* block, int g, VI (*c)[2], VI* e) {
        const uint8_t* p = block + 64 + g * grid_group_bytes(G);
        const VI signs = ldi(p + grid_group_bytes(G) - 64);
        const VI low = _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(sign_matrix(0, G.quads, G.even_signs)), 0);
        const VI high = _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(sign_matrix(4, G.quads, G.even_signs)), 0);
        __mmask64 above[2] = {};
        if (G.high_bytes) UNR for (int b = 0; b < 2; b++) above[b] = mask(block + grid_high_at(G) + g * 16 + b * 8);
        if (G.entries == 512 && !G.quads) above[0] = _mm512_test_epi8_mask(signs, _mm512_set1_epi8(1));
        if (G.quads) {
            UNR for (int h = 0; h < 2; h++) {
                const VI i = ldi(p + h * 64);
                const __mmask64 top = _mm512_movepi8_mask(i);
                UNR for (int n = 0; n < 2; n++) c[h][n] = look(kPlanes.at[n], i, top, above + h);
            }
        } else {
            const VI i = ldi(p);
            const __mmask64 top = _mm512_movepi8_mask(i);
            const VI first = look(kPlanes.at[0], i, top, above), second = look(kPlanes.at[1], i, top, above);
            UNR for (int h = 0; h < 2; h++) {
                c[h][0] = interleave(first, second, h);
                c[h][1] = _mm512_srli_epi16(c[h][0], 2);
            }
        }
        UNR for (int h = 0; h < 2; h++) e[h] = interleave(low, high, h);
    }

    // Scale number s of row half h: d (2 s + 1) times a power of two, exact in whatever order.
    AI static void scale(const uint8_t* block, int s, int h, VF& d, VF& m) {
        m = setf(0.f);
        VI odd;
        if (G.scales) {
            const VI w = srl(ldi(block + grid_scales_at(G) + s / 8 * 128 + h * 64), 4 * (s % 8));
            odd = addi(sll(andi(w, seti(G.rectangles ? 7 : 15)), 1), seti(1));
        } else {
            VI w = _mm512_set1_epi16(1);
            UNR for (int n = 0; n < 2; n++) {
                const VI one = andi(ldi(block + 64 + (s * 2 + n + 1) * grid_group_bytes(G) - 64), seti(0x01010101));
                w = _mm512_add_epi16(w, _mm512_maddubs_epi16(one, _mm512_set1_epi16(n ? 0x1008 : 0x0402)));
            }
            const VI zero = _mm512_setzero_si512();
            odd = h ? _mm512_unpackhi_epi16(w, zero) : _mm512_unpacklo_epi16(w, zero);
        }
        d = mulf(mulf(ldh(reinterpret_cast<const uint16_t*>(block + h * 32)), setf(G.unit)), cvtif(odd));
    }
    struct Header {
        const uint8_t* block;
        AI explicit Header(const uint8_t* p) : block(p) {}
        AI void scale(int s, int h, VF& d, VF& m) const { Layout::scale(block, s, h, d, m); }
    };
};

template <Format F>
AI void unpack_grid(const uint8_t* p, int blocks, const Unpacked& out) {
    using L = Layout<F>;
    uint8_t* c = out.codes;
    unpack_scales<F>(p, blocks, out);
    for (int b = 0; b < blocks; b++, p += L::kBytes)
        for (int g = 0; g < 2 * L::kGroups; g++) {
            VI v[4][2];
            L::codes(p, g, v);
            UNR for (int f = 0; f < 4; f++) UNR for (int h = 0; h < 2; h++, c += 64) sti(c, v[f][h]);
        }
}

// Sixteen codes as a 4 x 4, transposed.
AI void keep_transposed(uint8_t* p, VI q) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(q), order));
}

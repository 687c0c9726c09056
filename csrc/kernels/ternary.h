// Five base-3 digits a byte (TQ1_0), taken apart in registers. Inside the unit's namespace.
//
// A block of 256 values is d, half precision, of 32 rows; then for every 80 values four vectors of 16 rows x 4 bytes, row
// halves alternating: digit f of vector j's bytes is quad j of 16-group f. Then the last 16 values as 2-bit codes, a vector
// of each row half, quad j at bits 2 j. Bytes and digits are the file's: digit f of a byte b is the top one of b 3^f
// modulo 256, which three times it has above its eight bits.
constexpr int kFiveGroups = 3, kFiveBytes = 512, kFivesAt = 64, kLastAt = kFivesAt + kFiveGroups * kFiveBytes;

// Codes of five quads, shifted left by kDigitAt: sums are exact with it, and are shifted back once for four quads.
#if defined(__AVX512VBMI__)
constexpr int kDigitAt[5] = {0, 2, 4, 6, 0};
struct Digits256 {
    alignas(64) uint8_t four[256], fifth[256];
};
constexpr Digits256 make_digits() {
    Digits256 out{};
    for (int b = 0; b < 256; b++) {
        int left = b;
        for (int f = 0; f < 4; f++, left = left * 3 & 255) out.four[b] |= static_cast<uint8_t>((left * 3 >> 8) << (2 * f));
        out.fifth[b] = static_cast<uint8_t>(left * 3 >> 8);
    }
    return out;
}
constexpr Digits256 kDigits = make_digits();
AI void digits(VI bytes, VI* t) {
    const VI four = lookup256(bytes, kDigits.four);
    UNR for (int f = 0; f < 4; f++) t[f] = andi(four, seti(0x03030303 << (2 * f)));
    t[4] = lookup256(bytes, kDigits.fifth);
}
#elif defined(__AVX2__)
constexpr int kDigitAt[5] = {6, 6, 6, 6, 6};
// Three quarters of a byte less one has the digit on top: 64 and 128 stand for thirds, 85.3 and 170.7.
AI void digits(VI bytes, VI* t) {
    UNR for (int f = 0; f < 5; f++) {
        const VI less = subs8(bytes, seti(0x01010101));
        t[f] = andi(avg8(less, avg8(less, seti(0))), seti(static_cast<int>(0xc0c0c0c0)));
        bytes = add8(bytes, add8(bytes, bytes));
    }
}
#else
constexpr int kDigitAt[5] = {};
inline void digits(VI bytes, VI* t) {
    uint8_t b[64], c[64];
    sti(b, bytes);
    for (int f = 0; f < 5; f++) {
        for (int i = 0; i < 64; i++) {
            c[i] = static_cast<uint8_t>(b[i] * 3 >> 8);
            b[i] = static_cast<uint8_t>(b[i] * 3);
        }
        t[f] = ldi(c);
    }
}
#endif

template <Format F>
struct Layout<F, Kind::Ternary> {
    static constexpr FormatInfo I = kFormats[static_cast<int>(F)];
    static constexpr int kGroups = I.packed_k / 32, kBytes = packed_block_bytes(I), kScales = kGroups;
    static_assert(kBytes == kLastAt + 128, "256 values in 54 bytes");

    struct Header {
        const uint8_t* p;
        AI explicit Header(const uint8_t* block) : p(block) {}
        AI void scale(int, int h, VF& d, VF& m) const {
            d = ldh(reinterpret_cast<const uint16_t*>(p + h * 32));
            m = setf(0.f);
        }
    };
    // Quad j of the 16-groups 5 n to 5 n + 4, as `digits`; of the last one.
    AI static void fives(const uint8_t* p, int n, int j, int h, VI* t) {
        digits(ldi(p + kFivesAt + n * kFiveBytes + (j * 2 + h) * 64), t);
    }
    AI static VI last(const uint8_t* p, int j, int h) {
        return andi(srl(ldi(p + kLastAt + h * 64), 2 * j), seti(0x03030303));
    }
    // u8 codes of quad q of a 32-group.
    AI static VI block_quad(const uint8_t* p, int group, int q, int h) {
        const int g16 = group * 2 + q / 4;
        if (g16 == 15) return last(p, q % 4, h);
        VI t[5];
        fives(p, g16 / 5, q % 4, h, t);
        return srl(t[g16 % 5], kDigitAt[g16 % 5]);
    }
};

template <Format F>
inline void unpack_ternary(const uint8_t* p, int blocks, const Unpacked& out) {
    using L = Layout<F>;
    uint8_t* c = out.codes;
    unpack_scales<F>(p, blocks, out);
    for (int b = 0; b < blocks; b++, p += L::kBytes, c += 8192)
        for (int h = 0; h < 2; h++) {
            for (int n = 0; n < kFiveGroups; n++)
                UNR for (int j = 0; j < 4; j++) {
                    VI t[5];
                    L::fives(p, n, j, h, t);
                    UNR for (int f = 0; f < 5; f++) sti(c + (((n * 5 + f) * 4 + j) * 2 + h) * 64, srl(t[f], kDigitAt[f]));
                }
            UNR for (int j = 0; j < 4; j++) sti(c + ((60 + j) * 2 + h) * 64, L::last(p, j, h));
        }
}

// Few tokens straight from the panel, in the tile's order of additions; H row halves at once.
template <Format F, int T, int H>
AI void direct_ternary(const uint8_t* p, int half, int blocks, const ActView& a, const uint8_t* act, int ahead, float* acc) {
    using L = Layout<F>;
    const size_t stride = a.stride;
    const int kp = a.k;
    VF sum[T][H], part[T][H], d[H], m;
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++) sum[t][h] = part[t][h] = setf(0.f);
    // The sums of 16-group g16 of K, number i of its block.
    const auto add = [&](int i, int g16, int t, int h, VI dot) __attribute__((always_inline)) {
        const VF scaled = cvtif(dot), scale = bcf(ActRow{act + t * stride}.scale(kp, g16));
        part[t][h] = i % 2 == 0 ? mulf(scaled, scale) : fma(scaled, scale, part[t][h]);
        if (i % 2 == 1) sum[t][h] = fma(part[t][h], d[h], sum[t][h]);
    };
    for (int b = 0; b < blocks; b++, p += L::kBytes) {
        UNR for (int h = 0; h < H; h++) typename L::Header(p).scale(0, half + h, d[h], m);
        const uint8_t* x = act + b * 256;
        UNR for (int n = 0; n < kFiveGroups; n++) {
            if (half == 0) UNR for (int i = 0; i < 9; i++) touch(p + ahead + (n * 9 + i) * 64);
            VI dot[5][T][H];
            UNR for (int f = 0; f < 5; f++) UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++)
                dot[f][t][h] = seed<false>(ActRow{act + t * stride}, kp, b * 16 + n * 5 + f, kDigitAt[f]);
            UNR for (int j = 0; j < 4; j++) {
                VI v[H][5];
                UNR for (int h = 0; h < H; h++) L::fives(p, n, j, half + h, v[h]);
                UNR for (int f = 0; f < 5; f++) UNR for (int t = 0; t < T; t++) {
                    const VI y = bci(x + t * stride + (n * 5 + f) * 16 + j * 4);
                    UNR for (int h = 0; h < H; h++) dot[f][t][h] = dot4<false>(dot[f][t][h], v[h][f], y);
                }
            }
            UNR for (int f = 0; f < 5; f++) UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++)
                add(n * 5 + f, b * 16 + n * 5 + f, t, h, kDigitAt[f] ? sra(dot[f][t][h], kDigitAt[f]) : dot[f][t][h]);
        }
        UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++) {
            VI dot = seed<false>(ActRow{act + t * stride}, kp, b * 16 + 15, 0);
            UNR for (int j = 0; j < 4; j++) dot = dot4<false>(dot, L::last(p, j, half + h), bci(x + t * stride + 240 + j * 4));
            add(15, b * 16 + 15, t, h, dot);
        }
    }
    UNR for (int t = 0; t < T; t++) UNR for (int h = 0; h < H; h++) stf(acc + t * 32 + (half + h) * 16, sum[t][h]);
}
// Ten sums of a token are under way with both.
constexpr int kTernaryBoth = sizeof(VI) == 64 && kDirectMany ? 2 : 0;
template <Format F, int T>
void direct_ternary(const uint8_t* p, int blocks, const ActView& a, const uint8_t* act, int ahead, float* acc) {
    if constexpr (T <= kTernaryBoth) {
        direct_ternary<F, T, 2>(p, 0, blocks, a, act, ahead, acc);
    } else {
        direct_ternary<F, T, 1>(p, 0, blocks, a, act, ahead, acc);
        direct_ternary<F, T, 1>(p, 1, blocks, a, act, ahead, acc);
    }
}

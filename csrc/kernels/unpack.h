// How each format's packed 32-row block becomes u8 codes and float scales. Inside the unit's namespace.
//
// A block is a header, then for every 32 values of K the code's bit planes (8 | 4, then 2, then 1 bits), each in
// vectors of 16 rows x 4 k, row halves alternating. With q = 0..7 the quad (four neighbouring k) of the group:
//   8 bits: vector q;  4 bits: vector q & 3, low nibble for q < 4;  2 bits: vector q >> 2, bits 2 (q & 3);
//   1 bit: one vector, bit q of each byte.
// Formats of one bit have that vector alone, and codes 0 and 2.
template <Format F, Kind K = kFormats[static_cast<int>(F)].kind>
struct Layout {
    static constexpr FormatInfo I = kFormats[static_cast<int>(F)];
    static constexpr int kGroups = I.packed_k / 32;
    static constexpr int kGroupBytes = 128 * I.bits;
    static constexpr int kBytes = I.header + kGroups * kGroupBytes;
    static constexpr bool kWide = wide_codes(I);
    static constexpr int kScales = I.packed_k / I.group;
    static constexpr bool kPlain = I.header == 64 * (1 + I.has_min);  // one half-precision scale (and min) a row and block
    static_assert(I.kind == Kind::Affine || I.kind == Kind::Table, "only these lie in bit planes");

    // u8 codes of quad q, row half h of the group at p.
    AI static VI quad(const uint8_t* p, int q, int h) {
        if (I.bits == 8) return ldi(p + (q * 2 + h) * 64);
        if (I.bits == 1) return one_bit(p, q, h, 1);
        VI v;
        if (I.bits >= 4) {
            v = ldi(p + ((q & 3) * 2 + h) * 64);
            v = andi(q < 4 ? v : srl(v, 4), seti(0x0f0f0f0f));
            p += 512;
        } else {
            v = two_bits(p, q, h, 0);
            p += 256;
        }
        if (I.bits == 6) v = ori(v, two_bits(p, q, h, 4));
        if (I.bits == 5) v = ori(v, one_bit(p, q, h, 4));
        if (I.bits == 3) v = ori(v, one_bit(p, q, h, 2));
        if (I.kind == Kind::Table) v = lookup16(v, kTables[I.table]);
        return v;
    }

    // Scale and zero point of row half h where the format has them.
    AI static void zero_point(const uint8_t* p, int h, VF& d, VI& zero) {
        const VI bits = ldw(p + h * 32), z = ldw(p + 64 + h * 32);
        const VF as_half = ldh(reinterpret_cast<const uint16_t*>(p + h * 32));
        d = selectf(sll(z, 16), castf(sll(bits, 16)), as_half);  // kScaleIsBf16 becomes the sign
        zero = andi(z, seti(0x7fff));
    }

    // Scale (and min, added: already negated where the format subtracts it) number s of row half h.
    AI static void scale(const uint8_t* p, int s, int h, VF& d, VF& m) {
        m = setf(0.f);
        if constexpr (I.zero_point) {
            VI zero;
            zero_point(p, h, d, zero);
            m = negate(mulf(cvtif(zero), d));
        } else if constexpr (F == Format::MXFP4) {
            d = ldb(reinterpret_cast<const uint16_t*>(p + h * 32));
        } else if constexpr (F == Format::NVFP4) {
            // UE4M3: its bits where a float's exponent and mantissa are; a half of it, since the table's values are doubled.
            const VI bits = andi(srl(ldi(p + h * 64), 8 * s), seti(0x7f));
            d = mulf(castf(sll(bits, 20)), setf(0x1p119f));
        } else if constexpr (kPlain) {
            d = ldh(reinterpret_cast<const uint16_t*>(p + h * 32));
            if (I.has_min) m = ldh(reinterpret_cast<const uint16_t*>(p + 64 + h * 32));
        } else if constexpr (F == Format::Q4_K || F == Format::Q5_K) {
            const VI a = ldi(p + h * 64), b = ldi(p + 128 + h * 64), k63 = seti(63);
            VI sc, mn;
            if (s < 4) {
                sc = andi(srl(a, 8 * s), k63);
                mn = andi(srl(b, 8 * s), k63);
            } else {
                const int n = 8 * (s - 4);
                const VI c = ldi(p + 256 + h * 64), k15 = seti(15), k48 = seti(48);
                sc = ori(andi(srl(c, n), k15), andi(srl(a, n + 2), k48));
                mn = ori(andi(srl(c, n + 4), k15), andi(srl(b, n + 2), k48));
            }
            d = mulf(ldh(reinterpret_cast<const uint16_t*>(p + 384 + h * 32)), cvtif(sc));
            m = negate(mulf(ldh(reinterpret_cast<const uint16_t*>(p + 448 + h * 32)), cvtif(mn)));
        } else if constexpr (F == Format::Q6_K || F == Format::IQ4_XS) {
            const VI a = ldi(p + ((s >> 2) * 2 + h) * 64);
            d = mulf(ldh(reinterpret_cast<const uint16_t*>(p + kScales * 32 + h * 32)), cvtif(sra24(sll(a, 24 - 8 * (s & 3)))));
        } else if constexpr (F == Format::Q2_K) {
            const VI a = srl(ldi(p + ((s >> 2) * 2 + h) * 64), 8 * (s & 3)), k15 = seti(15);
            d = mulf(ldh(reinterpret_cast<const uint16_t*>(p + 512 + h * 32)), cvtif(andi(a, k15)));
            m = negate(mulf(ldh(reinterpret_cast<const uint16_t*>(p + 576 + h * 32)), cvtif(andi(srl(a, 4), k15))));
        } else {
            static_assert(F == Format::Q3_K, "a format without scales");
            // Low nibbles of 16 scales in 8 bytes, high pairs of bits in 4: see GGUF's Q3_K.
            const VI lo = ldi(p + ((s >> 2 & 1) * 2 + h) * 64), hi = ldi(p + 256 + h * 64);
            const VI l = andi(srl(lo, 8 * (s & 3) + (s >= 8 ? 4 : 0)), seti(15));
            const VI u = andi(srl(hi, 8 * (s & 3) + 2 * (s >> 2)), seti(3));
            d = mulf(ldh(reinterpret_cast<const uint16_t*>(p + 384 + h * 32)), cvtif(addi(ori(l, sll(u, 4)), seti(-32))));
        }
    }

  private:
    // Of a quad's higher planes, at bit `to` of each byte.
    AI static VI two_bits(const uint8_t* p, int q, int h, int to) {
        return andi(moved(ldi(p + ((q >> 2) * 2 + h) * 64), 2 * (q & 3), to), seti(0x03030303 << to));
    }
    AI static VI one_bit(const uint8_t* p, int q, int h, int to) {
        return andi(moved(ldi(p + h * 64), q, to), seti(0x01010101 << to));
    }
    AI static VI moved(VI x, int from, int to) { return from > to ? srl(x, from - to) : from < to ? sll(x, to - from) : x; }
    AI static VF negate(VF x) { return mulf(x, setf(-1.f)); }
};

// A panel's slice unpacked to L1: codes [group][quad][half][64], scales and mins [scale][32]. x_at: where a record has its
// activations in the order of these codes.
struct Unpacked {
    uint8_t* codes;
    float* scale;
    float* min;
    size_t x_at;
};

template <Format F>
AI void unpack_scales(const uint8_t* p, int blocks, const Unpacked& out) {
    using L = Layout<F>;
    float *sc = out.scale, *mn = out.min;
    for (int b = 0; b < blocks; b++, p += L::kBytes)
        for (int s = 0; s < L::kScales; s++)
            for (int h = 0; h < 2; h++, sc += 16, mn += 16) {
                VF d, m;
                L::scale(p, s, h, d, m);
                stf(sc, d);
                if (L::I.has_min) stf(mn, m);
            }
}

template <Format F>
AI void unpack_blocks(const uint8_t* p, int blocks, const Unpacked& out) {
    using L = Layout<F>;
    uint8_t* c = out.codes;
    unpack_scales<F>(p, blocks, out);
    for (int b = 0; b < blocks; b++, p += L::kBytes) {
        const uint8_t* g = p + L::I.header;
        for (int i = 0; i < L::kGroups; i++, g += L::kGroupBytes)
            UNR for (int q = 0; q < 8; q++) UNR for (int h = 0; h < 2; h++, c += 64) sti(c, L::quad(g, q, h));
    }
}

// The same of a codebook format: row by row through its int8 codes, made unsigned.
template <Format F>
inline void unpack_codebook(const uint8_t* p, int blocks, const Unpacked& out) {
    constexpr const FormatInfo& I = kFormats[static_cast<int>(F)];
    int8_t codes[256];
    float scale[16];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < kPanelRows; r++, p += I.block_bytes) {
            raw_int8(F, p, codes, scale);
            uint8_t* to = out.codes + (b * (I.block / 4) * 2 + r / kHalfRows) * 64 + r % kHalfRows * 4;
            for (int q = 0; q < I.block / 4; q++, to += 128) {
                uint32_t quad;
                __builtin_memcpy(&quad, codes + q * 4, 4);
                quad ^= 0x80808080;
                __builtin_memcpy(to, &quad, 4);
            }
            for (int s = 0; s < I.block / 16; s++) out.scale[(b * (I.block / 16) + s) * kPanelRows + r] = scale[s];
        }
}

// Floats [k][32] of one 32-value group; the two roundings (multiply, add) are those of gguf's dequantisation.
template <Format F>
AI void unpack_group_f32(const uint8_t* block, int group, float* out) {
    using L = Layout<F>;
    constexpr int kOffset = L::I.offset_shift < 0 ? 0 : 1 << L::I.offset_shift;
    const uint8_t* p = block + L::I.header + group * L::kGroupBytes;
    for (int q = 0; q < 8; q++)
        for (int h = 0; h < 2; h++) {
            VF d, m;
            VI offset = seti(-kOffset);
            if constexpr (L::I.zero_point) {
                L::zero_point(block, h, d, offset);
                offset = subi(seti(0), offset);
            } else {
                L::scale(block, (group * 32 + q * 4) / L::I.group, h, d, m);
            }
            const VI v = L::quad(p, q, h);
            for (int j = 0; j < 4; j++) {
                VF w = mulf(cvtif(addi(andi(srl(v, 8 * j), seti(255)), offset)), d);
                if (L::I.has_min && !L::I.zero_point) w = addf(w, m);
                stf(out + (q * 4 + j) * 32 + h * 16, w);
            }
        }
}

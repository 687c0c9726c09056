// How each format's packed 32-row block becomes u8 codes and float scales. Inside the unit's namespace.
//
// A block is a header, then for every 32 values of K the code's bit planes (8 | 4, then 2, then 1 bits), each in
// vectors of 16 rows x 4 k, row halves alternating. With q = 0..7 the quad (four neighbouring k) of the group:
//   8 bits: vector q;  4 bits: vector q & 3, low nibble for q < 4;  2 bits: vector q >> 2, bits 2 (q & 3);
//   1 bit: one vector, bit q of each byte.
// Formats of one bit have that vector alone, and codes 0 and 2. Three bits are three vectors: q < 6 at bits 3 (q / 3) of
// vector q % 3; the upper bits of quads 6 and 7 at bit 6 of vectors 0 and 1, their lowest at bits 6 and 7 of vector 2.
//
// A header is the K-quants' scales as they are stored, byte by byte [byte][32 rows], then scales and mins of half precision.
// Those of Q3_K are put into the upper six bits of 12 bytes, less 32; four of the 16 into the lower ones. Lattice points as
// codes have nibbles, the first half of a row's in the low ones.
template <Format F, Kind K = kFormats[static_cast<int>(F)].kind>
struct Layout {
    static constexpr FormatInfo I = kFormats[static_cast<int>(F)];
    static constexpr int kGroups = I.packed_k / 32;
    static constexpr int kGroupBytes = 128 * I.bits;
    static constexpr int kBytes = I.header + kGroups * kGroupBytes;
    static constexpr bool kWide = wide_codes(I);
    static constexpr int kScales = I.packed_k / I.group;
    static constexpr bool kSixBits = F == Format::Q3_K || F == Format::Q4_K || F == Format::Q5_K;
    static constexpr bool kPoints = coded_points(F);
    static constexpr bool kPlain = !kPoints && I.header == 64 * (1 + I.has_min);  // one half-precision scale (and min) a row and block
    static_assert(I.kind == Kind::Affine || I.kind == Kind::Table, "only these lie in bit planes");

    // u8 codes of quad q, row half h of the group at p.
    AI static VI quad(const uint8_t* p, int q, int h) {
        if (I.bits == 8) return ldi(p + (q * 2 + h) * 64);
        if (I.bits == 3) {
            const VI v = three_bits(p + h * 64, q);
            return I.kind == Kind::Table ? lookup16(v, kTables[I.table]) : v;
        }
        if (I.bits <= 2) return I.bits == 1 ? one_bit(p, q, h, 1) : two_bits(p, q, h, 0);
        const VI bytes = ldi(p + ((q & 3) * 2 + h) * 64), v = q < 4 ? bytes : srl(bytes, 4), low = seti(0x0f0f0f0f);
        p += 512;
        if (I.kind == Kind::Table) return lookup16(kLookupMasks ? v : andi(v, low), kTables[I.table]);
        if (I.bits == 6) return merge(v, low, two_bits_at(p, q, h, 4), seti(0x30303030));
        if (I.bits == 5) return merge(v, low, one_bit_at(p, q, h, 4), seti(0x10101010));
        return andi(v, low);
    }
    AI static VI block_quad(const uint8_t* block, int group, int q, int h) {
        return quad(block + I.header + group * kGroupBytes, q, h);
    }

    // Scale and zero point of row half h where the format has them.
    AI static void zero_point(const uint8_t* p, int h, VF& d, VI& zero) {
        const VI bits = ldw(p + h * 32), z = ldw(p + 64 + h * 32);
        const VF as_half = ldh(reinterpret_cast<const uint16_t*>(p + h * 32));
        d = selectf(sll(z, 16), castf(sll(bits, 16)), as_half);  // kScaleIsBf16 becomes the sign
        zero = andi(z, seti(0x7fff));
    }

    // A block's header, opened for `scale`.
    struct Header {
        const uint8_t *block, *bytes;  // of scales, a vector lane each [byte][32 rows]
        VF d[2], m[2];
        alignas(64) uint8_t opened[kSixBits || kPoints ? 16 * kPanelRows : 1];

        AI explicit Header(const uint8_t* p) : block(p), bytes(kSixBits || kPoints ? opened : p) {
            if constexpr (F == Format::Q3_K) open_signed(p, opened);
            if constexpr (F == Format::Q4_K || F == Format::Q5_K) open_pairs(p, opened);
            if constexpr (kPoints) open_nibbles(p, opened);
            if constexpr (kPlain || F == Format::NVFP4) return;
            if constexpr (F == Format::NVFP4_G128) {
                UNR for (int h = 0; h < 2; h++) d[h] = ldf(reinterpret_cast<const float*>(p + 8 * kPanelRows) + h * kHalfRows);
                return;
            }
            if constexpr (kPoints) {
                UNR for (int h = 0; h < 2; h++)
                    d[h] = mulf(ldh(reinterpret_cast<const uint16_t*>(p + I.header - 64 + h * 32)), setf(kUnit));
                return;
            }
            UNR for (int h = 0; h < 2; h++) {
                halves(p, h, d[h], m[h]);
                if (F == Format::Q3_K) d[h] = mulf(d[h], setf(0.25f));  // its scales are opened times four
                if (I.has_min) m[h] = negate(m[h]);
            }
        }
        // Scale (and min, added: already negated where the format subtracts it) number s of row half h.
        AI void scale(int s, int h, VF& scale, VF& min) const {
            if constexpr (kPlain) return halves(block, h, scale, min);
            const uint8_t* at = bytes + s * kPanelRows + h * kHalfRows;
            if constexpr (F == Format::NVFP4 || F == Format::NVFP4_G128) {
                // UE4M3: its bits where a float's exponent and mantissa are; a half of it, since the table's values are doubled.
                scale = mulf(castf(sll(ldu8(at), 20)), setf(0x1p119f));
                if (F == Format::NVFP4_G128) scale = mulf(scale, d[h]);
                min = setf(0.f);
            } else if constexpr (F == Format::IQ1_S_FAST) {  // d (2 n + 1) (code - 1 +- 1/8)
                const VI odd = ldu8(at);
                scale = mulf(d[h], cvtif(andi(odd, seti(15))));
                min = mulf(scale, selectf(sll(odd, 27), setf(-1.125f), setf(-0.875f)));
            } else if constexpr (F == Format::Q2_K) {
                const VI both = ldu8(at);
                scale = mulf(d[h], cvtif(andi(both, seti(15))));
                min = mulf(m[h], cvtif(srl(both, 4)));
            } else {
                scale = mulf(d[h], ld8(at));
                min = I.has_min ? mulf(m[h], ld8(at + 8 * kPanelRows)) : setf(0.f);
            }
        }
    };

  private:
    // What one step of a lattice point's values is, beside d (2 n + 1).
    static constexpr float kUnit = F == Format::IQ3_XXS_FAST ? 0.25f : F == Format::IQ1_S_FAST || F == Format::IQ3_S_FAST ? 1.f : 0.125f;
    // Nibbles n to bytes 2 n + 1; IQ1_S's top bit, the sign of its eighth, becomes bit 4.
    AI static void open_nibbles(const uint8_t* p, uint8_t* out) {
        const VI low = seti(0x0f0f0f0f), one = seti(0x01010101);
        UNR for (int i = 0; i < (kScales / 2 * kPanelRows) / 64; i++) {
            const VI v = ldi(p + i * 64);
            UNR for (int n = 0; n < 2; n++) sti(out + n * (kScales / 2) * kPanelRows + i * 64, ori(sll(andi(n ? srl(v, 4) : v, low), 1), one));
        }
    }
    // The floats of a row half behind the scales' bytes.
    AI static void halves(const uint8_t* p, int h, VF& d, VF& m) {
        p += I.header - 64 * (1 + I.has_min) + h * 32;
        m = setf(0.f);
        if constexpr (I.zero_point) {
            VI zero;
            zero_point(p - h * 32, h, d, zero);
            m = negate(mulf(cvtif(zero), d));
        } else if constexpr (F == Format::MXFP4) {
            d = ldb(reinterpret_cast<const uint16_t*>(p));
        } else {
            d = ldh(reinterpret_cast<const uint16_t*>(p));
            if (I.has_min) m = ldh(reinterpret_cast<const uint16_t*>(p + 64));
        }
    }
    // Of a quad's higher planes, at bit `to` of each byte; other bits are anything.
    AI static VI two_bits_at(const uint8_t* p, int q, int h, int to) {
        return moved(ldi(p + ((q >> 2) * 2 + h) * 64), 2 * (q & 3), to);
    }
    AI static VI one_bit_at(const uint8_t* p, int q, int h, int to) { return moved(ldi(p + h * 64), q, to); }
    AI static VI two_bits(const uint8_t* p, int q, int h, int to) {
        return andi(two_bits_at(p, q, h, to), seti(0x03030303 << to));
    }
    AI static VI one_bit(const uint8_t* p, int q, int h, int to) {
        return andi(one_bit_at(p, q, h, to), seti(0x01010101 << to));
    }
    AI static VI three_bits(const uint8_t* p, int q) {
        if (q < 6) {
            const VI v = ldi(p + q % 3 * 128);
            return andi(q < 3 ? v : srl(v, 3), seti(0x07070707));
        }
        return merge(srl(ldi(p + (q - 6) * 128), 5), seti(0x06060606), srl(ldi(p + 256), q), seti(0x01010101));
    }
    AI static VI moved(VI x, int from, int to) { return from > to ? srl(x, from - to) : from < to ? sll(x, to - from) : x; }
    // Q4_K's and Q5_K's: eight scales and eight mins, two of one row half after the other a vector.
    AI static void open_pairs(const uint8_t* p, uint8_t* out) {
        const VI six = seti(0x3f3f3f3f), low = seti(0x0f0f0f0f), high = seti(0x30303030);
        UNR for (int i = 0; i < 2; i++) {
            const VI sc = ldi(p + i * 64), mn = ldi(p + 128 + i * 64), rest = ldi(p + 256 + i * 64);
            sti(out + i * 64, andi(sc, six));
            sti(out + 128 + i * 64, merge(rest, low, srl(sc, 2), high));
            sti(out + 256 + i * 64, andi(mn, six));
            sti(out + 384 + i * 64, merge(srl(rest, 4), low, srl(mn, 2), high));
        }
    }
    // Q3_K's 16, times four.
    AI static void open_signed(const uint8_t* p, uint8_t* out) {
        const VI six = seti(static_cast<int>(0xfcfcfcfc));
        UNR for (int i = 0; i < 2; i++) {
            VI v[3];
            UNR for (int n = 0; n < 3; n++) {
                v[n] = ldi(p + (i * 3 + n) * 64);
                sti(out + (i * 3 + n) * 64, andi(v[n], six));
            }
            const VI lower = merge(sll(v[1], 4), seti(0x30303030), sll(v[2], 2), seti(0x0c0c0c0c));
            sti(out + (6 + i) * 64, merge(sll(v[0], 6), seti(static_cast<int>(0xc0c0c0c0)), lower, seti(0x3c3c3c3c)));
        }
    }
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
    for (int b = 0; b < blocks; b++, p += L::kBytes) {
        const typename L::Header header(p);
        for (int s = 0; s < L::kScales; s++)
            for (int h = 0; h < 2; h++, sc += 16, mn += 16) {
                VF d, m;
                header.scale(s, h, d, m);
                stf(sc, d);
                if (L::I.has_min) stf(mn, m);
            }
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

// Floats [k][32] of one 32-value group; the two roundings (multiply, add) are those of gguf's dequantisation.
template <Format F>
AI void unpack_group_f32(const uint8_t* block, int group, float* out) {
    using L = Layout<F>;
    constexpr int kOffset = L::I.offset_shift < 0 ? 0 : 1 << L::I.offset_shift;
    const typename L::Header header(block);
    for (int q = 0; q < 8; q++)
        for (int h = 0; h < 2; h++) {
            VF d, m;
            VI offset = seti(-kOffset);
            if constexpr (L::I.zero_point) {
                L::zero_point(block, h, d, offset);
                offset = subi(seti(0), offset);
            } else {
                header.scale((group * 32 + q * 4) / L::I.group, h, d, m);
            }
            const VI v = L::block_quad(block, group, q, h);
            for (int j = 0; j < 4; j++) {
                VF w = mulf(cvtif(addi(andi(srl(v, 8 * j), seti(255)), offset)), d);
                if (L::I.has_min && !L::I.zero_point) w = addf(w, m);
                stf(out + (q * 4 + j) * 32 + h * 16, w);
            }
        }
}

// The 16-lane vector in plain C++: the definition that the other instruction sets are tested against.
// Included once, inside the unit's namespace.
struct VI {
    int32_t v[16];
};
struct VF {
    float v[16];
};
#define KT_LANES for (int i = 0; i < 16; i++)

AI VI ldi(const void* p) { VI r; __builtin_memcpy(&r, p, 64); return r; }
AI void sti(void* p, VI a) { __builtin_memcpy(p, &a, 64); }
AI VF ldf(const float* p) { VF r; __builtin_memcpy(&r, p, 64); return r; }
AI void stf(float* p, VF a) { __builtin_memcpy(p, &a, 64); }
AI VI seti(int x) { VI r; KT_LANES r.v[i] = x; return r; }
AI VF setf(float x) { VF r; KT_LANES r.v[i] = x; return r; }
AI VI bci(const void* p) { int x; __builtin_memcpy(&x, p, 4); return seti(x); }
AI void touch(const void*) {}
AI void touch_far(const void*) {}
constexpr bool asks_first(const FormatInfo&, int) { return false; }
AI VF bcf(const float* p) { return setf(*p); }
AI VI andi(VI a, VI b) { KT_LANES a.v[i] &= b.v[i]; return a; }
AI VI ori(VI a, VI b) { KT_LANES a.v[i] |= b.v[i]; return a; }
AI VI xori(VI a, VI b) { KT_LANES a.v[i] ^= b.v[i]; return a; }
AI VI srl(VI a, int n) { KT_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n); return a; }
AI VI sll(VI a, int n) { KT_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); return a; }
AI VI sra24(VI a) { KT_LANES a.v[i] >>= 24; return a; }
AI VI sra(VI a, int n) { KT_LANES a.v[i] >>= n; return a; }
AI VI subi(VI a, VI b) { KT_LANES a.v[i] -= b.v[i]; return a; }
AI VI addi(VI a, VI b) { KT_LANES a.v[i] += b.v[i]; return a; }
AI VF castf(VI a) { VF r; __builtin_memcpy(&r, &a, 64); return r; }
AI VI merge(VI a, VI ma, VI b, VI mb) { return ori(andi(a, ma), andi(b, mb)); }
AI VI ldu8(const void* p) { VI r; KT_LANES r.v[i] = static_cast<const uint8_t*>(p)[i]; return r; }
constexpr bool kLookupMasks = false;
AI VI ldw(const void* p) { uint16_t w[16]; __builtin_memcpy(w, p, 32); VI r; KT_LANES r.v[i] = w[i]; return r; }
AI VF selectf(VI sign, VF x, VF y) { KT_LANES x.v[i] = sign.v[i] < 0 ? x.v[i] : y.v[i]; return x; }
AI VI lookup16(VI codes, const uint8_t* table) {
    uint8_t b[64];
    __builtin_memcpy(b, &codes, 64);
    for (uint8_t& c : b) c = table[c & 15];
    return ldi(b);
}
AI VF cvtif(VI a) { VF r; KT_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
// Round to nearest even through the mantissa; |x| < 2^22.
AI VF roundv(VF a) { KT_LANES { float t = a.v[i] + 12582912.f; a.v[i] = t - 12582912.f; } return a; }
AI VI cvtfi(VF a) { VI r; a = roundv(a); KT_LANES r.v[i] = static_cast<int32_t>(a.v[i]); return r; }
template <bool kWide>
AI VI dot4(VI acc, VI u, VI s) {
    KT_LANES {
        const uint32_t x = static_cast<uint32_t>(u.v[i]), y = static_cast<uint32_t>(s.v[i]);
        int sum = 0;
        for (int b = 0; b < 32; b += 8) sum += static_cast<int>(x >> b & 255) * static_cast<int8_t>(y >> b);
        acc.v[i] += sum;
    }
    return acc;
}
// Codes as dot4 takes them: as they are.
template <bool kWide>
using Operand = VI;
template <bool kWide>
AI VI operand(VI u) { return u; }
constexpr bool kLessHalf = false;
// 64 bits in all pairs of lanes; the sums of such pairs in the lower eight lanes.
AI VI bci2(const void* p) {
    VI r;
    KT_LANES __builtin_memcpy(&r.v[i], static_cast<const uint8_t*>(p) + i % 2 * 4, 4);
    return r;
}
AI VI sum2(VI a) {
    KT_LANES a.v[i] = i < 8 ? a.v[2 * i] + a.v[2 * i + 1] : 0;
    return a;
}
// acc + a * b over the two 16-bit integers of each lane; 16 integers as 16-bit ones; the low halves of both in one lane.
AI VI dot2(VI acc, VI a, VI b) {
    KT_LANES {
        const uint32_t x = static_cast<uint32_t>(a.v[i]), y = static_cast<uint32_t>(b.v[i]);
        const int low = static_cast<int16_t>(x) * static_cast<int16_t>(y);
        const int high = static_cast<int16_t>(x >> 16) * static_cast<int16_t>(y >> 16);
        acc.v[i] += low + high;
    }
    return acc;
}
AI void st16(int16_t* p, VI a) { KT_LANES p[i] = static_cast<int16_t>(a.v[i]); }
AI VI pack2(VI low, VI high) {
    KT_LANES low.v[i] = static_cast<int32_t>((static_cast<uint32_t>(low.v[i]) & 0xffff) | static_cast<uint32_t>(high.v[i]) << 16);
    return low;
}
AI VF addf(VF a, VF b) { KT_LANES a.v[i] += b.v[i]; return a; }
AI VF subf(VF a, VF b) { KT_LANES a.v[i] -= b.v[i]; return a; }
AI VF mulf(VF a, VF b) { KT_LANES a.v[i] *= b.v[i]; return a; }
AI VF divf(VF a, VF b) { KT_LANES a.v[i] /= b.v[i]; return a; }
AI VF maxf(VF a, VF b) { KT_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
AI VF fma(VF a, VF b, VF c) { KT_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
AI VF absf(VF a) { KT_LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
AI VF ldh(const uint16_t* p) { VF r; KT_LANES r.v[i] = half_to_float(p[i]); return r; }
AI void sth(uint16_t* p, VF a) { KT_LANES p[i] = float_to_half(a.v[i]); }
// 16 signed bytes; a half-precision number in all lanes (any address).
AI VF ld8(const void* p) { VF r; KT_LANES r.v[i] = static_cast<const int8_t*>(p)[i]; return r; }
AI VF bch(const void* p) { uint16_t h; __builtin_memcpy(&h, p, 2); return setf(half_to_float(h)); }
AI VF ldb(const uint16_t* p) { VF r; KT_LANES r.v[i] = bf16_to_float(p[i]); return r; }
// Sums in the order of a halving tree, as the wide versions do.
AI float hsum(VF a) { for (int n = 8; n; n /= 2) for (int i = 0; i < n; i++) a.v[i] += a.v[i + n]; return a.v[0]; }
AI float hmax(VF a) { float m = a.v[0]; KT_LANES m = a.v[i] > m ? a.v[i] : m; return m; }
// Largest magnitude, by the order of bit patterns: above it is only Inf, and NaN above that.
AI float hmaxabs(VF a) {
    VI m;
    a = absf(a);
    __builtin_memcpy(&m, &a, 64);
    KT_LANES m.v[0] = m.v[i] > m.v[0] ? m.v[i] : m.v[0];
    float top;
    __builtin_memcpy(&top, &m.v[0], 4);
    return top;
}
AI int hsumi(VI a) { int m = 0; KT_LANES m += a.v[i]; return m; }
AI void st8(int8_t* p, VI a) { KT_LANES p[i] = static_cast<int8_t>(a.v[i]); }
// x * 2^n for integral n up to 127; results below the normal range are zero. NaN in n is for x to carry.
AI VF scale2(VF x, VF n) {
    KT_LANES {
        const int e = static_cast<int>(n.v[i] >= -127.f ? (n.v[i] < 128.f ? n.v[i] : 128.f) : -127.f) + 127;
        const uint32_t bits = static_cast<uint32_t>(e) << 23;
        float f;
        __builtin_memcpy(&f, &bits, 4);
        x.v[i] *= f;
    }
    return x;
}
// Lanes lo <= i < hi of a, `fill` elsewhere.
AI VF keep(VF a, int lo, int hi, float fill) { KT_LANES a.v[i] = i >= lo && i < hi ? a.v[i] : fill; return a; }
AI void transpose16(VF* m) {
    for (int i = 0; i < 16; i++)
        for (int j = i + 1; j < 16; j++) { const float t = m[i].v[j]; m[i].v[j] = m[j].v[i]; m[j].v[i] = t; }
}
AI float sqrt1(float x) { return __builtin_sqrtf(x); }
constexpr int kTileTokens = 2, kTileHalves = 1, kF32Tokens = 2, kF32Vectors = 1;
constexpr int kDirectTokens = 4;
constexpr int kFixKeys = 4, kFixVectors = 1, kFixKeysOne = 4;
constexpr bool kDirectMany = false;
// As in vec_avx512.h.
constexpr int kGemvTokens = 4, kGemvTokensK = 4, kGridTokens = 0;
// bfloat16 by the rules of vcvtneps2bf16 and vdpbf16ps: to nearest even, subnormal numbers taken as zero; the odd
// member of a pair is added first. kHasBf16: the CPU does it in one instruction.
constexpr bool kHasBf16 = false;
AI void stb(uint16_t* p, VF a) { KT_LANES p[i] = float_to_bf16(a.v[i]); }
// Lane i holds bfloat16(even[i]) in its low half, bfloat16(odd[i]) in its high half.
AI VI pairbf(VF even, VF odd) {
    VI r;
    KT_LANES r.v[i] = static_cast<int32_t>(float_to_bf16(even.v[i]) | static_cast<uint32_t>(float_to_bf16(odd.v[i])) << 16);
    return r;
}
// acc + a * b over the two bfloat16 of each lane.
AI VF dotbf(VF acc, VI a, VI b) {
    KT_LANES {
        const uint32_t x = static_cast<uint32_t>(a.v[i]), y = static_cast<uint32_t>(b.v[i]);
        acc.v[i] += bf16_to_float(static_cast<uint16_t>(x >> 16)) * bf16_to_float(static_cast<uint16_t>(y >> 16));
        acc.v[i] += bf16_to_float(static_cast<uint16_t>(x)) * bf16_to_float(static_cast<uint16_t>(y));
    }
    return acc;
}
#undef KT_LANES
// No byte tables of 128 entries.
constexpr bool kHasTables128 = false;
AI VI lookup128(VI codes, const uint8_t*) { return codes; }

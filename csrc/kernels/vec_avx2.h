// The 16-lane vector as two 256-bit registers. Included once, inside the unit's namespace.
struct VI {
    __m256i a, b;
};
struct VF {
    __m256 a, b;
};

AI VI ldi(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
AI void sti(void* p, VI x) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
}
AI VF ldf(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
AI void stf(float* p, VF x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
AI VI seti(int x) { const __m256i r = _mm256_set1_epi32(x); return {r, r}; }
AI VF setf(float x) { const __m256 r = _mm256_set1_ps(x); return {r, r}; }
AI VI bci(const void* p) { int x; __builtin_memcpy(&x, p, 4); return seti(x); }
AI void touch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
AI void touch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // into L2
// Whether a group's lines are asked for before its first load (vec_avx512.h says why). With 16 registers a fixed order costs
// spills where a block has many groups, and with more tokens; else one token gains, from memory, GB/s a Zen 4 core: Q4_0 18 to
// 32, Q5_0 10 to 28, Q5_1 14 to 28, Q8_0 18 to 33, INT8_G32 21 to 28.
constexpr bool asks_first(const FormatInfo& i, int tokens) {
    return tokens == 1 && (i.packed_k == 32 || i.bits == 8);
}
AI VF bcf(const float* p) { const __m256 r = _mm256_broadcast_ss(p); return {r, r}; }
AI VI andi(VI x, VI y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
AI VI ori(VI x, VI y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
AI VI xori(VI x, VI y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
AI VI srl(VI x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
AI VI sll(VI x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
AI VI sra24(VI x) { return {_mm256_srai_epi32(x.a, 24), _mm256_srai_epi32(x.b, 24)}; }
AI VI sra(VI x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
AI VI add8(VI x, VI y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
AI VI subs8(VI x, VI y) { return {_mm256_subs_epu8(x.a, y.a), _mm256_subs_epu8(x.b, y.b)}; }
AI VI avg8(VI x, VI y) { return {_mm256_avg_epu8(x.a, y.a), _mm256_avg_epu8(x.b, y.b)}; }
AI VI subi(VI x, VI y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
AI VI addi(VI x, VI y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
AI VF castf(VI x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
AI VI merge(VI x, VI mx, VI y, VI my) { return ori(andi(x, mx), andi(y, my)); }
AI VI ldu8(const void* p) {
    const __m128i a = _mm_loadu_si64(p), b = _mm_loadu_si64(static_cast<const uint8_t*>(p) + 8);
    return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(b)};
}
constexpr bool kLookupMasks = false;
AI VI ldw(const void* p) {
    const __m128i* q = static_cast<const __m128i*>(p);
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
AI VF selectf(VI sign, VF x, VF y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(sign.a)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(sign.b))};
}
AI VI lookup16(VI codes, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, codes.a), _mm256_shuffle_epi8(t, codes.b)};
}
AI VF cvtif(VI x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
AI VI cvtfi(VF x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
AI __m256 round1(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
AI VF roundv(VF x) { return {round1(x.a), round1(x.b)}; }
#if defined(__AVXVNNI__) || defined(KTCORE_EMULATE_VNNI)
// vpdpbusd, VEX-coded. Emulated, even and odd bytes are multiplied apart: it saturates nothing.
AI __m256i dot4h(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    const __m256i low = _mm256_set1_epi16(255), one = _mm256_set1_epi16(1);
    const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(u, low), s);
    const __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, u), s);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even, one), _mm256_madd_epi16(odd, one)));
#endif
}
constexpr bool kLessHalf = false;
template <bool kWide>
using Operand = VI;
template <bool kWide>
AI VI operand(VI u) { return u; }
template <bool kWide>
AI VI dot4(VI acc, VI u, VI s) { return {dot4h(acc.a, u.a, s.a), dot4h(acc.b, u.b, s.b)}; }
#else
// vpmaddubsw saturates where two products exceed 16 bits, which only codes of 8 bits can reach: those less 128 stay within
// them, as magnitudes, and activations that take their signs.
constexpr bool kLessHalf = true;
struct Signed {
    VI magnitude, less;
};
template <bool kWide>
using Operand = std::conditional_t<kWide, Signed, VI>;
template <bool kWide>
AI Operand<kWide> operand(VI u) {
    if constexpr (!kWide) return u;
    else {
        const VI less = xori(u, seti(static_cast<int>(0x80808080)));
        return {{_mm256_abs_epi8(less.a), _mm256_abs_epi8(less.b)}, less};
    }
}
AI __m256i dot4h(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
template <bool kWide>
AI VI dot4(VI acc, const Operand<kWide>& u, VI s) {
    if constexpr (kWide)
        return {dot4h(acc.a, u.magnitude.a, _mm256_sign_epi8(s.a, u.less.a)),
                dot4h(acc.b, u.magnitude.b, _mm256_sign_epi8(s.b, u.less.b))};
    else
        return {dot4h(acc.a, u.a, s.a), dot4h(acc.b, u.b, s.b)};
}
#endif
AI VI dot2(VI acc, VI a, VI b) { return addi(acc, {_mm256_madd_epi16(a.a, b.a), _mm256_madd_epi16(a.b, b.b)}); }
AI VI bci2(const void* p) {
    int64_t x;
    __builtin_memcpy(&x, p, 8);
    const __m256i r = _mm256_set1_epi64x(x);
    return {r, r};
}
AI VI sum2(VI x) { return {_mm256_permute4x64_epi64(_mm256_hadd_epi32(x.a, x.b), 0xd8), _mm256_setzero_si256()}; }
AI void st16(int16_t* p, VI x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
AI VI pack2(VI low, VI high) {
    high = sll(high, 16);
    return {_mm256_blend_epi16(low.a, high.a, 0xaa), _mm256_blend_epi16(low.b, high.b, 0xaa)};
}
AI VF addf(VF x, VF y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
AI VF subf(VF x, VF y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
AI VF mulf(VF x, VF y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
AI VF divf(VF x, VF y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
AI VF maxf(VF x, VF y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
AI VF fma(VF x, VF y, VF z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
AI VF absf(VF x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
AI VF ldh(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
AI void sth(uint16_t* p, VF x) {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
AI VF ld8(const void* p) {
    const __m128i a = _mm_loadu_si64(p), b = _mm_loadu_si64(static_cast<const int8_t*>(p) + 8);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
}
AI VF bch(const void* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
    const __m256 r = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(h)));
    return {r, r};
}
AI __m256 ldb1(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
AI VF ldb(const uint16_t* p) { return {ldb1(p), ldb1(p + 8)}; }
AI float hsum(VF x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
AI float hmax(VF x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
// Largest magnitude, by the order of bit patterns: above it is only Inf, and NaN above that.
AI float hmaxabs(VF x) {
    x = absf(x);
    const __m256i s = _mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
}
AI int hsumi(VI x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
AI void st8(int8_t* p, VI x) {
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i r = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), r);
}
AI __m256 scale2h(__m256 x, __m256 n) {
    n = _mm256_max_ps(n, _mm256_set1_ps(-127.f));
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
AI VF scale2(VF x, VF n) { return {scale2h(x.a, n.a), scale2h(x.b, n.b)}; }
AI __m256 keep1(__m256 x, int lo, int hi, float fill) {
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i in = _mm256_and_si256(_mm256_cmpgt_epi32(iota, _mm256_set1_epi32(lo - 1)),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), iota));
    return _mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(in));
}
AI VF keep(VF x, int lo, int hi, float fill) {
    return {keep1(x.a, lo, hi, fill), keep1(x.b, lo - 8, hi - 8, fill)};
}
AI void transpose8(__m256& r0, __m256& r1, __m256& r2, __m256& r3, __m256& r4, __m256& r5, __m256& r6, __m256& r7) {
    const __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
    const __m256 a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
    const __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
    const __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
    const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
    const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
    const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
    const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
    r0 = _mm256_permute2f128_ps(b0, b4, 0x20);
    r1 = _mm256_permute2f128_ps(b1, b5, 0x20);
    r2 = _mm256_permute2f128_ps(b2, b6, 0x20);
    r3 = _mm256_permute2f128_ps(b3, b7, 0x20);
    r4 = _mm256_permute2f128_ps(b0, b4, 0x31);
    r5 = _mm256_permute2f128_ps(b1, b5, 0x31);
    r6 = _mm256_permute2f128_ps(b2, b6, 0x31);
    r7 = _mm256_permute2f128_ps(b3, b7, 0x31);
}
AI void transpose16(VF* m) {
    transpose8(m[0].a, m[1].a, m[2].a, m[3].a, m[4].a, m[5].a, m[6].a, m[7].a);
    transpose8(m[0].b, m[1].b, m[2].b, m[3].b, m[4].b, m[5].b, m[6].b, m[7].b);
    transpose8(m[8].a, m[9].a, m[10].a, m[11].a, m[12].a, m[13].a, m[14].a, m[15].a);
    transpose8(m[8].b, m[9].b, m[10].b, m[11].b, m[12].b, m[13].b, m[14].b, m[15].b);
    for (int i = 0; i < 8; i++) {
        const __m256 t = m[i].b;
        m[i].b = m[i + 8].a;
        m[i + 8].a = t;
    }
}
AI float sqrt1(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
// With vpdpbusd tiles of 2 x 1 are 10 to 24% slower than those of 2 x 2.
#if defined(__AVXVNNI__) || defined(KTCORE_EMULATE_VNNI)
constexpr int kTileHalves = 2;
#else
constexpr int kTileHalves = 1;
#endif
constexpr int kTileTokens = 2, kF32Tokens = 4, kF32Vectors = 1;
constexpr int kDirectTokens = 4;
constexpr int kFixKeys = 4, kFixVectors = 1, kFixKeysOne = 4;
constexpr bool kDirectMany = false;
// As in vec_avx512.h.
constexpr int kGemvTokens = 4, kGemvTokensK = 4, kGridTokens = 4;
// bfloat16: see vec_scalar.h for what they compute.
constexpr bool kHasBf16 = false;
// The rounded bfloat16 in each lane's high half; the low half is undefined.
AI __m256i roundbf1(__m256 x) {
    const __m256i b = _mm256_castps_si256(x), mag = _mm256_and_si256(b, _mm256_set1_epi32(0x7fffffff));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_cmpgt_epi32(mag, _mm256_set1_epi32(0x7f800000));
    const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800000), mag);
    const __m256i r = _mm256_blendv_epi8(near, _mm256_or_si256(b, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_blendv_epi8(r, _mm256_and_si256(b, _mm256_set1_epi32(INT32_MIN)), tiny);
}
AI VI roundbf(VF x) { return {roundbf1(x.a), roundbf1(x.b)}; }
AI void stb(uint16_t* p, VF x) {
    const VI r = srl(roundbf(x), 16);
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(r.a, r.b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w);
}
AI VI pairbf(VF even, VF odd) {
    const VI low = srl(roundbf(even), 16), high = roundbf(odd);
    return {_mm256_blend_epi16(low.a, high.a, 0xaa), _mm256_blend_epi16(low.b, high.b, 0xaa)};
}
AI __m256 dotbf1(__m256 acc, __m256i a, __m256i b) {
    const __m256i high = _mm256_set1_epi32(INT32_MIN >> 15);
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
}
AI VF dotbf(VF acc, VI a, VI b) { return {dotbf1(acc.a, a.a, b.a), dotbf1(acc.b, a.b, b.b)}; }
// No byte tables of 128 entries.
constexpr bool kHasTables128 = false;
AI VI lookup128(VI codes, const uint8_t*) { return codes; }

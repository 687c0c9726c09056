// The 16-lane vector as one 512-bit register, for AVX-512 F, BW, DQ and VL; where the unit's flags add VNNI or BF16,
// their dot products. Included once, inside the unit's namespace.
using VI = __m512i;
using VF = __m512;

AI VI ldi(const void* p) { return _mm512_loadu_si512(p); }
AI void sti(void* p, VI x) { _mm512_storeu_si512(p, x); }
AI VF ldf(const float* p) { return _mm512_loadu_ps(p); }
AI void stf(float* p, VF x) { _mm512_storeu_ps(p, x); }
AI VI seti(int x) { return _mm512_set1_epi32(x); }
AI VF setf(float x) { return _mm512_set1_ps(x); }
// One explicit broadcast: the compiler would fold the load into each of its users, and loads are what a tile lacks.
AI VI bci(const void* p) {
    VI r;
    asm("vpbroadcastd %1,%0" : "=v"(r) : "m"(*static_cast<const int*>(p)));
    return r;
}
AI void touch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
AI void touch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // into L2
// Whether a group's lines are asked for before its first load. The order of addresses is what a core's own reading ahead
// follows, and codes' loads take upper planes out of turn: the compiler puts loads first, and one token reads Q6_K from memory
// at 21 GB/s a Zen 4 core instead of 30, Q5_K at 25 instead of 29. Formats of one plane are in order anyhow, and lose 3%;
// short blocks of two planes gain with one token only.
constexpr bool asks_first(const FormatInfo& i, int tokens) {
    return i.bits == 6 || (i.bits == 5 && (tokens == 1 || i.packed_k == 256));
}
AI VF bcf(const float* p) {
    VF r;
    asm("vbroadcastss %1,%0" : "=v"(r) : "m"(*p));
    return r;
}
AI VI andi(VI x, VI y) { return _mm512_and_si512(x, y); }
AI VI ori(VI x, VI y) { return _mm512_or_si512(x, y); }
AI VI xori(VI x, VI y) { return _mm512_xor_si512(x, y); }
AI VI srl(VI x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
AI VI sll(VI x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
AI VI sra24(VI x) { return _mm512_srai_epi32(x, 24); }
AI VI sra(VI x, int n) { return _mm512_srai_epi32(x, static_cast<unsigned>(n)); }
// Of 64 unsigned bytes: the sum modulo 256, the difference or 0, the mean rounded up.
AI VI add8(VI x, VI y) { return _mm512_add_epi8(x, y); }
AI VI subs8(VI x, VI y) { return _mm512_subs_epu8(x, y); }
AI VI avg8(VI x, VI y) { return _mm512_avg_epu8(x, y); }
AI VI subi(VI x, VI y) { return _mm512_sub_epi32(x, y); }
AI VI addi(VI x, VI y) { return _mm512_add_epi32(x, y); }
AI VF castf(VI x) { return _mm512_castsi512_ps(x); }
// (x & mx) | (y & my), whose masks have no bit in common.
AI VI merge(VI x, VI mx, VI y, VI my) { return _mm512_ternarylogic_epi32(_mm512_and_si512(x, mx), y, my, 0xf8); }
// 16 unsigned bytes, words.
AI VI ldu8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
AI VI ldw(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
// x where the sign bit is set, else y.
AI VF selectf(VI sign, VF x, VF y) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(sign), y, x); }
// table[code] for every byte; codes below 16, or kLookupMasks: their upper bits do not count.
AI VI lookup16(VI codes, const uint8_t* table) {
    const VI four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(codes, four);
}
constexpr bool kLookupMasks = true;
#else
    return _mm512_shuffle_epi8(four, codes);
}
constexpr bool kLookupMasks = false;
#endif
AI VF cvtif(VI x) { return _mm512_cvtepi32_ps(x); }
AI VI cvtfi(VF x) { return _mm512_cvtps_epi32(x); }
AI VF roundv(VF x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Codes as dot4 takes them.
#if defined(__AVX512VNNI__)
template <bool kWide>
using Operand = VI;
template <bool kWide>
AI VI operand(VI u) { return u; }
constexpr bool kLessHalf = false;
template <bool kWide>
AI VI dot4(VI acc, VI u, VI s) { return _mm512_dpbusd_epi32(acc, u, s); }
#else
// vpmaddubsw saturates where two products exceed 16 bits, which only codes of 8 bits can reach: those less 128 stay within
// them, as magnitudes, and activations that take their signs.
constexpr bool kLessHalf = true;
struct Signed {
    VI magnitude;
    __mmask64 minus;
};
// not std::conditional: template arguments lose a vector's attributes
template <bool kWide>
struct OperandOf {
    using Type = VI;
};
template <>
struct OperandOf<true> {
    using Type = Signed;
};
template <bool kWide>
using Operand = typename OperandOf<kWide>::Type;
template <bool kWide>
AI Operand<kWide> operand(VI u) {
    if constexpr (!kWide) return u;
    else {
        const VI less = _mm512_xor_si512(u, _mm512_set1_epi8(-128));
        return {_mm512_abs_epi8(less), _mm512_movepi8_mask(less)};
    }
}
template <bool kWide>
AI VI dot4(VI acc, const Operand<kWide>& u, VI s) {
    const VI one = _mm512_set1_epi16(1);
    VI pairs;
    if constexpr (kWide)
        pairs = _mm512_maddubs_epi16(u.magnitude, _mm512_mask_sub_epi8(s, u.minus, _mm512_setzero_si512(), s));
    else
        pairs = _mm512_maddubs_epi16(u, s);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, one));
}
#endif
// acc + a * b over the two 16-bit integers of each lane. Explicit: the compiler would move the sums about.
#if defined(__AVX512VNNI__)
AI VI dot2(VI acc, VI a, VI b) {
    asm("vpdpwssd %2,%1,%0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
#else
AI VI dot2(VI acc, VI a, VI b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
#endif
// 64 bits in all pairs of lanes; the sums of such pairs in the lower eight lanes.
AI VI bci2(const void* p) {
    VI r;
    asm("vpbroadcastq %1,%0" : "=v"(r) : "m"(*static_cast<const char(*)[8]>(p)));
    return r;
}
AI VI sum2(VI x) {
    return _mm512_zextsi256_si512(_mm512_cvtepi64_epi32(_mm512_add_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB))));
}
// 16 integers as 16-bit ones; the low halves of both in one lane.
AI void st16(int16_t* p, VI x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
AI VI pack2(VI low, VI high) { return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16)); }
AI VF addf(VF x, VF y) { return _mm512_add_ps(x, y); }
AI VF subf(VF x, VF y) { return _mm512_sub_ps(x, y); }
AI VF mulf(VF x, VF y) { return _mm512_mul_ps(x, y); }
AI VF divf(VF x, VF y) { return _mm512_div_ps(x, y); }
AI VF maxf(VF x, VF y) { return _mm512_max_ps(x, y); }
AI VF fma(VF x, VF y, VF z) { return _mm512_fmadd_ps(x, y, z); }
AI VF absf(VF x) { return _mm512_abs_ps(x); }
AI VF ldh(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
AI void sth(uint16_t* p, VF x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
AI VF ld8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
AI VF bch(const void* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(h)));
}
AI VF ldb(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
AI float hsum(VF x) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
AI float hmax(VF x) { return _mm512_reduce_max_ps(x); }
// Largest magnitude, by the order of bit patterns: above it is only Inf, and NaN above that.
AI float hmaxabs(VF x) {
    const VI bits = _mm512_castps_si512(absf(x));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(bits))));
}
AI int hsumi(VI x) { return _mm512_reduce_add_epi32(x); }
AI void st8(int8_t* p, VI x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }
AI VF scale2(VF x, VF n) { return _mm512_scalef_ps(x, n); }
AI VF keep(VF x, int lo, int hi, float fill) {
    lo = lo < 0 ? 0 : lo > 16 ? 16 : lo;
    hi = hi < 0 ? 0 : hi > 16 ? 16 : hi;
    const __mmask16 m = static_cast<__mmask16>(((1u << hi) - 1) & ~((1u << lo) - 1));
    return _mm512_mask_blend_ps(m, _mm512_set1_ps(fill), x);
}
AI void transpose16(VF* m) {
    VF t[16];
    UNR for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
    }
    VF u[16];
    UNR for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNR for (int i = 0; i < 4; i++) {
        const VF a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
        const VF c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
        m[i] = _mm512_shuffle_f32x4(a, b, 0x88);
        m[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
        m[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
        m[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}
AI float sqrt1(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
// 5 x 2 tiles spill least: 0.57 to 0.61 TOPS a Zen 5 core, 6 x 2 0.55 to 0.57.
constexpr int kTileTokens = 5, kTileHalves = 2, kF32Tokens = 6, kF32Vectors = 4;
constexpr int kDirectTokens = 4;
constexpr int kFixKeys = 4, kFixVectors = 4, kFixKeysOne = 16;  // tiles of attention: keys x 16 rows, few rows: keys
#if defined(__AVX512VNNI__)
constexpr bool kDirectMany = true;
#else
constexpr bool kDirectMany = false;
#endif
// Until it is measured (blocks/switch.h), up to so many tokens codes are unpacked in registers, beyond into L1: formats
// with one scale a block, K-quants.
constexpr int kGemvTokens = 12, kGemvTokensK = 12, kGridTokens = 4;
// bfloat16: see vec_scalar.h for what they compute.
#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
AI void stb(uint16_t* p, VF x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
// Both vectors rounded by one instruction, low words then high words; the permutation interleaves them.
AI VI pairbf(VF even, VF odd) {
    const VI both = (VI)_mm512_cvtne2ps_pbh(odd, even);
    const VI iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const VI order = _mm512_or_si512(iota, _mm512_slli_epi32(_mm512_add_epi32(iota, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, both);
}
AI VF dotbf(VF acc, VI a, VI b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool kHasBf16 = false;
// The rounded bfloat16 in each lane's high half; the low half is undefined.
AI VI roundbf(VF x) {
    const VI b = _mm512_castps_si512(x), mag = _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff));
    const VI odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    VI r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_mask_or_epi32(r, _mm512_cmpgt_epi32_mask(mag, _mm512_set1_epi32(0x7f800000)), b, _mm512_set1_epi32(0x400000));
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(mag, _mm512_set1_epi32(0x800000));
    return _mm512_mask_and_epi32(r, tiny, b, _mm512_set1_epi32(INT32_MIN));
}
AI void stb(uint16_t* p, VF x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(roundbf(x), 16)));
}
AI VI pairbf(VF even, VF odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(roundbf(even), 16), roundbf(odd));
}
AI VF dotbf(VF acc, VI a, VI b) {
    const VI high = _mm512_set1_epi32(INT32_MIN >> 15);
    acc = fma(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
    return fma(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
}
#endif
// table[code & 127] of every byte.
#if defined(__AVX512VBMI__)
constexpr bool kHasTables128 = true;
AI VI lookup128(VI codes, const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
}
// table[code] of every byte.
AI VI lookup256(VI codes, const uint8_t* table) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lookup128(codes, table), lookup128(codes, table + 128));
}
#else
constexpr bool kHasTables128 = false;
AI VI lookup128(VI codes, const uint8_t*) { return codes; }
#endif

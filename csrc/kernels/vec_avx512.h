// The 16-lane vector as one 512-bit register. Included once, inside the unit's namespace.
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
AI void touch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
AI VF bcf(const float* p) {
    VF r;
    asm("vbroadcastss %1,%0" : "=v"(r) : "m"(*p));
    return r;
}
AI VI andi(VI x, VI y) { return _mm512_and_si512(x, y); }
AI VI ori(VI x, VI y) { return _mm512_or_si512(x, y); }
AI VI srl(VI x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
AI VI sll(VI x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
AI VI sra24(VI x) { return _mm512_srai_epi32(x, 24); }
AI VI addi(VI x, VI y) { return _mm512_add_epi32(x, y); }
AI VF cvtif(VI x) { return _mm512_cvtepi32_ps(x); }
AI VI cvtfi(VF x) { return _mm512_cvtps_epi32(x); }
AI VF roundv(VF x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <bool kWide>
AI VI dot4(VI acc, VI u, VI s) { return _mm512_dpbusd_epi32(acc, u, s); }
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

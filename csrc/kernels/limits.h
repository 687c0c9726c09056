// How quickly this unit's registers can multiply and add: loops of nothing else, for judging kernels by. Inside the
// unit's namespace.

// Single registers; vectors of AVX2 are two. opaque: the compiler takes the value
// for read and changed, so that what is computed from it is neither dropped, moved out of the loop nor merged; it costs
// no instruction.
#if defined(__AVX512F__)
using PeakInt = VI;
using PeakFloat = VF;
AI void opaque(PeakInt& x) { asm volatile("" : "+v"(x)); }
AI void opaque(PeakFloat& x) { asm volatile("" : "+v"(x)); }
AI PeakInt peak_int(int x) { return seti(x); }
AI PeakFloat peak_float(float x) { return setf(x); }
AI PeakInt peak_dot4(PeakInt acc, PeakInt x, PeakInt y) { return dot4<false>(acc, x, y); }
AI PeakFloat peak_fma(PeakFloat acc, PeakFloat x, PeakFloat y) { return fma(x, y, acc); }
#elif defined(__AVX2__)
using PeakInt = __m256i;
using PeakFloat = __m256;
AI void opaque(PeakInt& x) { asm volatile("" : "+x"(x)); }
AI void opaque(PeakFloat& x) { asm volatile("" : "+x"(x)); }
AI PeakInt peak_int(int x) { return _mm256_set1_epi32(x); }
AI PeakFloat peak_float(float x) { return _mm256_set1_ps(x); }
AI PeakInt peak_dot4(PeakInt acc, PeakInt x, PeakInt y) { return dot4h(acc, x, y); }
AI PeakFloat peak_fma(PeakFloat acc, PeakFloat x, PeakFloat y) { return _mm256_fmadd_ps(x, y, acc); }
#else
using PeakInt = VI;
using PeakFloat = VF;
AI void opaque(PeakInt& x) { asm volatile("" : "+m"(x)); }
AI void opaque(PeakFloat& x) { asm volatile("" : "+m"(x)); }
AI PeakInt peak_int(int x) { return seti(x); }
AI PeakFloat peak_float(float x) { return setf(x); }
AI PeakInt peak_dot4(PeakInt acc, PeakInt x, PeakInt y) { return dot4<false>(acc, x, y); }
AI PeakFloat peak_fma(PeakFloat acc, PeakFloat x, PeakFloat y) { return fma(x, y, acc); }
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kDotChains = 12;
#else
constexpr int kDotChains = 6;
#endif
#if defined(__AVX512BF16__)
AI PeakFloat peak_dotbf(PeakFloat acc, PeakInt x, PeakInt y) { return dotbf(acc, x, y); }
#else  // never run
AI PeakFloat peak_dotbf(PeakFloat acc, PeakInt, PeakInt) { return acc; }
#endif

// Independent chains of `step`: 12 cover latency times rate (8 to 12) and leave four of 16 registers. Twelve names, as GCC
// keeps an array of them in memory. Six where a step takes registers of its own and only its addition is in the chain.
// An operand is opaque before each, so that nothing is shared.
constexpr int kPeakChains = 12;
template <int kChains = kPeakChains, class Acc, class Operand, class Step>
AI void peak_loop(Acc zero, Operand x, Operand y, int64_t rounds, Step step) {
    Acc a = zero, b = zero, c = zero, d = zero, e = zero, f = zero, g = zero, h = zero, i = zero, j = zero, k = zero, l = zero;
    const auto one = [&](Acc& acc) __attribute__((always_inline)) {
        opaque(x);
        acc = step(acc, x, y);
    };
    const auto all = [](auto&& each, auto&... acc) __attribute__((always_inline)) { (each(acc), ...); };
    for (int64_t r = 0; r < rounds; r++) {
        if constexpr (kChains == kPeakChains)
            all(one, a, b, c, d, e, f, g, h, i, j, k, l);
        else
            for (int twice = 0; twice < 2; twice++) all(one, a, b, c, d, e, f);
    }
    all([](Acc& acc) __attribute__((always_inline)) { opaque(acc); }, a, b, c, d, e, f, g, h, i, j, k, l);
}

// Operations done (a multiplication and an addition are two); 0: the unit has no such arithmetic.
inline int64_t peak_operations(Arithmetic kind, int64_t rounds) {
    const int64_t lanes = rounds * kPeakChains * static_cast<int64_t>(sizeof(PeakInt) / 4);
    switch (kind) {
        case Arithmetic::Int8:
            peak_loop<kDotChains>(peak_int(0), peak_int(0x01010101), peak_int(0x02020202), rounds,
                      [](PeakInt acc, PeakInt x, PeakInt y) __attribute__((always_inline)) { return peak_dot4(acc, x, y); });
            return lanes * 8;
        case Arithmetic::Bf16:
            if (!kHasBf16) return 0;
            peak_loop(peak_float(0.f), peak_int(0x3f803f80), peak_int(0x3f803f80), rounds,
                      [](PeakFloat acc, PeakInt x, PeakInt y) __attribute__((always_inline)) { return peak_dotbf(acc, x, y); });
            return lanes * 4;
        case Arithmetic::F32:
            peak_loop(peak_float(0.f), peak_float(1.f), peak_float(1.f), rounds,
                      [](PeakFloat acc, PeakFloat x, PeakFloat y) __attribute__((always_inline)) { return peak_fma(acc, x, y); });
            return lanes * 2;
    }
    return 0;
}

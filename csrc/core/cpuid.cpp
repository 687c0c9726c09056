// CPUID for what the CPU has, XGETBV for what the operating system saves on a switch.
#include "core/cpuid.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ktcore {
namespace {

#if defined(__x86_64__)
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
};
Leaf cpuid(unsigned leaf, unsigned sub) {
    Leaf r;
    if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}
unsigned long long xcr0() {
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return static_cast<unsigned long long>(hi) << 32 | lo;
}
#endif

struct Flag {
    const char* name;
    bool on;
};

std::vector<Flag> all_flags() {
#if defined(__x86_64__)
    const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    const bool osxsave = one.c >> 27 & 1;
    const unsigned long long saved = osxsave ? xcr0() : 0;
    const bool ymm = (saved & 6) == 6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    const auto bit = [](unsigned word, int n) { return (word >> n & 1) != 0; };
    return {{"f16c", ymm && bit(one.c, 29)},          {"fma", ymm && bit(one.c, 12)},
            {"avx2", ymm && bit(seven.b, 5)},         {"avx_vnni", ymm && bit(more.a, 4)},
            {"avx512f", zmm && bit(seven.b, 16)},     {"avx512dq", zmm && bit(seven.b, 17)},
            {"avx512bw", zmm && bit(seven.b, 30)},    {"avx512vl", zmm && bit(seven.b, 31)},
            {"avx512_vnni", zmm && bit(seven.c, 11)}, {"avx512vbmi", zmm && bit(seven.c, 1)},
            {"avx512_bf16", zmm && bit(more.a, 5)},   {"amx_tile", tiles && bit(seven.d, 24)},
            {"amx_int8", tiles && bit(seven.d, 25)},  {"amx_bf16", tiles && bit(seven.d, 22)}};
#else
    return {};
#endif
}

bool has(const std::vector<std::string>& names, std::initializer_list<const char*> wanted) {
    for (const char* w : wanted) {
        bool found = false;
        for (const auto& n : names) found = found || n == w;
        if (!found) return false;
    }
    return true;
}

}  // namespace

std::vector<std::string> cpu_flags() {
    std::vector<std::string> out;
    for (const Flag& f : all_flags())
        if (f.on) out.emplace_back(f.name);
    return out;
}

std::vector<std::string> isa_supported() {
    std::vector<std::string> out = {"scalar"};
#if defined(KTCORE_X86)
    const auto flags = cpu_flags();
    if (!has(flags, {"avx2", "fma", "f16c"})) return out;
    out.emplace_back("avx2");
    if (has(flags, {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"})) out.emplace_back("avx512");
#endif
    return out;
}

const Kernels& select_kernels() {
    const auto here = isa_supported();
    const char* forced = std::getenv("KTCORE_ISA");
    const std::string want = forced && *forced ? forced : here.back();
    for (const auto& name : here) {
        if (name != want) continue;
#if defined(KTCORE_X86)
        if (name == "avx512") return kernels_avx512();
        if (name == "avx2") return kernels_avx2();
#endif
        return kernels_scalar();
    }
    std::string list;
    for (const auto& name : here) list += (list.empty() ? "" : ", ") + name;
    const bool known = want == "scalar" || want == "avx2" || want == "avx512";
    throw std::invalid_argument("KTCORE_ISA=" + want + (known ? " is not supported by this CPU" : " is not known") +
                                "; it has: " + list);
}

}  // namespace ktcore

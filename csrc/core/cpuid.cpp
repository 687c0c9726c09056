// CPUID for what the CPU has, XGETBV for what the operating system saves on a switch.
#include "core/cpuid.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

// Linux gives tile registers only to processes that ask (Documentation/arch/x86/xstate.rst); the answer lasts for the
// process and asking again is harmless.
constexpr const char* kTilesGranted = "amx_granted_by_the_system";
bool ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

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
            {"gfni", zmm && bit(seven.c, 8)},
            {"avx512_bf16", zmm && bit(more.a, 5)},   {"amx_tile", tiles && bit(seven.d, 24)},
            {"amx_int8", tiles && bit(seven.d, 25)},  {"amx_bf16", tiles && bit(seven.d, 22)},
            {kTilesGranted, tiles && bit(seven.d, 24) && ask_for_tiles()}};
#else
    return {};
#endif
}

bool has(const std::vector<std::string>& names, const std::string& wanted) {
    return std::find(names.begin(), names.end(), wanted) != names.end();
}

// A unit of kernels: what the CPU must have for it, and its table.
struct Unit {
    const char* name;
    std::vector<const char*> needs;
    const Kernels& (*kernels)();
};

// Lowest first: the last one that runs here is the default.
std::vector<Unit> all_units() {
    std::vector<Unit> out = {{"scalar", {}, kernels_scalar}};
#if defined(KTCORE_X86)
    std::vector<const char*> needs;
    const auto add = [&](const char* name, std::initializer_list<const char*> more, const Kernels& (*kernels)()) {
        needs.insert(needs.end(), more);
        out.push_back({name, needs, kernels});
    };
    add("avx2", {"avx2", "fma", "f16c"}, kernels_avx2);
    out.push_back({"avx_vnni", {"avx2", "fma", "f16c", "avx_vnni"}, kernels_avx_vnni});  // not all of the next have it
    add("avx512", {"avx512f", "avx512dq", "avx512bw", "avx512vl"}, kernels_avx512);
    add("avx512_vnni", {"avx512_vnni"}, kernels_avx512_vnni);
    add("avx512_bf16", {"avx512_bf16", "avx512vbmi", "gfni"}, kernels_avx512_bf16);
    add("amx", {"amx_tile", "amx_int8", "amx_bf16", kTilesGranted}, kernels_amx);
#endif
    return out;
}

// Run by name only: for tests of kernels on a CPU without their instructions.
std::vector<Unit> emulated_units() {
#if defined(KTCORE_X86)
    return {{"avx_vnni_emulated", {"avx2", "fma", "f16c"}, kernels_avx_vnni_emulated},
            {"amx_emulated", {"avx2", "fma", "f16c"}, kernels_amx_emulated}};
#else
    return {};
#endif
}

bool runs(const Unit& u, const std::vector<std::string>& flags) {
    return std::all_of(u.needs.begin(), u.needs.end(), [&](const char* f) { return has(flags, f); });
}

std::vector<std::string> names_that_run(const std::vector<Unit>& units) {
    std::vector<std::string> out;
    const auto flags = cpu_flags();
    for (const Unit& u : units)
        if (runs(u, flags)) out.emplace_back(u.name);
    return out;
}

std::string joined(const std::vector<std::string>& names) {
    std::string list;
    for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
    return list;
}

}  // namespace

std::vector<std::string> cpu_flags() {
    std::vector<std::string> out;
    for (const Flag& f : all_flags())
        if (f.on) out.emplace_back(f.name);
    return out;
}

std::vector<std::string> isa_supported() { return names_that_run(all_units()); }
std::vector<std::string> isa_emulated() { return names_that_run(emulated_units()); }

const Kernels& select_kernels() {
    const auto here = isa_supported(), flags = cpu_flags();
    const char* forced = std::getenv("KTCORE_ISA");
    const std::string want = forced && *forced ? forced : here.back();
    const std::string it_has = "it has: " + joined(here);
    std::vector<std::string> known;
    auto units = all_units();
    for (const Unit& u : emulated_units()) units.push_back(u);
    for (const Unit& u : units) {
        known.emplace_back(u.name);
        if (want != u.name) continue;
        if (runs(u, flags)) return u.kernels();
        std::vector<std::string> missing;
        for (const char* f : u.needs)
            if (!has(flags, f)) missing.emplace_back(f);
        throw std::invalid_argument("KTCORE_ISA=" + want + " is not supported by this CPU, which lacks " + joined(missing) +
                                    "; " + it_has);
    }
    throw std::invalid_argument("KTCORE_ISA=" + want + " is not known (known: " + joined(known) + "); for this CPU, " + it_has);
}

}  // namespace ktcore

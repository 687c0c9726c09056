// Four dwords at a time, as every compiler's vector type gives them: what packing is done in, on any CPU.
#pragma once
#include <cstdint>
#include <cstring>

namespace ktcore {

using Quads = uint32_t __attribute__((vector_size(16)));
using Bytes = uint8_t __attribute__((vector_size(16)));

inline Quads load_quads(const uint8_t* p) {
    Quads v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store_quads(uint8_t* p, Quads v) { std::memcpy(p, &v, sizeof v); }

// Elements by their numbers: first a's, then b's.
template <int... I, class Vector>
Vector choose(Vector a, Vector b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, Vector{I...});
#endif
}

// Four vectors become their columns.
inline void transpose(Quads* v) {
    const Quads a = choose<0, 4, 1, 5>(v[0], v[1]), b = choose<0, 4, 1, 5>(v[2], v[3]);
    const Quads c = choose<2, 6, 3, 7>(v[0], v[1]), d = choose<2, 6, 3, 7>(v[2], v[3]);
    v[0] = choose<0, 1, 4, 5>(a, b), v[1] = choose<2, 3, 6, 7>(a, b);
    v[2] = choose<0, 1, 4, 5>(c, d), v[3] = choose<2, 3, 6, 7>(c, d);
}

}  // namespace ktcore

// Scalar half and bfloat16 conversions (IEEE 754, subnormals kept, round to nearest even).
#pragma once
#include <cstdint>
#include <cstring>

namespace ktcore {

// static: every unit keeps its own copy, so that none built for a wider instruction set is shared.
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        const float f = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t float_to_half(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
    if (mag >= 0x7f800000) return static_cast<uint16_t>(sign | 0x7c00 | (mag > 0x7f800000 ? 0x200 | (mag >> 13 & 0x3ff) : 0));
    if (mag >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (mag < 0x38800000) {
        // Subnormal: adding 0.5 puts the rounded multiple of 2^-24 into the mantissa's low bits.
        float m;
        std::memcpy(&m, &mag, 4);
        m += 0.5f;
        uint32_t b;
        std::memcpy(&b, &m, 4);
        return static_cast<uint16_t>(sign | (b - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((mag - (112u << 23) + 0xfff + (mag >> 13 & 1)) >> 13));
}

static inline float bf16_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// To nearest even; subnormal numbers become zero, as the CPUs' own conversion takes them.
static inline uint16_t float_to_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t mag = u & 0x7fffffff;
    if (mag > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
    if (mag < 0x00800000) return static_cast<uint16_t>(u >> 16 & 0x8000);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// OCP FP8 E4M3: bias 7, subnormals in steps of 2^-9, 0x7f and 0xff are NaN.
static inline float e4m3_to_float(uint8_t b) {
    const uint32_t sign = static_cast<uint32_t>(b & 0x80) << 24, rest = b & 0x7f;
    uint32_t bits;
    if (rest == 0x7f) {
        bits = sign | 0x7fc00000;
    } else if (rest >= 8) {
        bits = sign | ((rest << 20) + (120u << 23));
    } else {
        const float f = static_cast<float>(rest) * 0.001953125f;
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

}  // namespace ktcore

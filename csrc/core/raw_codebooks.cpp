// Codebook formats (IQ1 to IQ3, TQ1_0) in plain C++: a block becomes int8 codes and a scale per 16 values; and TQ1_0's
// panels. Layouts: ggml-common.h of ggml; values as gguf-py dequantises them, to the last bit.
#include <cstring>

#include "core/f16.h"
#include "core/grids.h"
#include "core/iq_grids.h"
#include "core/load.h"
#include "core/quads.h"
#include "core/raw_blocks.h"

namespace ktcore {
namespace {

float half(const uint8_t* p) { return half_to_float(load<uint16_t>(p)); }

// Eight levels of two bits, or four of three, to bytes.
void point8(uint16_t packed, const int8_t* level, int8_t* out) {
    for (int i = 0; i < 8; i++) out[i] = level[packed >> (2 * i) & 3];
}
void point4(uint16_t packed, const int8_t* level, int8_t* out) {
    for (int i = 0; i < 4; i++) out[i] = level[packed >> (3 * i) & 7];
}
void negate(int8_t* codes, int count, unsigned signs) {
    for (int i = 0; i < count; i++)
        if (signs >> i & 1) codes[i] = static_cast<int8_t>(-codes[i]);
}
// Seven stored signs; the eighth makes their number even.
unsigned even_signs(unsigned seven) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 1) << 7;
}

constexpr int8_t kLevels1[4] = {-8, 0, 8, 0};  // eighths, so that +-1/8 is an integer

void iq2_xxs(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    for (int g = 0; g < 8; g++, c += 32) {
        const uint8_t* q = b + 2 + g * 8;
        const uint32_t rest = load<uint32_t>(q + 4);
        scale[2 * g] = scale[2 * g + 1] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.25f;
        for (int i = 0; i < 4; i++) {
            point8(kGrid2xxs[q[i]], kLevels2, c + i * 8);
            negate(c + i * 8, 8, even_signs(rest >> (7 * i) & 127));
        }
    }
}

void iq2_xs(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    for (int g = 0; g < 16; g++, c += 16) {
        const int s = b[66 + g / 2] >> (4 * (g & 1)) & 15;
        scale[g] = d * (0.5f + static_cast<float>(s)) * 0.25f;
        for (int i = 0; i < 2; i++) {
            const uint16_t q = load<uint16_t>(b + 2 + (g * 2 + i) * 2);
            point8(kGrid2xs[q & 511], kLevels2, c + i * 8);
            negate(c + i * 8, 8, even_signs(q >> 9));
        }
    }
}

void iq2_s(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    const uint8_t *low = b + 2, *signs = b + 34, *high = b + 66, *scales = b + 74;
    for (int g = 0; g < 16; g++) scale[g] = d * (0.5f + static_cast<float>(scales[g / 2] >> (4 * (g & 1)) & 15)) * 0.25f;
    for (int i = 0; i < 32; i++, c += 8) {
        point8(kGrid2s[low[i] | (high[i / 4] >> (2 * (i & 3)) & 3) << 8], kLevels2, c);
        negate(c, 8, signs[i]);
    }
}

void iq3_xxs(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    for (int g = 0; g < 8; g++, c += 32) {
        const uint32_t rest = load<uint32_t>(b + 66 + g * 4);
        scale[2 * g] = scale[2 * g + 1] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.5f;
        for (int i = 0; i < 8; i++) point4(kGrid3xxs[b[2 + g * 8 + i]], kLevels3xxs, c + i * 4);
        for (int i = 0; i < 4; i++) negate(c + i * 8, 8, even_signs(rest >> (7 * i) & 127));
    }
}

void iq3_s(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    const uint8_t *low = b + 2, *high = b + 66, *signs = b + 74, *scales = b + 106;
    for (int g = 0; g < 8; g++)
        scale[2 * g] = scale[2 * g + 1] = d * static_cast<float>(1 + 2 * (scales[g / 2] >> (4 * (g & 1)) & 15));
    for (int i = 0; i < 64; i++) point4(kGrid3s[low[i] | (high[i / 8] >> (i & 7) & 1) << 8], kLevels3s, c + i * 4);
    for (int i = 0; i < 32; i++) negate(c + i * 8, 8, signs[i]);
}

void add(int8_t* c, int count, int delta) {
    for (int i = 0; i < count; i++) c[i] = static_cast<int8_t>(c[i] + delta);
}

void iq1_s(const uint8_t* b, int8_t* c, float* scale) {
    const float d = half(b);
    for (int g = 0; g < 8; g++, c += 32) {
        const uint16_t high = load<uint16_t>(b + 34 + g * 2);
        scale[2 * g] = scale[2 * g + 1] = d * static_cast<float>(2 * (high >> 12 & 7) + 1) * 0.125f;
        for (int i = 0; i < 4; i++)
            point8(kGrid1[b[2 + g * 4 + i] | (high >> (3 * i) & 7) << 8], kLevels1, c + i * 8);
        add(c, 32, high & 0x8000 ? -1 : 1);
    }
}

void iq1_m(const uint8_t* b, int8_t* c, float* scale) {
    const uint8_t *low = b, *high = b + 32, *scales = b + 48;
    uint16_t sc[4];
    std::memcpy(sc, scales, 8);
    const float d = half_to_float(
        static_cast<uint16_t>(sc[0] >> 12 | (sc[1] >> 8 & 0xf0) | (sc[2] >> 4 & 0xf00) | (sc[3] & 0xf000)));
    for (int g = 0; g < 16; g++) scale[g] = d * static_cast<float>(2 * (sc[g / 4] >> (3 * (g & 3)) & 7) + 1) * 0.125f;
    for (int i = 0; i < 32; i++, c += 8) {
        const int h = high[i / 2] >> (4 * (i & 1));
        point8(kGrid1[low[i] | (h & 7) << 8], kLevels1, c);
        add(c, 8, h & 8 ? -1 : 1);
    }
}

// Base-3 digits of 16 bytes, the highest first: the top of three times a byte is the digit, the rest what is left.
void trits(Bytes left, int digits, int stride, int8_t* c) {
    for (int n = 0; n < digits; n++, c += stride) {
        const Bytes digit = reinterpret_cast<Bytes>(-(left > 85) - (left > 170) - 1);
        std::memcpy(c, &digit, stride < 16 ? 4 : 16);
        left = left + left + left;
    }
}

void trits_of(const uint8_t* b, int8_t* c) {
    for (int i = 0; i < 32; i += 16) trits(load<Bytes>(b + i), 5, 32, c + i);
    trits(load<Bytes>(b + 32), 5, 16, c + 160);
    Bytes four{};
    std::memcpy(&four, b + 48, 4);
    trits(four, 4, 4, c + 240);
}

void tq1_0(const uint8_t* b, int8_t* c, float* scale) {
    trits_of(b, c);
    for (int g = 0; g < 16; g++) scale[g] = half(b + 52);
}

// The byte of five digits, by their number.
struct Fives {
    uint8_t byte[243];
};
constexpr Fives make_fives() {
    Fives out{};
    for (int v = 0; v < 243; v++) out.byte[v] = static_cast<uint8_t>((v * 256 + 242) / 243);
    return out;
}
constexpr Fives kFives = make_fives();

// d of IQ1_M lies in the top nibbles of its scales.
uint16_t half_of_iq1_m(const uint8_t* scales) {
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= static_cast<unsigned>(scales[1 + 2 * i] >> 4) << (4 * i);
    return static_cast<uint16_t>(d);
}

// Nibble number s of a block's scales.
unsigned scale_nibble(Format f, const uint8_t* b, int s) {
    switch (f) {
        case Format::IQ1_S: return load<uint16_t>(b + 34 + s * 2) >> 12;
        case Format::IQ1_M: return load<uint16_t>(b + 48 + s / 4 * 2) >> (3 * (s & 3)) & 7u;
        case Format::IQ2_XXS: return b[2 + s * 8 + 7] >> 4;
        case Format::IQ3_XXS: return b[66 + s * 4 + 3] >> 4;
        default: {
            const int at = f == Format::IQ2_XS ? 66 : f == Format::IQ2_S ? 74 : 106;
            return b[at + s / 2] >> (4 * (s & 1)) & 15u;
        }
    }
}

// Codes of values, a level and a sign above it.
template <class Code>
void codes_of(const int8_t* values, uint8_t* codes, Code code) {
    for (int k = 0; k < 256; k++) codes[k] = static_cast<uint8_t>(code(values[k]));
}

}  // namespace

uint16_t raw_points(Format f, const uint8_t* b, uint8_t* codes, uint8_t* scales) {
    int8_t values[256];
    float unused[16];
    raw_int8(f, b, values, unused);
    const auto magnitude = [](int v) { return v < 0 ? -v : v; };
    switch (f) {  // IQ1's values are 8 (level - 1) +- 1
        case Format::IQ1_S: codes_of(values, codes, [](int v) { return (v + 9) >> 3; }); break;
        case Format::IQ1_M: codes_of(values, codes, [](int v) { return (v + 9) >> 3 | (v & 2) << 1; }); break;
        case Format::IQ3_XXS: codes_of(values, codes, [=](int v) { return magnitude(v) >> 3 | (v < 0) << 3; }); break;
        case Format::IQ3_S: codes_of(values, codes, [=](int v) { return magnitude(v) >> 1 | (v < 0) << 3; }); break;
        default: codes_of(values, codes, [=](int v) { return magnitude(v) >> 4 | (v < 0) << 2; });  // 8, 25, 43
    }
    const int half = 128 / info(f).group;
    for (int s = 0; s < half; s++)
        scales[s] = static_cast<uint8_t>(scale_nibble(f, b, s) | scale_nibble(f, b, s + half) << 4);
    return f == Format::IQ1_M ? half_of_iq1_m(b + 48) : load<uint16_t>(b);
}

void ternary_pack(const RawRows& rows, uint8_t* out) {
    for (int r = 0; r < rows.count; r++) {
        int8_t c[256];
        trits_of(rows[r], c);
        std::memcpy(out + r * 2, rows[r] + 52, 2);
        uint8_t* to = out + 64 + r / kHalfRows * 64 + r % kHalfRows * 4;
        for (int n = 0; n < 3; n++) {
            Bytes value{};
            for (int f = 0; f < 5; f++)
                value = value + value + value + load<Bytes>(reinterpret_cast<uint8_t*>(c) + n * 80 + f * 16) + 1;
            uint8_t v[16];
            std::memcpy(v, &value, 16);
            for (int k = 0; k < 16; k += 4) {
                const uint8_t four[4] = {kFives.byte[v[k]], kFives.byte[v[k + 1]], kFives.byte[v[k + 2]], kFives.byte[v[k + 3]]};
                std::memcpy(to + n * 512 + k / 4 * 128, four, 4);
            }
        }
        uint8_t last[4] = {};
        for (int q = 0; q < 4; q++)
            for (int k = 0; k < 4; k++) last[k] |= static_cast<uint8_t>((c[240 + q * 4 + k] + 1) << (2 * q));
        std::memcpy(to + 1536, last, 4);
    }
}

void raw_int8(Format f, const uint8_t* block, int8_t* codes, float* scale) {
    switch (f) {
        case Format::IQ1_S: return iq1_s(block, codes, scale);
        case Format::IQ1_M: return iq1_m(block, codes, scale);
        case Format::IQ2_XXS: return iq2_xxs(block, codes, scale);
        case Format::IQ2_XS: return iq2_xs(block, codes, scale);
        case Format::IQ2_S: return iq2_s(block, codes, scale);
        case Format::IQ3_XXS: return iq3_xxs(block, codes, scale);
        case Format::IQ3_S: return iq3_s(block, codes, scale);
        default: return tq1_0(block, codes, scale);
    }
}

}  // namespace ktcore

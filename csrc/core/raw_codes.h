// How GGUF blocks (and groups) of affine and table formats are read: codes and scales, the format a constant where these
// are inlined. Layouts: ggml-common.h of ggml.
#pragma once
#include "core/load.h"
#include "core/quads.h"
#include "core/types.h"

namespace ktcore {

// Where the pieces of a block lie.
struct Parts {
    int d, m, scales, scale_bytes, low, high, high2;
};
constexpr Parts kParts[] = {
    {0, -1, -1, 0, 2, -1, -1},    {0, 2, -1, 0, 4, -1, -1},      {0, -1, -1, 0, 6, 2, -1}, {0, 2, -1, 0, 8, 4, -1},
    {0, -1, -1, 0, 2, -1, -1},    {80, 82, 0, 16, 16, -1, -1},   {108, -1, 96, 12, 32, 0, -1},
    {0, 2, 4, 12, 16, -1, -1},    {0, 2, 4, 12, 48, 16, -1},     {208, -1, 192, 16, 0, 128, -1},
    {0, -1, -1, 0, 2, -1, -1},    {0, -1, -1, 8, 8, -1, -1},     {0, -1, -1, 0, 1, -1, -1},
};
constexpr Parts kTernary = {64, -1, -1, 0, 0, -1, -1}, kShort = {0, -1, -1, 0, 2, -1, -1};  // TQ2_0; the rest, where used
constexpr const Parts& parts(Format f) {
    if (f == Format::TQ2_0) return kTernary;
    return f > Format::MXFP4 ? kShort : kParts[static_cast<int>(f)];
}
constexpr int kGroupCodes = 4;  // INT4 and INT8 blocks: u16 scale, u16 zero point, codes

// Codes are made sixteen or eight at a time, in the bytes of vectors or words.
constexpr uint32_t kBytes = 0x01010101, kNibbles = kBytes * 15, kPairs = kBytes * 3;

// Bit i of the lowest four to byte i, as 0 or 1; of a word or of every word of a vector.
template <class Words>
Words spread_bits(Words bits) {
    return (bits | bits << 7 | bits << 14 | bits << 21) & kBytes;
}

// Low nibbles of `bytes` to c, high ones `bytes` after them.
[[gnu::always_inline]] inline void split_nibbles(const uint8_t* from, int bytes, uint8_t* c) {
    for (int i = 0; i < bytes; i += 16) {
        const Quads w = load_quads(from + i);
        store_quads(c + i, w & kNibbles);
        store_quads(c + bytes + i, w >> 4 & kNibbles);
    }
}
// Bit g of each of 32 bytes, at `shift`, into the codes of group g.
[[gnu::always_inline]] inline void add_bits(const uint8_t* bits, int shift, uint8_t* c) {
    for (int i = 0; i < 32; i += 16) {
        const Quads w = load_quads(bits + i);
        for (int g = 0; g < 8; g++) store_quads(c + g * 32 + i, load_quads(c + g * 32 + i) | (w >> g & kBytes) << shift);
    }
}

[[gnu::always_inline]] inline void codes_32(Format f, const uint8_t* b, uint8_t* c) {
    const Parts& p = parts(f);
    const uint8_t* low = b + p.low;
    if (f == Format::Q8_0) {
        for (int i = 0; i < 32; i += 16) store_quads(c + i, load_quads(low + i) ^ kBytes * 0x80);
        return;
    }
    split_nibbles(low, 16, c);
    if (p.high < 0) return;
    const uint32_t high = load<uint32_t>(b + p.high);
    for (int q = 0; q < 8; q++) {
        const uint32_t with = load<uint32_t>(c + q * 4) | spread_bits(high >> (4 * q) & 15) << 4;
        std::memcpy(c + q * 4, &with, 4);
    }
}

[[gnu::always_inline]] inline void codes_256(Format f, const uint8_t* b, uint8_t* c) {
    const Parts& p = parts(f);
    const uint8_t *low = b + p.low, *high = b + p.high;
    switch (f) {
        case Format::Q2_K:
        case Format::Q3_K:
        case Format::TQ2_0:
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 32; i += 16) {
                    const Quads w = load_quads(low + n * 32 + i);
                    for (int s = 0; s < 4; s++) store_quads(c + n * 128 + s * 32 + i, w >> (2 * s) & kPairs);
                }
            if (f == Format::Q3_K) add_bits(high, 2, c);
            return;
        case Format::IQ4_XS:
            for (int g = 0; g < 8; g++) split_nibbles(low + g * 16, 16, c + g * 32);
            return;
        case Format::Q4_K:
        case Format::Q5_K:
            for (int n = 0; n < 4; n++) split_nibbles(low + n * 32, 32, c + n * 64);
            if (f == Format::Q5_K) add_bits(high, 4, c);
            return;
        default:  // Q6_K
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 32; i += 16) {
                    const Quads h = load_quads(high + n * 32 + i);
                    const Quads w[2] = {load_quads(low + n * 64 + i), load_quads(low + n * 64 + 32 + i)};
                    for (int s = 0; s < 4; s++)
                        store_quads(c + n * 128 + s * 32 + i,
                                    (w[s & 1] >> (s / 2 * 4) & kNibbles) | (h >> (2 * s) & kPairs) << 4);
                }
    }
}

// Codes of a block of INT4 or INT8: two neighbouring values a byte, the first in the low nibble, or one.
[[gnu::always_inline]] inline void codes_group(const FormatInfo& t, const uint8_t* b, uint8_t* c) {
    b += kGroupCodes;
    if (t.bits == 8) {
        std::memcpy(c, b, static_cast<size_t>(t.block));
        return;
    }
    for (int i = 0; i < t.block; i += 32, b += 16) {
        const Quads w = load_quads(b);
        const Bytes low = reinterpret_cast<Bytes>(w & kNibbles), high = reinterpret_cast<Bytes>(w >> 4 & kNibbles);
        const Bytes codes[2] = {choose<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(low, high),
                                choose<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(low, high)};
        std::memcpy(c + i, codes, 32);
    }
}

// Neighbouring 2-bit codes, four a byte (Q2_0), or bits as 0 and 2 (Q1_0), the lowest first.
[[gnu::always_inline]] inline void codes_low_bits(Format f, const uint8_t* b, uint8_t* c) {
    b += kShort.low;
    for (int i = 0; i < info(f).block / 4; i++, c += 4) {
        const uint32_t w = f == Format::Q1_0 ? b[i / 2] >> (4 * (i & 1)) & 15u : b[i];
        const uint32_t four = f == Format::Q1_0 ? spread_bits(w) << 1 : (w | w << 6 | w << 12 | w << 18) & kPairs;
        std::memcpy(c, &four, 4);
    }
}

// NVFP4_G128: a float that multiplies two blocks of NVFP4.
constexpr int kFactorBytes = 4, kNvfp4Bytes = 36;

// NVFP4: nibbles of 16 values in 8 bytes, the first eight in the low ones.
[[gnu::always_inline]] inline void codes_nvfp4(const uint8_t* b, uint8_t* c) {
    for (int g = 0; g < 4; g += 2) {
        const Quads w = load_quads(b + 4 + g * 8), low = w & kNibbles, high = w >> 4 & kNibbles;
        store_quads(c + g * 16, choose<0, 1, 4, 5>(low, high));
        store_quads(c + g * 16 + 16, choose<2, 3, 6, 7>(low, high));
    }
}

// A scale of NVFP4, which says NaN where there is nothing: the code of 0 then.
inline uint8_t ue4m3(uint8_t code) { return code == 0x7f ? 0 : code & 0x7f; }
// Half of 2^(e - 127), the scale of MXFP4's doubled values, as the upper bits of a float.
inline uint16_t e8m0_half(uint8_t e) { return static_cast<uint16_t>(e < 2 ? 0x20 << e : (e - 1) << 7); }

// The eight 6-bit scales of an IQ4_XS block, less 32.
inline void scales_iq4_xs(const uint8_t* b, int8_t* out) {
    const uint16_t high = load<uint16_t>(b + 2);
    for (int i = 0; i < 8; i++)
        out[i] = static_cast<int8_t>(((b[4 + i / 2] >> (4 * (i & 1)) & 15) | (high >> (2 * i) & 3) << 4) - 32);
}

// The sixteen 6-bit scales of a Q3_K block, less 32: four words of four bytes, of which the lower six bits count.
inline void words_q3_k(const uint8_t* s, uint32_t* out) {
    const uint32_t low[2] = {load<uint32_t>(s), load<uint32_t>(s + 4)}, high = load<uint32_t>(s + 8);
    for (int i = 0; i < 4; i++)
        out[i] = ((low[i % 2] >> (i / 2 * 4) & kNibbles) | (high >> (2 * i) & kPairs) << 4) ^ kBytes * 32;
}
// All as a packed header has them (kernels/unpack.h), where two planes of bytes are a vector: what is left of bytes 0, 2
// and 4 is scale 12, of 1, 3 and 5 scale 13, and so on.
inline void scales_q3_k(const uint8_t* s, uint8_t* out) {
    uint32_t w[4];
    words_q3_k(s, w);
    const uint32_t top = w[3] >> 4 & kPairs, middle = w[3] >> 2 & kPairs, bottom = w[3] & kPairs;
    const uint32_t rest[3] = {(top & 0xffff) | middle << 16, (bottom & 0xffff) | (top & 0xffff0000), middle >> 16 | (bottom & 0xffff0000)};
    for (int i = 0; i < 3; i++) {
        const uint32_t four = w[i] << 2 | rest[i];
        std::memcpy(out + i * 4, &four, 4);
    }
}

// Unsigned codes (offset included) of one block; of a table format, the indices.
[[gnu::always_inline]] inline void read_codes(Format f, const uint8_t* block, uint8_t* codes) {
    const FormatInfo& t = info(f);
    if (t.zero_point) return codes_group(t, block, codes);
    if (f == Format::NVFP4) return codes_nvfp4(block, codes);
    if (f == Format::NVFP4_G128) {
        codes_nvfp4(block + kFactorBytes, codes);
        return codes_nvfp4(block + kFactorBytes + kNvfp4Bytes, codes + 64);
    }
    if (f == Format::Q1_0 || f == Format::Q2_0) return codes_low_bits(f, block, codes);
    t.block == 32 ? codes_32(f, block, codes) : codes_256(f, block, codes);
}

}  // namespace ktcore

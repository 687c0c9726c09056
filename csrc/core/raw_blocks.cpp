// GGUF block formats in plain C++. Layouts: ggml-common.h of ggml; values as gguf-py dequantises them.
#include "core/raw_blocks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/f16.h"
#include "core/grids.h"

namespace ktcore {
namespace {

uint16_t u16(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return v;
}

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
const Parts& parts(Format f) {
    if (f == Format::TQ2_0) return kTernary;
    return f > Format::MXFP4 ? kShort : kParts[static_cast<int>(f)];
}
constexpr int kGroupCodes = 4;  // INT4 and INT8 blocks: u16 scale, u16 zero point, codes

// Codes are made eight at a time, in the bytes of a word.
constexpr uint64_t kBytes = 0x0101010101010101, kNibbles = kBytes * 15, kPairs = kBytes * 3;
uint64_t u64(const uint8_t* p) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    return v;
}
void put(uint8_t* c, uint64_t v) { std::memcpy(c, &v, 8); }
// Bit i of a byte to byte i, as 0 or 1.
uint64_t spread_bits(uint8_t bits) {
    return (((bits * kBytes & 0x8040201008040201) + 0x7f * kBytes) >> 7) & kBytes;
}

// Low nibbles of `bytes` to c, high ones `bytes` after them.
void split_nibbles(const uint8_t* from, int bytes, uint8_t* c) {
    for (int i = 0; i < bytes; i += 8) {
        const uint64_t w = u64(from + i);
        put(c + i, w & kNibbles);
        put(c + bytes + i, w >> 4 & kNibbles);
    }
}

// Bit g of each of 32 bytes, at `shift`, into the codes of group g.
void add_bits(const uint8_t* bits, int shift, uint8_t* c) {
    for (int i = 0; i < 32; i += 8) {
        const uint64_t w = u64(bits + i);
        for (int g = 0; g < 8; g++) put(c + g * 32 + i, u64(c + g * 32 + i) | (w >> g & kBytes) << shift);
    }
}

void codes_32(Format f, const uint8_t* b, uint8_t* c) {
    const Parts& p = parts(f);
    const uint8_t* low = b + p.low;
    if (f == Format::Q8_0) {
        for (int i = 0; i < 32; i += 8) put(c + i, u64(low + i) ^ kBytes * 0x80);
        return;
    }
    split_nibbles(low, 16, c);
    if (p.high < 0) return;
    for (int i = 0; i < 4; i++) put(c + i * 8, u64(c + i * 8) | spread_bits(b[p.high + i]) << 4);
}

void codes_256(Format f, const uint8_t* b, uint8_t* c) {
    const Parts& p = parts(f);
    const uint8_t *low = b + p.low, *high = b + p.high;
    switch (f) {
        case Format::Q2_K:
        case Format::Q3_K:
        case Format::TQ2_0:
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 32; i += 8) {
                    const uint64_t w = u64(low + n * 32 + i);
                    for (int s = 0; s < 4; s++) put(c + n * 128 + s * 32 + i, w >> (2 * s) & kPairs);
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
                for (int i = 0; i < 32; i += 8) {
                    const uint64_t h = u64(high + n * 32 + i), w[2] = {u64(low + n * 64 + i), u64(low + n * 64 + 32 + i)};
                    for (int s = 0; s < 4; s++)
                        put(c + n * 128 + s * 32 + i, (w[s & 1] >> (s / 2 * 4) & kNibbles) | (h >> (2 * s) & kPairs) << 4);
                }
    }
}

// Codes of a block of INT4 or INT8: two neighbouring values a byte, the first in the low nibble, or one.
void codes_group(const FormatInfo& t, const uint8_t* b, uint8_t* c) {
    b += kGroupCodes;
    if (t.bits == 8) {
        std::memcpy(c, b, static_cast<size_t>(t.block));
        return;
    }
    for (int i = 0; i < t.block; i += 8, b += 4) {
        uint32_t four;
        std::memcpy(&four, b, 4);
        uint64_t w = four;
        w = (w | w << 16) & 0x0000ffff0000ffff;
        w = (w | w << 8) & 0x00ff00ff00ff00ff;
        put(c + i, (w & kNibbles) | (w << 4 & kNibbles << 8));
    }
}

// Neighbouring 2-bit codes, four a byte (Q2_0), or bits as 0 and 2 (Q1_0), the lowest first.
void codes_low_bits(Format f, const uint8_t* b, uint8_t* c) {
    b += kShort.low;
    for (int i = 0; i < 16; i++) {
        if (f == Format::Q1_0) {
            put(c + i * 8, spread_bits(b[i]) << 1);
            continue;
        }
        for (int k = 0; k < 4; k++) c[i * 4 + k] = b[i] >> (2 * k) & 3;
    }
}

// NVFP4: nibbles of 16 values in 8 bytes, the first eight in the low ones.
void codes_nvfp4(const uint8_t* b, uint8_t* c) {
    for (int g = 0; g < 4; g++) split_nibbles(b + 4 + g * 8, 8, c + g * 16);
}

// A scale of NVFP4, which says NaN where there is nothing: the code of 0 then.
uint8_t ue4m3(uint8_t code) { return code == 0x7f ? 0 : code & 0x7f; }
// Half of it, since the table's values are doubled.
float ue4m3_half(uint8_t code) {
    const uint32_t bits = static_cast<uint32_t>(ue4m3(code)) << 20;  // as a float 2^-120 of it, subnormals included
    float out;
    std::memcpy(&out, &bits, 4);
    return out * 0x1p119f;
}

// Half of 2^(e - 127), the scale of MXFP4's doubled values, as the upper bits of a float.
uint16_t e8m0_half(uint8_t e) { return static_cast<uint16_t>(e < 2 ? 0x20 << e : (e - 1) << 7); }

// The eight 6-bit scales of an IQ4_XS block, less 32.
void scales_iq4_xs(const uint8_t* b, int8_t* out) {
    const uint16_t high = u16(b + 2);
    for (int i = 0; i < 8; i++)
        out[i] = static_cast<int8_t>(((b[4 + i / 2] >> (4 * (i & 1)) & 15) | (high >> (2 * i) & 3) << 4) - 32);
}

// Scale and min (signed as it is added) of every group of a block.
void scales(Format f, const uint8_t* b, float* d, float* m) {
    const Parts& p = parts(f);
    const float d0 = half_to_float(u16(b + p.d)), m0 = p.m < 0 ? 0.f : half_to_float(u16(b + p.m));
    const uint8_t* s = b + p.scales;
    switch (f) {
        case Format::Q2_K:
            for (int i = 0; i < 16; i++) {
                d[i] = d0 * static_cast<float>(s[i] & 15);
                m[i] = -(m0 * static_cast<float>(s[i] >> 4));
            }
            return;
        case Format::Q3_K:
            for (int i = 0; i < 16; i++) {
                const int lo = s[i & 7] >> (i < 8 ? 0 : 4) & 15, hi = s[8 + (i & 3)] >> (2 * (i >> 2)) & 3;
                d[i] = d0 * static_cast<float>((lo | hi << 4) - 32);
            }
            return;
        case Format::Q4_K:
        case Format::Q5_K:
            for (int i = 0; i < 8; i++) {
                const int sc = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
                const int mn = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4;
                d[i] = d0 * static_cast<float>(sc);
                m[i] = -(m0 * static_cast<float>(mn));
            }
            return;
        case Format::Q6_K:
            for (int i = 0; i < 16; i++) d[i] = d0 * static_cast<float>(static_cast<int8_t>(s[i]));
            return;
        case Format::IQ4_XS: {
            int8_t sc[8];
            scales_iq4_xs(b, sc);
            for (int i = 0; i < 8; i++) d[i] = d0 * static_cast<float>(sc[i]);
            return;
        }
        case Format::NVFP4:
            for (int i = 0; i < 4; i++) d[i] = ue4m3_half(b[i]);
            return;
        case Format::TQ2_0:
        case Format::Q1_0:
        case Format::Q2_0:
            std::fill(d, d + info(f).block / info(f).group, d0);
            return;
        case Format::MXFP4:
            d[0] = bf16_to_float(e8m0_half(b[0]));
            return;
        default:
            d[0] = d0;
            m[0] = m0;
    }
}

void dequantize_group(const FormatInfo& t, const uint8_t* b, float* out) {
    uint8_t codes[128];
    codes_group(t, b, codes);
    const uint16_t zero = u16(b + 2);
    const float d = zero & kScaleIsBf16 ? bf16_to_float(u16(b)) : half_to_float(u16(b));
    const int z = zero & ~kScaleIsBf16;
    for (int k = 0; k < t.block; k++) out[k] = static_cast<float>(codes[k] - z) * d;
}

void dequantize_codebook(Format f, const uint8_t* b, float* out) {
    int8_t codes[256];
    float d[16];
    raw_int8(f, b, codes, d);
    for (int k = 0; k < info(f).block; k++) out[k] = static_cast<float>(codes[k]) * d[k / 16];
}

void dequantize_float(Format f, const uint8_t* row, int cols, float* out) {
    switch (f) {
        case Format::F32:
            std::memcpy(out, row, static_cast<size_t>(cols) * 4);
            return;
        case Format::F16:
            for (int i = 0; i < cols; i++) out[i] = half_to_float(u16(row + 2 * i));
            return;
        case Format::BF16:
            for (int i = 0; i < cols; i++) out[i] = bf16_to_float(u16(row + 2 * i));
            return;
        default:
            for (int i = 0; i < cols; i += 128, row += 132) {
                float d;
                std::memcpy(&d, row, 4);
                for (int k = 0; k < 128; k++) out[i + k] = e4m3_to_float(row[4 + k]) * d;
            }
    }
}

// A dword holds four neighbouring k of one row, so each plane is shifts and ors of the group's eight quads.
template <int Bits>
void pack_codes(int groups, const uint8_t* codes, int row, uint8_t* out) {
    out += row / kHalfRows * 64 + row % kHalfRows * 4;
    for (int g = 0; g < groups; g++, codes += 32) {
        uint8_t* plane = out + g * 128 * Bits;
        const auto put = [&](int vector, uint32_t quad) { std::memcpy(plane + vector * 128, &quad, 4); };
        uint32_t c[8];
        std::memcpy(c, codes, 32);
        if (Bits == 8) {
            for (int q = 0; q < 8; q++) put(q, c[q]);
            continue;
        }
        if (Bits == 1)
            for (uint32_t& quad : c) quad = quad >> 1 & 0x01010101;
        if (Bits >= 4) {
            for (int q = 0; q < 4; q++) put(q, (c[q] & 0x0f0f0f0f) | (c[q + 4] & 0x0f0f0f0f) << 4);
            for (uint32_t& quad : c) quad = quad >> 4 & 0x0f0f0f0f;
            plane += 512;
        }
        if (Bits == 6 || Bits == 2 || Bits == 3) {
            for (int v = 0; v < 2; v++) {
                uint32_t quad = 0;
                for (int i = 0; i < 4; i++) quad |= (c[v * 4 + i] & 0x03030303) << (2 * i);
                put(v, quad);
            }
            for (uint32_t& quad : c) quad = quad >> 2 & 0x3f3f3f3f;
            plane += 256;
        }
        if (Bits % 2 == 1) {
            uint32_t quad = 0;
            for (int q = 0; q < 8; q++) quad |= (c[q] & 0x01010101) << q;
            put(0, quad);
        }
    }
}

void pack_codes(const FormatInfo& t, const uint8_t* codes, int row, uint8_t* out) {
    const int groups = t.packed_k / 32;
    switch (t.bits) {
        case 1: return pack_codes<1>(groups, codes, row, out);
        case 2: return pack_codes<2>(groups, codes, row, out);
        case 3: return pack_codes<3>(groups, codes, row, out);
        case 4: return pack_codes<4>(groups, codes, row, out);
        case 5: return pack_codes<5>(groups, codes, row, out);
        case 6: return pack_codes<6>(groups, codes, row, out);
        default: return pack_codes<8>(groups, codes, row, out);
    }
}

// Units of `Bytes`, one row's from `from` on, into [units][32 rows].
template <size_t Bytes>
void interleave(const uint8_t* from, int units, size_t row, uint8_t* out) {
    out += row * Bytes;
    for (int i = 0; i < units; i++, from += Bytes, out += kPanelRows * Bytes) std::memcpy(out, from, Bytes);
}

// F16, F32: [k][32 rows]. BF16: pairs of neighbouring k, [k / 2][32 rows][2], as dot products take them. FP8: header of
// scales, then quads [k / 4][32 rows][4] in the order k, k + 2, k + 1, k + 3: even and odd bytes are pairs.
void pack_float(Format f, const uint8_t* const* rows, uint8_t* out) {
    for (int r = 0; r < kPanelRows; r++) {
        if (!rows[r]) continue;
        const size_t row = static_cast<size_t>(r);
        if (f == Format::F8_E4M3_G128) {
            std::memcpy(out + row * 4, rows[r], 4);
            uint8_t* to = out + info(f).header + row * 4;
            for (const uint8_t* c = rows[r] + 4; c < rows[r] + 132; c += 4, to += kPanelRows * 4)
                to[0] = c[0], to[1] = c[2], to[2] = c[1], to[3] = c[3];
            continue;
        }
        if (f == Format::F16)
            interleave<2>(rows[r], 32, row, out);
        else
            interleave<4>(rows[r], f == Format::BF16 ? 16 : 32, row, out);
    }
}

}  // namespace

void raw_codes(Format f, const uint8_t* block, uint8_t* codes) {
    const FormatInfo& t = info(f);
    if (t.zero_point) return codes_group(t, block, codes);
    if (f == Format::NVFP4) return codes_nvfp4(block, codes);
    if (f == Format::Q1_0 || f == Format::Q2_0) return codes_low_bits(f, block, codes);
    t.block == 32 ? codes_32(f, block, codes) : codes_256(f, block, codes);
}

void raw_header(Format f, const uint8_t* block, int row, uint8_t* header) {
    const int half = row / kHalfRows, lane = row % kHalfRows;
    uint8_t* plain = header + row * 2;  // of the 16-bit values, 32 rows side by side
    if (f == Format::MXFP4) {
        const uint16_t d = e8m0_half(block[0]);
        std::memcpy(plain, &d, 2);
        return;
    }
    if (f == Format::NVFP4) {
        for (int i = 0; i < 4; i++) header[half * 64 + lane * 4 + i] = ue4m3(block[i]);
        return;
    }
    if (info(f).zero_point) {
        std::memcpy(plain, block, 2);
        std::memcpy(plain + 64, block + 2, 2);
        return;
    }
    const Parts& p = parts(f);
    int8_t unpacked[8];
    const uint8_t* from = block + p.scales;
    if (f == Format::IQ4_XS) {
        scales_iq4_xs(block, unpacked);
        from = reinterpret_cast<const uint8_t*>(unpacked);
    }
    for (int z = 0; z < p.scale_bytes / 4; z++)
        std::memcpy(header + (z * 2 + half) * 64 + lane * 4, from + z * 4, 4);
    plain += p.scale_bytes * kPanelRows;
    std::memcpy(plain, block + p.d, 2);
    if (p.m >= 0) std::memcpy(plain + 64, block + p.m, 2);
}

void raw_dequantize(Format f, const uint8_t* row, int cols, float* out) {
    const FormatInfo& t = info(f);
    if (t.kind == Kind::Float) return dequantize_float(f, row, cols, out);
    const int offset = t.offset_shift < 0 ? 0 : 1 << t.offset_shift;
    for (int i = 0; i < cols; i += t.block, row += t.block_bytes) {
        if (t.kind == Kind::Codebook || t.kind == Kind::Grid) {
            dequantize_codebook(f, row, out + i);
            continue;
        }
        if (t.zero_point) {
            dequantize_group(t, row, out + i);
            continue;
        }
        uint8_t codes[256];
        float d[16], m[16];
        raw_codes(f, row, codes);
        scales(f, row, d, m);
        for (int k = 0; k < t.block; k++) {
            const int code = t.kind == Kind::Table ? kTables[t.table][codes[k]] : codes[k];
            const float v = static_cast<float>(code - offset) * d[k / t.group];
            out[i + k] = t.has_min ? v + m[k / t.group] : v;
        }
    }
}

void raw_pack(Format f, const uint8_t* const* rows, uint8_t* out) {
    const FormatInfo& t = info(f);
    if (t.kind == Kind::Float) return pack_float(f, rows, out);
    if (t.kind == Kind::Grid) return grid_pack(f, rows, out);
    for (int r = 0; r < kPanelRows; r++) {
        if (!rows[r]) continue;
        if (t.kind == Kind::Codebook) {
            std::memcpy(out + r * t.block_bytes, rows[r], static_cast<size_t>(t.block_bytes));
            continue;
        }
        uint8_t codes[256];
        raw_codes(f, rows[r], codes);
        raw_header(f, rows[r], r, out);
        pack_codes(t, codes, r, out + t.header);
    }
}

void raw_dequantize_rows(Format f, const uint8_t* raw, int64_t rows, int cols, const int64_t* ids, int64_t count, float* out) {
    const int64_t row_bytes = cols / info(f).block * info(f).block_bytes;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= rows)
            throw std::invalid_argument("row " + std::to_string(ids[i]) + " is not one of " + std::to_string(rows));
    for (int64_t i = 0; i < count; i++) raw_dequantize(f, raw + ids[i] * row_bytes, cols, out + i * cols);
}

}  // namespace ktcore

// GGUF block formats in plain C++. Layouts: ggml-common.h of ggml; values as gguf-py dequantises them.
#include "core/raw_blocks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/f16.h"
#include "core/raw_codes.h"

namespace ktcore {
namespace {

uint16_t u16(const uint8_t* p) { return load<uint16_t>(p); }

// Half of it, since the table's values are doubled.
float ue4m3_half(uint8_t code) {
    const uint32_t bits = static_cast<uint32_t>(ue4m3(code)) << 20;  // as a float 2^-120 of it, subnormals included
    float out;
    std::memcpy(&out, &bits, 4);
    return out * 0x1p119f;
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
        case Format::NVFP4_G128:
            for (int i = 0; i < 8; i++) d[i] = ue4m3_half(b[kFactorBytes + i / 4 * kNvfp4Bytes + i % 4]) * load<float>(b);
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
            for (int i = 0; i < cols; i += info(f).block, row += info(f).block_bytes) {
                float d;
                std::memcpy(&d, row, 4);
                for (int k = 0; k < info(f).block; k++) out[i + k] = e4m3_to_float(row[4 + k]) * d;
            }
    }
}

}  // namespace

void raw_dequantize(Format f, const uint8_t* row, int cols, float* out) {
    const FormatInfo& t = info(f);
    if (t.kind == Kind::Float) return dequantize_float(f, row, cols, out);
    const int offset = t.offset_shift < 0 ? 0 : 1 << t.offset_shift;
    for (int i = 0; i < cols; i += t.block, row += t.block_bytes) {
        if (t.kind == Kind::Ternary || t.kind == Kind::Grid || coded_points(f)) {
            dequantize_codebook(stored_format(f), row, out + i);
            continue;
        }
        if (t.zero_point) {
            dequantize_group(t, row, out + i);
            continue;
        }
        uint8_t codes[256];
        float d[16], m[16];
        read_codes(f, row, codes);
        scales(f, row, d, m);
        for (int k = 0; k < t.block; k++) {
            const int code = t.kind == Kind::Table ? kTables[t.table][codes[k]] : codes[k];
            const float v = static_cast<float>(code - offset) * d[k / t.group];
            out[i + k] = t.has_min ? v + m[k / t.group] : v;
        }
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

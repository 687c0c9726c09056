// Blocks of 32 rows made packed ones: four rows at a time, so that a dword of each is one vector.
#include <array>
#include <cstring>
#include <utility>

#include "core/grids.h"
#include "core/raw_blocks.h"
#include "core/raw_codes.h"

namespace ktcore {
namespace {

// Row `row`'s part (0..31) of a packed block's header but for the bytes of scales, which go to `scales`.
[[gnu::always_inline]] inline void pack_header(Format f, const uint8_t* block, int row, uint8_t* header, uint8_t* scales) {
    uint8_t* plain = header + row * 2;  // of the 16-bit values, 32 rows side by side
    if (f == Format::MXFP4) {
        const uint16_t d = e8m0_half(block[0]);
        std::memcpy(plain, &d, 2);
        return;
    }
    if (f == Format::NVFP4) {
        for (int i = 0; i < 4; i++) scales[i] = ue4m3(block[i]);
        return;
    }
    if (f == Format::NVFP4_G128) {
        std::memcpy(header + 8 * kPanelRows + row * 4, block, 4);
        for (int i = 0; i < 8; i++) scales[i] = ue4m3(block[kFactorBytes + i / 4 * kNvfp4Bytes + i % 4]);
        return;
    }
    if (info(f).zero_point) {
        std::memcpy(plain, block, 2);
        std::memcpy(plain + 64, block + 2, 2);
        return;
    }
    const Parts& p = parts(f);
    if (f == Format::IQ4_XS)
        scales_iq4_xs(block, reinterpret_cast<int8_t*>(scales));
    else if (f == Format::Q3_K)
        scales_q3_k(block + p.scales, scales);
    else if (p.scale_bytes > 0)
        std::memcpy(scales, block + p.scales, static_cast<size_t>(p.scale_bytes));
    plain += p.scale_bytes * kPanelRows;
    std::memcpy(plain, block + p.d, 2);
    if (p.m >= 0) std::memcpy(plain + 64, block + p.m, 2);
}

// Up to 16 bytes of four rows each to [byte][32 rows].
[[gnu::always_inline]] inline void pack_scales(const uint8_t (*scales)[16], int bytes, uint8_t* out) {
    Bytes v[4];
    std::memcpy(v, scales, 64);
    const Bytes low[2] = {choose<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(v[0], v[1]),
                          choose<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(v[2], v[3])};
    const Bytes high[2] = {choose<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(v[0], v[1]),
                           choose<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(v[2], v[3])};
    Bytes fours[4];
    for (int i = 0; i < 2; i++) {
        const Bytes a = i ? high[0] : low[0], b = i ? high[1] : low[1];
        fours[i * 2] = choose<0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23>(a, b);
        fours[i * 2 + 1] = choose<8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31>(a, b);
    }
    uint8_t flat[64];
    std::memcpy(flat, fours, 64);
    for (int z = 0; z < bytes; z++) std::memcpy(out + z * kPanelRows, flat + z * 4, 4);
}

// A dword holds four neighbouring k of one row, so each plane is shifts and ors of the group's eight quads. `codes` of four
// rows, `stride` apart; `out` is the first row's first dword.
template <int Bits>
[[gnu::always_inline]] inline void pack_codes(int groups, const uint8_t* codes, int stride, uint8_t* out) {
    for (int g = 0; g < groups; g++, codes += 32) {
        uint8_t* plane = out + g * 128 * Bits;
        const auto put = [&](int vector, Quads quad) { store_quads(plane + vector * 128, quad); };
        Quads c[8];
        for (int r = 0; r < 4; r++)
            c[r] = load_quads(codes + r * stride), c[4 + r] = load_quads(codes + r * stride + 16);
        transpose(c);
        transpose(c + 4);
        if (Bits == 8) {
            for (int q = 0; q < 8; q++) put(q, c[q]);
            continue;
        }
        if (Bits >= 4) {
            for (int q = 0; q < 4; q++) put(q, (c[q] & kNibbles) | (c[q + 4] & kNibbles) << 4);
            for (Quads& quad : c) quad = quad >> 4 & kNibbles;
            plane += 512;
        }
        if (Bits == 3) {
            for (int v = 0; v < 2; v++) put(v, c[v] | c[v + 3] << 3 | (c[v + 6] & kBytes * 6) << 5);
            put(2, c[2] | c[5] << 3 | (c[6] & kBytes) << 6 | (c[7] & kBytes) << 7);
            continue;
        }
        if (Bits == 6 || Bits == 2) {
            for (int v = 0; v < 2; v++) {
                Quads quad{};
                for (int i = 0; i < 4; i++) quad |= (c[v * 4 + i] & kPairs) << (2 * i);
                put(v, quad);
            }
            for (Quads& quad : c) quad = quad >> 2 & kBytes * 0x3f;
            plane += 256;
        }
        if (Bits % 2 == 1) {
            Quads quad{};
            for (int q = 0; q < 8; q++) quad |= (c[q] & kBytes) << q;
            put(0, quad);
        }
    }
}

// The plane of one bit of 32 codes, which lie side by side in a word of each row: bit 4 q + i to bit q of byte i.
Quads bit_plane(Quads words) {
    Quads out{};
    for (int q = 0; q < 8; q++) out |= spread_bits(words >> (4 * q) & 15) << q;
    return out;
}

// Bits that a file holds apart from what else codes have (`at`, of `groups` groups of 32 codes) as planes 128 bytes apart.
void pack_bits(const RawRows& rows, int r, int at, int groups, uint8_t* out) {
    for (int g = 0; g < groups; g++) {
        Quads words{};
        for (int i = 0; i < 4 && r + i < rows.count; i++) words[i] = load<uint32_t>(rows[r + i] + at + g * 4);
        store_quads(out + g * 128, bit_plane(words));
    }
}

template <Format F>
void pack_block(const RawRows& rows, uint8_t* out) {
    constexpr FormatInfo t = info(F);
    constexpr bool points = coded_points(F);
    constexpr int kScaleBytes = F == Format::NVFP4 ? 4 : F == Format::NVFP4_G128 ? 8 : points ? t.header / kPanelRows - 2 : parts(F).scale_bytes;
    constexpr bool fifth = F == Format::Q5_0 || F == Format::Q5_1;
    for (int r = 0; r < rows.count; r += 4) {
        alignas(16) uint8_t codes[4][t.packed_k];
        uint8_t* first = out + t.header + r / kHalfRows * 64 + r % kHalfRows * 4;
        alignas(16) uint8_t scales[4][16] = {};
        for (int i = 0; i < 4 && r + i < rows.count; i++) {
            if constexpr (points) {
                const uint16_t d = raw_points(stored_format(F), rows[r + i], codes[i], scales[i]);
                std::memcpy(out + t.header - 64 + (r + i) * 2, &d, 2);
            } else {
                pack_header(F, rows[r + i], r + i, out, scales[i]);
            }
        }
        if (kScaleBytes > 8) pack_scales(scales, kScaleBytes, out + r);
        if (kScaleBytes <= 8)
            for (int i = 0; i < 4; i++)
                for (int z = 0; z < kScaleBytes; z++) out[z * kPanelRows + r + i] = scales[i][z];
        if (F == Format::Q1_0) {
            pack_bits(rows, r, kShort.low, t.packed_k / 32, first);
            continue;
        }
        for (int i = 0; i < 4; i++) {
            if (r + i >= rows.count)
                std::memset(codes[i], 0, sizeof codes[i]);
            else if (points)
                continue;
            else if (fifth)
                split_nibbles(rows[r + i] + parts(F).low, 16, codes[i]);
            else
                read_codes(F, rows[r + i], codes[i]);
        }
        pack_codes<fifth ? 4 : t.bits>(t.packed_k / 32, codes[0], t.packed_k, first);
        if (fifth) pack_bits(rows, r, parts(F).high, 1, first + 4 * 128);
    }
}

// Units of `Bytes`, one row's from `from` on, into [units][32 rows].
template <size_t Bytes>
void interleave(const uint8_t* from, int units, size_t row, uint8_t* out) {
    out += row * Bytes;
    for (int i = 0; i < units; i++, from += Bytes, out += kPanelRows * Bytes) std::memcpy(out, from, Bytes);
}

// Dwords of whole fours of rows to [dwords][32 rows], as `of` makes them.
template <class Of>
int interleave_fours(const RawRows& rows, int skip, int dwords, uint8_t* out, Of of) {
    int r = 0;
    for (; r + 4 <= rows.count; r += 4)
        for (int i = 0; i < dwords; i += 4) {
            Quads v[4];
            for (int k = 0; k < 4; k++) v[k] = load_quads(rows[r + k] + skip + i * 4);
            transpose(v);
            for (int k = 0; k < 4; k++) store_quads(out + (i + k) * kPanelRows * 4 + r * 4, of(v[k]));
        }
    return r;
}

// F16, F32: [k][32 rows]. BF16: pairs of neighbouring k, [k / 2][32 rows][2], as dot products take them. FP8: header of
// scales, then quads [k / 4][32 rows][4] in the order k, k + 2, k + 1, k + 3: even and odd bytes are pairs.
void pack_float(Format f, const RawRows& rows, uint8_t* out) {
    if (is_fp8(f)) {
        const int dwords = info(f).packed_k / 4;
        for (int r = 0; r < rows.count; r++) std::memcpy(out + r * 4, rows[r], 4);
        uint8_t* codes = out + info(f).header;
        const auto of = [](auto v) { return (v & 0xff0000ff) | (v >> 8 & 0xff00) | (v & 0xff00) << 8; };
        for (int r = interleave_fours(rows, 4, dwords, codes, of); r < rows.count; r++)
            for (int i = 0; i < dwords; i++) {
                const uint32_t v = of(load<uint32_t>(rows[r] + 4 + i * 4));
                std::memcpy(codes + i * kPanelRows * 4 + r * 4, &v, 4);
            }
        return;
    }
    if (f == Format::F16) {
        for (int r = 0; r < rows.count; r++) interleave<2>(rows[r], 32, static_cast<size_t>(r), out);
        return;
    }
    const int dwords = f == Format::BF16 ? 16 : 32;
    for (int r = interleave_fours(rows, 0, dwords, out, [](Quads v) { return v; }); r < rows.count; r++)
        interleave<4>(rows[r], dwords, static_cast<size_t>(r), out);
}

using PackBlock = void (*)(const RawRows&, uint8_t*);
template <Format F>
constexpr PackBlock pack_of() {
    if constexpr (info(F).kind == Kind::Affine || info(F).kind == Kind::Table)
        return pack_block<F>;
    else
        return nullptr;
}
template <int... F>
constexpr std::array<PackBlock, sizeof...(F)> pack_table(std::integer_sequence<int, F...>) {
    return {pack_of<static_cast<Format>(F)>()...};
}
constexpr auto kPack = pack_table(std::make_integer_sequence<int, kFormatCount>());

}  // namespace

void raw_pack(Format f, const RawRows& rows, uint8_t* out) {
    const FormatInfo& t = info(f);
    switch (t.kind) {
        case Kind::Float: return pack_float(f, rows, out);
        case Kind::Grid: return grid_pack(f, rows, out);
        case Kind::Ternary: return ternary_pack(rows, out);
        default: return kPack[static_cast<size_t>(f)](rows, out);
    }
}

}  // namespace ktcore

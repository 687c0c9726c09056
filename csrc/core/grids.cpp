// Packing lattice points, and the packed form's plain definition.
#include "core/grids.h"

#include <cstring>

#include "core/f16.h"
#include "core/iq_grids.h"
#include "core/load.h"
#include "core/rectangles.h"

namespace ktcore {
namespace {

// A point of a block with its signs; `scale` of the 16-group it lies in.
struct Octet {
    unsigned index[2];  // quads have two
    unsigned signs;     // eight, or seven as stored
    unsigned scale;
};

Octet octet(Format f, const uint8_t* b, int i) {
    const auto nibble = [&](int at, int n) { return static_cast<unsigned>(b[at + n / 2] >> (4 * (n & 1)) & 15); };
    const auto ninth = [&](int q) { return static_cast<unsigned>(b[66 + q / 8] >> (q & 7) & 1) << 8; };
    const int g = i / 4;
    switch (f) {
        case Format::IQ2_XXS: {
            const uint32_t rest = load<uint32_t>(b + 2 + g * 8 + 4);
            return {{b[2 + g * 8 + i % 4], 0}, rest >> (7 * (i % 4)) & 127, rest >> 28};
        }
        case Format::IQ2_XS: {
            const unsigned q = load<uint16_t>(b + 2 + i * 2);
            return {{q & 511, 0}, q >> 9, nibble(66, i / 2)};
        }
        case Format::IQ2_S:
            return {{b[2 + i] | static_cast<unsigned>(b[66 + g] >> (2 * (i & 3)) & 3) << 8, 0}, b[34 + i], nibble(74, i / 2)};
        case Format::IQ3_XXS: {
            const uint32_t rest = load<uint32_t>(b + 66 + g * 4);
            return {{b[2 + 2 * i], b[3 + 2 * i]}, rest >> (7 * (i % 4)) & 127, rest >> 28};
        }
        default:  // IQ3_S
            return {{b[2 + 2 * i] | ninth(2 * i), b[3 + 2 * i] | ninth(2 * i + 1)}, b[74 + i], nibble(106, g)};
    }
}

// Seven signs as running xors, and what bit 0 is for.
uint8_t running(unsigned seven, unsigned free_bit) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity = (parity ^ parity >> 1) & 1;
    unsigned out = parity << 7;
    for (int i = 6; i >= 1; i--) out |= ((seven >> i & 1) ^ (out >> (i + 1) & 1)) << i;
    return static_cast<uint8_t>(out | free_bit);
}
// The eight signs back.
unsigned signs_of(uint8_t byte) {
    const unsigned b = byte & 0xfeu, e = b ^ b >> 1;
    return (e & 0xfe) | (b >> 1 & 1);  // sign 0 makes their number even: it is bit 1, the xor of all others
}

void set_bit(uint8_t* mask, int bit, unsigned on) { mask[bit / 8] |= static_cast<uint8_t>(on << (bit & 7)); }
unsigned get_bit(const uint8_t* mask, int bit) { return mask[bit / 8] >> (bit & 7) & 1; }

constexpr Rectangles kCover = make_rectangles();

// IQ1: `signs` has the delta's.
Octet octet1(Format f, const uint8_t* b, int i) {
    if (f == Format::IQ1_S) {
        const unsigned h = load<uint16_t>(b + 34 + i / 4 * 2);
        return {{b[2 + i] | (h >> (3 * (i % 4)) & 7) << 8, 0}, h >> 15, h >> 12 & 7};
    }
    const unsigned h = b[32 + i / 2] >> (4 * (i & 1));
    return {{b[i] | (h & 7) << 8, 0}, h >> 3 & 1, static_cast<unsigned>(load<uint16_t>(b + 48 + i / 8 * 2) >> (3 * (i / 2 % 4)) & 7)};
}

void pack1(Format f, const uint8_t* row, int r, uint8_t* out) {
    const Grid g = grid_of(f);
    uint8_t* threes = out + grid_threes_at(g) + grid_byte(r, 0) / 2;
    unsigned t[8] = {};
    for (int i = 31; i >= 0; i--) {
        const Octet o = octet1(f, row, i);
        const unsigned code = kCover.code[o.index[0]];
        const int at = grid_byte(r, i & 1);
        out[64 + i / 2 * 64 + at] = static_cast<uint8_t>(code);
        out[grid_high_at(g) + i / 8 * 64 + at] |= static_cast<uint8_t>((code >> 8 & 3) << (2 * (i / 2 & 3)));
        t[i / 4] = t[i / 4] * 3 + (code >> 10);
        const int s = i * g.scales / 32;
        if (i % (32 / g.scales) == 0)
            out[grid_scales_at(g) + s / 8 * 128 + r * 4 + s % 8 / 2] |= static_cast<uint8_t>((o.scale | o.signs << 3) << (4 * (s & 1)));
        else if (g.scales == 16)
            set_bit(out + grid_deltas_at(g) + (i / 2 * 2 + r / kHalfRows) * 2, r % kHalfRows, o.signs);
    }
    for (int n = 0; n < 7; n++) threes[n * 32] = static_cast<uint8_t>(t[n] | (t[7] >> n & 1) << 7);
}

// d of IQ1_M lies in the top nibbles of its scales.
uint16_t half1(Format f, const uint8_t* b) {
    if (f == Format::IQ1_S) return load<uint16_t>(b);
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= static_cast<unsigned>(b[49 + 2 * i] >> 4) << (4 * i);
    return static_cast<uint16_t>(d);
}

void int8_1(Format f, const uint8_t* block, int row, int8_t* codes, float* scale) {
    const Grid g = grid_of(f);
    const uint8_t* threes = block + grid_threes_at(g) + grid_byte(row, 0) / 2;
    const float d = half_to_float(load<uint16_t>(block + 2 * row));
    constexpr int kPower[4] = {1, 3, 9, 27};
    unsigned last = 0;
    for (int n = 0; n < 7; n++) last |= static_cast<unsigned>(threes[n * 32] >> 7) << n;
    for (int i = 0; i < 32; i++) {
        const int at = grid_byte(row, i & 1), s = i * g.scales / 32;
        const unsigned entry = block[64 + i / 2 * 64 + at];
        const unsigned q = block[grid_high_at(g) + i / 8 * 64 + at] >> (2 * (i / 2 & 3)) & 3;
        const int four = i / 4 == 7 ? static_cast<int>(last) : threes[i / 4 * 32] & 127, t = four / kPower[i % 4] % 3;
        const unsigned point = kCover.first[t][entry] | kCover.second[t][(entry & 0x7c) | q] << 8;
        const unsigned nibble = block[grid_scales_at(g) + s / 8 * 128 + row * 4 + s % 8 / 2] >> (4 * (s & 1)) & 15;
        const bool odd = g.scales == 16 && i % 2;
        const unsigned minus = odd ? get_bit(block + grid_deltas_at(g) + (i / 2 * 2 + row / kHalfRows) * 2, row % kHalfRows) : nibble >> 3;
        for (int k = 0; k < 8; k++)
            codes[i * 8 + k] = static_cast<int8_t>(8 * (static_cast<int>(point >> (2 * k) & 3) - 1) + (minus ? -1 : 1));
        scale[i / 2] = d * static_cast<float>(2 * (nibble & 7) + 1) * g.unit;
    }
}

}  // namespace

const uint16_t* grid_points(Format f) {
    switch (f) {
        case Format::IQ2_XXS: return kGrid2xxs;
        case Format::IQ2_XS: return kGrid2xs;
        case Format::IQ2_S: return kGrid2s;
        case Format::IQ3_XXS: return kGrid3xxs;
        default: return kGrid3s;
    }
}

void grid_pack(Format f, const uint8_t* const* rows, uint8_t* out) {
    const Grid g = grid_of(f);
    const int group = grid_group_bytes(g);
    for (int r = 0; r < kPanelRows; r++) {
        if (!rows[r]) continue;
        if (g.rectangles) {
            const uint16_t d = half1(f, rows[r]);
            std::memcpy(out + 2 * r, &d, 2);
            pack1(f, rows[r], r, out);
            continue;
        }
        std::memcpy(out + 2 * r, rows[r], 2);
        for (int i = 0; i < 32; i++) {
            const Octet o = octet(f, rows[r], i);
            uint8_t* to = out + 64 + i / 2 * group;
            uint8_t* high = out + grid_high_at(g) + i / 2 * g.high_bytes;
            const int at = grid_byte(r, i & 1);
            unsigned spare = 0;
            if (g.quads) {
                for (int q = 0; q < 2; q++) {
                    const int in_half = r % kHalfRows * 4 + 2 * (i & 1) + q;
                    to[r / kHalfRows * 64 + in_half] = static_cast<uint8_t>(o.index[q]);
                    if (g.high_bytes) set_bit(high + r / kHalfRows * 8, in_half, o.index[q] >> 8);
                }
            } else {
                to[at] = static_cast<uint8_t>(o.index[0]);
                for (int bit = 0; bit < g.high_bytes / 8; bit++) set_bit(high + bit * 8, at, o.index[0] >> (8 + bit) & 1);
                spare = o.index[0] >> 8;
            }
            if (!g.scales) spare = o.scale >> (i & 3) & 1;
            to[group - 64 + at] = g.even_signs ? running(o.signs, spare) : static_cast<uint8_t>(o.signs);
            const int s = i * g.scales / 32;
            if (g.scales && i % (32 / g.scales) == 0)
                out[grid_scales_at(g) + s / 8 * 128 + r * 4 + s % 8 / 2] |= static_cast<uint8_t>(o.scale << (4 * (s & 1)));
        }
    }
}

void grid_int8(Format f, const uint8_t* block, int row, int8_t* codes, float* scale) {
    const Grid g = grid_of(f);
    if (g.rectangles) return int8_1(f, block, row, codes, scale);
    const int group = grid_group_bytes(g), per_row = g.scales ? g.scales : 8;
    const uint16_t* points = grid_points(f);
    const int8_t* levels = grid_levels(f);
    const float d = half_to_float(load<uint16_t>(block + 2 * row));
    unsigned s[16] = {};
    for (int i = 0; i < 32; i++) {
        const uint8_t* from = block + 64 + i / 2 * group;
        const uint8_t* high = block + grid_high_at(g) + i / 2 * g.high_bytes;
        const int at = grid_byte(row, i & 1);
        const uint8_t stored = from[group - 64 + at];
        const unsigned signs = g.even_signs ? signs_of(stored) : stored;
        unsigned index[2] = {from[at], 0};
        if (g.quads) {
            for (int q = 0; q < 2; q++) {
                const int in_half = row % kHalfRows * 4 + 2 * (i & 1) + q;
                index[q] = from[row / kHalfRows * 64 + in_half];
                if (g.high_bytes) index[q] |= get_bit(high + row / kHalfRows * 8, in_half) << 8;
            }
        } else {
            for (int bit = 0; bit < g.high_bytes / 8; bit++) index[0] |= get_bit(high + bit * 8, at) << (8 + bit);
            if (g.entries == 512) index[0] |= (stored & 1u) << 8;
        }
        for (int k = 0; k < 8; k++) {
            const int level = g.quads ? levels[points[index[k / 4]] >> (3 * (k & 3)) & 7] : levels[points[index[0]] >> (2 * k) & 3];
            codes[i * 8 + k] = static_cast<int8_t>(signs >> k & 1 ? -level : level);
        }
        if (!g.scales) s[i / 4] |= (stored & 1u) << (i & 3);
    }
    for (int i = 0; i < g.scales; i++)
        s[i] = block[grid_scales_at(g) + i / 8 * 128 + row * 4 + i % 8 / 2] >> (4 * (i & 1)) & 15;
    for (int i = 0; i < 16; i++) scale[i] = d * static_cast<float>(2 * s[i * per_row / 16] + 1) * g.unit;
}

}  // namespace ktcore

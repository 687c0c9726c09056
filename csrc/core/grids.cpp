// Packing lattice points, and the packed form's plain definition.
#include "core/grids.h"

#include <cstring>

#include "core/f16.h"
#include "core/iq_grids.h"
#include "core/load.h"
#include "core/rectangles.h"

namespace ktcore {
namespace {

// Seven signs as their running xors; bit 0 is free.
struct Running {
    uint8_t of[128];
};
constexpr Running make_running() {
    Running out{};
    for (unsigned seven = 0; seven < 128; seven++) {
        unsigned parity = seven ^ seven >> 4, bits = 0;
        parity ^= parity >> 2;
        bits = ((parity ^ parity >> 1) & 1) << 7;
        for (int i = 6; i >= 1; i--) bits |= ((seven >> i & 1) ^ (bits >> (i + 1) & 1)) << i;
        out.of[seven] = static_cast<uint8_t>(bits);
    }
    return out;
}
constexpr Running kRunning = make_running();
// The eight signs back.
unsigned signs_of(uint8_t byte) {
    const unsigned b = byte & 0xfeu, e = b ^ b >> 1;
    return (e & 0xfe) | (b >> 1 & 1);  // sign 0 makes their number even: it is bit 1, the xor of all others
}

void store(uint8_t* to, unsigned two) {
    const uint16_t v = static_cast<uint16_t>(two);
    std::memcpy(to, &v, 2);
}
unsigned get_bit(const uint8_t* mask, int bit) { return mask[bit / 8] >> (bit & 7) & 1; }

constexpr Rectangles kCover = make_rectangles();

// d of IQ1_M lies in the top nibbles of its scales.
uint16_t half_of(Format f, const uint8_t* b) {
    if (f != Format::IQ1_M) return load<uint16_t>(b);
    unsigned d = 0;
    for (int i = 0; i < 4; i++) d |= static_cast<unsigned>(b[49 + 2 * i] >> 4) << (4 * i);
    return static_cast<uint16_t>(d);
}

// One row of a block, whose bytes are zero so far. Octets go by pairs, those of a 16-group: their bytes are neighbours.
template <Format F>
void pack1_row(const uint8_t* b, int r, uint8_t* out) {
    constexpr Grid g = grid_of(F);
    const int at = grid_byte(r, 0);
    uint8_t* scales = out + grid_scales_at(g) + r * 4;
    unsigned t[8] = {};
    for (int four = 0; four < 4; four++) {  // 64 values: two 32-groups, four pairs
        unsigned columns = 0, nibbles = 0, three[2] = {};
        for (int p = 0; p < 4; p++) {
            unsigned high;  // what an index has above its byte, and in bit 3 the sign of a delta; the second one's from bit 4
            if (F == Format::IQ1_S) {
                const unsigned word = load<uint16_t>(b + 34 + (four * 2 + p / 2) * 2) >> (6 * (p & 1));
                high = (word & 7) | (word & 56) << 1;
            } else {
                high = b[32 + four * 4 + p];
            }
            const unsigned low = load<uint16_t>(b + (F == Format::IQ1_S ? 2 : 0) + four * 8 + p * 2);
            const unsigned first = kCover.code[(low & 255) | (high & 7) << 8];
            const unsigned second = kCover.code[low >> 8 | (high & 0x70) << 4];
            store(out + 64 + (four * 4 + p) * 64 + at, (first & 255) | (second & 255) << 8);
            columns |= ((first >> 8 & 3) | (second & 0x300)) << (2 * p);
            three[p / 2] += ((first >> 10) + 3 * (second >> 10)) * (p & 1 ? 9 : 1);
            if (F == Format::IQ1_M) {
                nibbles |= ((load<uint16_t>(b + 48 + four * 2) >> (3 * p) & 7u) | (high & 8)) << (4 * p);
                uint8_t* deltas = out + grid_deltas_at(g) + ((four * 4 + p) * 2 + r / kHalfRows) * 2;
                store(deltas, load<uint16_t>(deltas) | (high >> 7) << (r % kHalfRows));
            }
        }
        store(out + grid_high_at(g) + four * 64 + at, columns);
        t[2 * four] = three[0], t[2 * four + 1] = three[1];
        if (F == Format::IQ1_M)
            store(scales + four / 2 * 128 + four % 2 * 2, nibbles);
        else
            scales[four] = static_cast<uint8_t>(b[35 + 4 * four] >> 4 | (b[37 + 4 * four] & 0xf0));
    }
    uint8_t* threes = out + grid_threes_at(g) + at / 2;
    for (int n = 0; n < 7; n++) threes[n * 32] = static_cast<uint8_t>(t[n] | (t[7] >> n & 1) << 7);
}

// The same of IQ2 and IQ3.
template <Format F>
void pack_row(const uint8_t* b, int r, uint8_t* out) {
    constexpr Grid g = grid_of(F);
    constexpr int group = grid_group_bytes(g), kLow = 2, kSigns = F == Format::IQ2_S ? 34 : 74;
    const int at = grid_byte(r, 0);
    for (int p = 0; p < 16; p++) {
        uint8_t* to = out + 64 + p * group;
        uint8_t* high = out + grid_high_at(g) + p * g.high_bytes;
        if (g.quads)
            std::memcpy(to + r * 4, b + kLow + 4 * p, 4);
        else if (F == Format::IQ2_XXS)
            std::memcpy(to + at, b + kLow + p / 2 * 8 + 2 * (p & 1), 2);
        else if (F == Format::IQ2_S)
            std::memcpy(to + at, b + kLow + 2 * p, 2);
        unsigned signs = 0;
        if (F == Format::IQ2_XS) {
            const uint32_t two = load<uint32_t>(b + kLow + 4 * p);
            store(to + at, (two & 255) | (two >> 8 & 0xff00));
            signs = kRunning.of[two >> 9 & 127] | kRunning.of[two >> 25] << 8 | (two >> 8 & 1) | (two >> 16 & 0x100);
        } else if (g.even_signs) {  // with two bits of the scale
            const uint32_t rest = load<uint32_t>(b + (g.quads ? 66 + p / 2 * 4 : kLow + p / 2 * 8 + 4));
            const unsigned seven = rest >> (14 * (p & 1)), scale = rest >> (28 + 2 * (p & 1));
            signs = kRunning.of[seven & 127] | kRunning.of[seven >> 7 & 127] << 8 | (scale & 1) | (scale & 2) << 7;
        } else {
            signs = load<uint16_t>(b + kSigns + 2 * p);
        }
        store(to + group - 64 + at, signs);
        if (g.high_bytes) {
            const unsigned nibble = b[66 + p / 2] >> (4 * (p & 1)) & 15u;
            if (g.quads) {
                high[r / 2] |= static_cast<uint8_t>(nibble << (4 * (r & 1)));
            } else {
                high[at / 8] |= static_cast<uint8_t>(((nibble & 1) | (nibble >> 1 & 2)) << (at & 7));
                high[8 + at / 8] |= static_cast<uint8_t>(((nibble >> 1 & 1) | (nibble >> 2 & 2)) << (at & 7));
            }
        }
    }
    constexpr int kScales = F == Format::IQ2_XS ? 66 : F == Format::IQ2_S ? 74 : 106;
    for (int i = 0; i < g.scales / 8; i++) std::memcpy(out + grid_scales_at(g) + i * 128 + r * 4, b + kScales + i * 4, 4);
}

template <Format F>
void pack_rows(const RawRows& rows, uint8_t* out) {
    for (int r = 0; r < rows.count; r++) {
        const uint16_t d = half_of(F, rows[r]);
        std::memcpy(out + 2 * r, &d, 2);
        if constexpr (grid_of(F).rectangles)
            pack1_row<F>(rows[r], r, out);
        else
            pack_row<F>(rows[r], r, out);
    }
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

const uint16_t* grid_points(Format f) {
    switch (f) {
        case Format::IQ2_XXS: return kGrid2xxs;
        case Format::IQ2_XS: return kGrid2xs;
        case Format::IQ2_S: return kGrid2s;
        case Format::IQ3_XXS: return kGrid3xxs;
        default: return kGrid3s;
    }
}

}  // namespace

void grid_pack(Format f, const RawRows& rows, uint8_t* out) {
    switch (f) {
        case Format::IQ1_S: return pack_rows<Format::IQ1_S>(rows, out);
        case Format::IQ1_M: return pack_rows<Format::IQ1_M>(rows, out);
        case Format::IQ2_XXS: return pack_rows<Format::IQ2_XXS>(rows, out);
        case Format::IQ2_XS: return pack_rows<Format::IQ2_XS>(rows, out);
        case Format::IQ2_S: return pack_rows<Format::IQ2_S>(rows, out);
        case Format::IQ3_XXS: return pack_rows<Format::IQ3_XXS>(rows, out);
        default: return pack_rows<Format::IQ3_S>(rows, out);
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

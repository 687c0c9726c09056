// Formats of lattice points (IQ1 to IQ3) as panels of 32 rows, in as many bytes as their file has (IQ1: 6% more).
//
// A block of 256 values is d, half precision, of 32 rows; then for every 16 values of K one vector of index bytes (two where
// a point is four values, a quad; else it is eight, an octet) and one of sign bytes; then what an index has above its byte;
// then the scales that have no room in sign bytes.
//
// Octet o (0, 1) of row r has the byte `grid_byte(r, o)` of a vector: low and high bytes of two looked-up vectors,
// interleaved lane by lane, are 16 rows x 4 bytes then. Quad q has the byte 4 (r % 16) + q of row half r / 16's vector.
//
// Signs that a file stores in seven bits (the eighth makes their number even) are stored as their running xors: bit i is
// the xor of signs i to 7, i >= 1, and bit 0 is free. There IQ2_XXS and IQ3_XXS keep their scale, a bit in each of a
// group's four octets, and IQ2_XS the index's ninth bit.
//
// IQ1's points lie in rectangles (core/rectangles.h). A 16-group has one vector, of entries into the first table; behind the
// 16 of them lie the columns q, two bits for each of four groups a vector; then seven times 32 bytes, one of a row: four t's
// of a 32-group in seven bits, and in the eighth a bit of the last 32-group's. A value is 8 (level - 1) +- 1 eighths: the sign
// of that one is the top bit of a scale's nibble; where each octet has its own (IQ1_M) those of odd octets lie last, masks of
// 16 rows [16-group][row half].
#pragma once
#include "core/raw_blocks.h"

namespace ktcore {

struct Grid {
    int entries;
    bool quads;       // points of four values, levels of three bits; else eight and two
    bool even_signs;  // seven stored
    int high_bytes;   // of a 16-group: index bits above the byte, masks of 64 bits. Octets: a mask for each bit, in the order
                      // of a vector's bytes; quads: one for each row half
    int scales;       // stored behind: four bits each, eight of a row in a dword [dword][32 rows]. 0: in the sign bytes
    float unit;       // the value is d (2 scale + 1) unit level sign
    bool rectangles = false;  // IQ1; high_bytes are those of q's and t's, on average
};
constexpr Grid grid_of(Format f) {
    switch (f) {
        case Format::IQ2_XXS: return {256, false, true, 0, 0, 0.125f};
        case Format::IQ2_XS: return {512, false, true, 0, 16, 0.125f};
        case Format::IQ2_S: return {1024, false, false, 16, 16, 0.125f};
        case Format::IQ3_XXS: return {256, true, true, 0, 0, 0.25f};
        case Format::IQ1_S: return {2048, false, false, 30, 8, 0.125f, true};
        case Format::IQ1_M: return {2048, false, false, 30, 16, 0.125f, true};
        default: return {512, true, false, 16, 8, 1.f};  // IQ3_S
    }
}
constexpr int grid_group_bytes(const Grid& g) { return g.rectangles ? 64 : g.quads ? 192 : 128; }
constexpr int grid_high_at(const Grid& g) { return 64 + 16 * grid_group_bytes(g); }
constexpr int grid_scales_at(const Grid& g) { return grid_high_at(g) + 16 * g.high_bytes; }
constexpr int grid_threes_at(const Grid& g) { return grid_high_at(g) + 4 * 64; }
constexpr int grid_deltas_at(const Grid& g) { return grid_scales_at(g) + g.scales * 16; }
constexpr int grid_byte(int row, int octet) { return 16 * (row % 16 / 4) + 8 * (row / 16) + 2 * (row % 4) + octet; }

constexpr int8_t kLevels2[4] = {8, 25, 43, 0};
constexpr int8_t kLevels3xxs[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr int8_t kLevels3s[8] = {1, 3, 5, 7, 9, 11, 13, 15};
constexpr const int8_t* grid_levels(Format f) {
    return f == Format::IQ3_XXS ? kLevels3xxs : f == Format::IQ3_S ? kLevels3s : kLevels2;
}

// Packs one block of a panel into zeroed memory; what belongs to rows that the matrix does not have stays zero.
void grid_pack(Format f, const RawRows& rows, uint8_t* out);
// One row of a packed block, as raw_int8 gives it: int8 codes [256] and a scale per 16.
void grid_int8(Format f, const uint8_t* block, int row, int8_t* codes, float* scale);

}  // namespace ktcore

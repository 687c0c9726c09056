// GGUF's own block formats, read one row at a time: for packing and for gathering embedding rows.
#pragma once
#include "core/types.h"

namespace ktcore {

// The blocks of one column of a panel: `count` rows (1..32), each `pitch` bytes after the one before.
struct RawRows {
    const uint8_t* first;
    size_t pitch;
    int count;
    const uint8_t* operator[](int row) const { return first + static_cast<size_t>(row) * pitch; }
};

// A codebook block as int8 codes [block] and one scale per 16 of them: value = code * scale.
void raw_int8(Format f, const uint8_t* block, int8_t* codes, float* scale);
// A block of IQ1 to IQ3 as codes, a level and above it a sign (IQ1_S: the level alone), and its scales' nibbles, the first half
// of them in the low ones of `scales`; returns d. IQ1's fourth bit is the sign of a 32-group's eighths.
uint16_t raw_points(Format f, const uint8_t* block, uint8_t* codes, uint8_t* scales);
// Floats of a whole row; `cols` is a multiple of the block.
void raw_dequantize(Format f, const uint8_t* row, int cols, float* out);
// Rows ids[0 .. count) of `rows` rows, to out [count][cols]. Throws std::invalid_argument for an id that is none, before
// any row is written.
void raw_dequantize_rows(Format f, const uint8_t* raw, int64_t rows, int cols, const int64_t* ids, int64_t count, float* out);
// Packs one block of TQ1_0, as raw_pack.
void ternary_pack(const RawRows& rows, uint8_t* out);
// Packs one block of a panel into zeroed memory; what belongs to rows that the matrix does not have stays zero.
void raw_pack(Format f, const RawRows& rows, uint8_t* out);

}  // namespace ktcore

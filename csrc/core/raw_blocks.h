// GGUF's own block formats, read one row at a time: for packing and for gathering embedding rows.
#pragma once
#include "core/types.h"

namespace ktcore {

// Unsigned codes (offset included) of one affine block; of a table format, the indices.
void raw_codes(Format f, const uint8_t* block, uint8_t* codes);
// Writes row `row`'s part (0..31) of a packed block's header.
void raw_header(Format f, const uint8_t* block, int row, uint8_t* header);
// A codebook block as int8 codes [block] and one scale per 16 of them: value = code * scale.
void raw_int8(Format f, const uint8_t* block, int8_t* codes, float* scale);
// Floats of a whole row; `cols` is a multiple of the block.
void raw_dequantize(Format f, const uint8_t* row, int cols, float* out);
// Rows ids[0 .. count) of `rows` rows, to out [count][cols]. Throws std::invalid_argument for an id that is none, before
// any row is written.
void raw_dequantize_rows(Format f, const uint8_t* raw, int64_t rows, int cols, const int64_t* ids, int64_t count, float* out);
// Packs one block: rows[r] is null where the matrix has no such row (zeros are left).
void raw_pack(Format f, const uint8_t* const* rows, uint8_t* out);

}  // namespace ktcore

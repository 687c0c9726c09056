// Packing GGUF rows into panels, and back to floats.
#include "core/packed.h"

#include <stdexcept>

#include "core/raw_blocks.h"

namespace ktcore {

Format parse_format(const std::string& name) {
    std::string known;
    for (int i = 0; i < kFormatCount; i++) {
        if (name == kFormats[i].name) return static_cast<Format>(i);
        known += std::string(i ? ", " : "") + kFormats[i].name;
    }
    throw std::invalid_argument("unknown weight format '" + name + "'; known: " + known);
}

std::shared_ptr<const PackedMatrix> PackedMatrix::pack(Pool& pool, const std::string& format, int64_t rows, int64_t cols,
                                                       const uint8_t* raw, size_t bytes) {
    const Format f = parse_format(format);
    const FormatInfo& t = info(f);
    constexpr int64_t kLimit = int64_t{1} << 30;
    if (rows <= 0 || cols <= 0 || rows > kLimit || cols > kLimit)
        throw std::invalid_argument("a packed matrix needs 1 to 2^30 rows and columns");
    if (cols % t.block != 0)
        throw std::invalid_argument(format + " needs columns in multiples of " + std::to_string(t.block) + ", not " +
                                    std::to_string(cols));
    const size_t row_bytes = static_cast<size_t>(cols / t.block) * t.block_bytes;
    if (bytes != row_bytes * static_cast<size_t>(rows))
        throw std::invalid_argument("raw data has " + std::to_string(bytes) + " bytes; " + std::to_string(rows) + " x " +
                                    std::to_string(cols) + " " + format + " takes " +
                                    std::to_string(row_bytes * static_cast<size_t>(rows)));
    auto out = std::make_shared<PackedMatrix>();
    const int kblocks = static_cast<int>((cols + t.packed_k - 1) / t.packed_k);
    const int panels = static_cast<int>((rows + kPanelRows - 1) / kPanelRows);
    const size_t block_bytes = static_cast<size_t>(packed_block_bytes(t));
    const size_t panel_bytes = block_bytes * static_cast<size_t>(kblocks);
    out->memory_ = Memory(panel_bytes * static_cast<size_t>(panels));
    out->view_ = {out->memory_.data(), panel_bytes, static_cast<int>(rows), static_cast<int>(cols), panels, kblocks, f};
    uint8_t* base = out->memory_.data();
    pool.run(panels, [&](int p, int) {
        const uint8_t* row[kPanelRows];
        for (int b = 0; b < kblocks; b++) {
            const int left = static_cast<int>(cols) - b * t.packed_k;
            uint8_t padded[kPanelRows][32 * 4] = {};
            for (int r = 0; r < kPanelRows; r++) {
                const int64_t at = static_cast<int64_t>(p) * kPanelRows + r;
                row[r] = at < rows ? raw + static_cast<size_t>(at) * row_bytes +
                                         static_cast<size_t>(b) * (t.packed_k / t.block) * t.block_bytes
                                   : nullptr;
                if (row[r] && left < t.packed_k) {  // float formats only: a partial last block
                    __builtin_memcpy(padded[r], row[r], static_cast<size_t>(left) * t.block_bytes);
                    row[r] = padded[r];
                }
            }
            raw_pack(f, row, base + panel_bytes * static_cast<size_t>(p) + block_bytes * static_cast<size_t>(b));
        }
    });
    return out;
}

void PackedMatrix::dequantize(const Kernels& kernels, float* out) const {
    const size_t k = static_cast<size_t>(view_.kblocks) * info(view_.format).packed_k;
    Memory buffer(k * kPanelRows * 4), scratch(kPanelScratch);
    float* panel = reinterpret_cast<float*>(buffer.data());
    for (int p = 0; p < view_.panels; p++) {
        kernels.unpack_panel(view_, p, panel, scratch.data());
        for (int r = 0; r < kPanelRows && p * kPanelRows + r < view_.rows; r++) {
            float* row = out + (static_cast<size_t>(p) * kPanelRows + r) * view_.cols;
            for (int i = 0; i < view_.cols; i++) row[i] = panel[static_cast<size_t>(i) * kPanelRows + r];
        }
    }
}

}  // namespace ktcore

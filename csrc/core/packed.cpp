// Packing GGUF rows into panels, and back to floats.
#include "core/packed.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

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

size_t raw_bytes(Format format, int64_t rows, int64_t cols) {
    const FormatInfo& t = info(format);
    return static_cast<size_t>(cols / t.block) * t.block_bytes * static_cast<size_t>(rows);
}

PackedView packed_shape(Format format, int64_t rows, int64_t cols, size_t bytes) {
    const FormatInfo& t = info(format);
    const std::string name = t.name;
    constexpr int64_t kLimit = int64_t{1} << 30;
    if (rows <= 0 || cols <= 0 || rows > kLimit || cols > kLimit)
        throw std::invalid_argument("a packed matrix needs 1 to 2^30 rows and columns");
    if (cols % t.block != 0)
        throw std::invalid_argument(name + " needs columns in multiples of " + std::to_string(t.block) + ", not " +
                                    std::to_string(cols));
    const size_t expected = raw_bytes(format, rows, cols);
    if (bytes != expected)
        throw std::invalid_argument("raw data has " + std::to_string(bytes) + " bytes; " + std::to_string(rows) + " x " +
                                    std::to_string(cols) + " " + name + " takes " + std::to_string(expected));
    const int kblocks = static_cast<int>((cols + t.packed_k - 1) / t.packed_k);
    const int panels = static_cast<int>((rows + kPanelRows - 1) / kPanelRows);
    const size_t panel_bytes = static_cast<size_t>(packed_block_bytes(t)) * static_cast<size_t>(kblocks);
    return {nullptr, panel_bytes, static_cast<int>(rows), static_cast<int>(cols), panels, kblocks, format};
}

PackedView packed_shape(Format format, int64_t rows, int64_t cols) {
    const bool sane = rows > 0 && cols > 0 && rows <= int64_t{1} << 30 && cols <= int64_t{1} << 30;
    return packed_shape(format, rows, cols, sane ? raw_bytes(format, rows, cols) : 0);
}

void check_borrowed(const uint8_t* data, size_t bytes, size_t expected) {
    if (bytes != expected)
        throw std::invalid_argument("packed data has " + std::to_string(bytes) + " bytes, expected " +
                                    std::to_string(expected));
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0) throw std::invalid_argument("packed data must be 64-byte aligned");
}

namespace {
void pack_panel(const PackJob& job, int p) {
    const PackedView& w = job.to;
    const FormatInfo& t = info(w.format);
    const size_t row_bytes = raw_bytes(w.format, 1, w.cols), block_bytes = static_cast<size_t>(packed_block_bytes(t));
    uint8_t* out = const_cast<uint8_t*>(w.data) + w.panel_bytes * static_cast<size_t>(p);
    const int64_t top = static_cast<int64_t>(p) * kPanelRows;
    const int count = static_cast<int>(std::min<int64_t>(kPanelRows, w.rows - top));
    const size_t step = static_cast<size_t>(t.packed_k / t.block) * static_cast<size_t>(t.block_bytes);
    RawRows rows{job.raw + static_cast<size_t>(top) * row_bytes, row_bytes, count};
    // The next panel's rows lie one after another; this one's blocks are read across them, too odd a way to be foreseen.
    const uint8_t *next = job.raw + static_cast<size_t>(top + count) * row_bytes;
    const size_t coming = static_cast<size_t>(std::min<int64_t>(kPanelRows, w.rows - top - count)) * row_bytes;
    const size_t share = (coming / static_cast<size_t>(w.kblocks) + 63) / 64 * 64;
    const uint8_t* const end = next + coming;
    for (int left = w.cols; left >= t.packed_k; left -= t.packed_k, out += block_bytes, rows.first += step) {
        for (size_t i = 0; i < share && next + i < end; i += 64) __builtin_prefetch(next + i, 0, 2);
        next += share;
        raw_pack(w.format, rows, out);
    }
    if (const int left = w.cols % t.packed_k; left > 0) {  // float formats only
        uint8_t padded[kPanelRows][32 * 4] = {};
        for (int r = 0; r < count; r++) std::memcpy(padded[r], rows[r], static_cast<size_t>(left) * t.block_bytes);
        raw_pack(w.format, {padded[0], sizeof padded[0], count}, out);
    }
}
}  // namespace

void pack_panels(Pool& pool, const PackJob* jobs, int count) {
    int panels = 0;
    for (int i = 0; i < count; i++) panels += jobs[i].to.panels;
    pool.run(panels, [&](int item, int) {
        const PackJob* job = jobs;
        while (item >= job->to.panels) item -= (job++)->to.panels;
        pack_panel(*job, item);
    });
}

std::shared_ptr<const PackedMatrix> PackedMatrix::pack(Pool& pool, const std::string& format, int64_t rows, int64_t cols,
                                                       const uint8_t* raw, size_t bytes) {
    auto out = std::make_shared<PackedMatrix>();
    out->view_ = packed_shape(parse_format(format), rows, cols, bytes);
    out->memory_ = Memory(out->view_.panel_bytes * static_cast<size_t>(out->view_.panels));
    out->view_.data = out->memory_.data();
    const PackJob job{out->view_, raw};
    pack_panels(pool, &job, 1);
    return out;
}

std::shared_ptr<const PackedMatrix> PackedMatrix::borrow(const std::string& format, int64_t rows, int64_t cols,
                                                         const uint8_t* data, size_t bytes, Keep keep) {
    auto out = std::make_shared<PackedMatrix>();
    out->view_ = packed_shape(parse_format(format), rows, cols);
    check_borrowed(data, bytes, out->nbytes());
    out->view_.data = data;
    out->keep_ = std::move(keep);
    return out;
}

size_t PackedMatrix::packed_bytes(const std::string& format, int64_t rows, int64_t cols) {
    const PackedView w = packed_shape(parse_format(format), rows, cols);
    return w.panel_bytes * static_cast<size_t>(w.panels);
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

// A weight matrix in the panel layout that every instruction set reads.
#pragma once
#include <memory>
#include <string>

#include "core/kernels.h"
#include "core/pool.h"

namespace ktcore {

Format parse_format(const std::string& name);  // throws std::invalid_argument naming the known ones

// The shape of a packed matrix, its panels one after another; `data` is left null. Throws std::invalid_argument if
// shape, format and `bytes` of GGUF rows disagree.
PackedView packed_shape(Format format, int64_t rows, int64_t cols, size_t bytes);
PackedView packed_shape(Format format, int64_t rows, int64_t cols);  // of whatever bytes that takes
size_t raw_bytes(Format format, int64_t rows, int64_t cols);
// Packs GGUF rows into zeroed panels, the matrices' panels in one parallel region.
struct PackJob {
    PackedView to;
    const uint8_t* raw;
};
// Owns memory that packed weights are borrowed from.
using Keep = std::shared_ptr<const void>;
void check_borrowed(const uint8_t* data, size_t bytes, size_t expected);  // throws std::invalid_argument

void pack_panels(Pool& pool, const PackJob* jobs, int count);

class PackedMatrix {
  public:
    // raw: rows of GGUF blocks, `bytes` long in all. Throws std::invalid_argument if shape and bytes disagree.
    static std::shared_ptr<const PackedMatrix> pack(Pool& pool, const std::string& format, int64_t rows, int64_t cols,
                                                    const uint8_t* raw, size_t bytes);
    // Panels that lie elsewhere, in a mapped file say, and are kept there by `keep`; read only. They must be `bytes` =
    // packed_bytes() long and 64-byte aligned, else std::invalid_argument.
    static std::shared_ptr<const PackedMatrix> borrow(const std::string& format, int64_t rows, int64_t cols,
                                                      const uint8_t* data, size_t bytes, Keep keep);
    static size_t packed_bytes(const std::string& format, int64_t rows, int64_t cols);
    const PackedView& view() const { return view_; }
    size_t nbytes() const { return view_.panel_bytes * static_cast<size_t>(view_.panels); }
    // out [rows][cols].
    void dequantize(const Kernels& kernels, float* out) const;

  private:
    PackedView view_{};
    Memory memory_;
    Keep keep_;
};

using Weight = std::shared_ptr<const PackedMatrix>;

}  // namespace ktcore

// Products with one matrix a head.
#pragma once
#include "blocks/mla.h"

namespace ktcore {

constexpr int kHeadChunk = 64;  // rows of one item

inline size_t head_scratch(int cols) {
    return kPanelScratch + kHeadChunk * (sizeof(float) * kPanelRows + act_stride(padded_k(cols)));
}
// Up to kHeadChunk rows of x times head `head`'s matrix, quantised on the way if need be; store(acc [rows][32], first
// output column, number of columns) takes each panel's result.
template <class Store>
void head_rows(const Engine& e, const HeadMatrix& m, bool exact, int head, const float* x, size_t ldx, int cols, int rows,
               uint8_t* scratch, const Store& store) {
    float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
    Rows in{x, ldx, {reinterpret_cast<uint8_t*>(acc + kHeadChunk * kPanelRows), act_stride(padded_k(cols)), padded_k(cols)}};
    if (!needs_float(m.w->view(), exact))
        for (int t = 0; t < rows; t++)
            e.kernels.quantize(x + static_cast<size_t>(t) * ldx, cols, nullptr, 0.f, in.act, t);
    const int panels = m.panels();
    for (int p = 0; p < panels; p++) {
        run_panel(e, m.w->view(), head * panels + p, in, exact, 0, rows, acc, scratch);
        store(acc, p * kPanelRows, m.rows - p * kPanelRows < kPanelRows ? m.rows - p * kPanelRows : kPanelRows);
    }
}

}  // namespace ktcore

// Parallel matrix products over packed weights: rows are prepared once, panels of all products share one region.
#include "blocks/engine.h"

#include <algorithm>
#include <stdexcept>

namespace ktcore {
namespace {
constexpr size_t kAccBytes = size_t{kTokenChunk} * kPanelRows * 4;
}  // namespace

void check(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

void check_length(const Vector& v, int64_t expected, const char* what) {
    check(v.empty() || static_cast<int64_t>(v.size()) == expected,
          std::string(what) + " has " + std::to_string(v.size()) + " values, expected " + std::to_string(expected));
}

bool needs_float(const PackedView& w, bool exact) { return exact || info(w.format).kind == Kind::Float; }

bool takes_rounded(const Engine& e, const PackedView& w, bool exact) {
    return !exact && e.kernels.round_rows && (w.format == Format::BF16 || is_fp8(w.format));
}

int padded_k(int cols) { return (cols + 31) / 32 * 32; }

void prepare_rows(Engine& e, const float* x, size_t ldx, int tokens, int n, const Vector& norm, float eps, ActView* act,
                  float* normed) {
    const float* weight = data_or_null(norm);
    each_token(e, tokens, [&](int t) {
        const float* row = x + static_cast<size_t>(t) * ldx;
        if (act) e.kernels.quantize(row, n, weight, eps, *act, t);
        if (normed) e.kernels.rms_norm(row, n, weight, eps, normed + static_cast<size_t>(t) * n, n);
    });
}

void rms_norm(Engine& e, const float* x, const Vector& weight, float eps, float* out, int tokens) {
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    const int cols = static_cast<int>(weight.size());
    e.pool.run(tokens, [&](int t, int) {
        const size_t at = static_cast<size_t>(t) * weight.size();
        e.kernels.rms_norm(x + at, cols, weight.data(), eps, out + at, cols);
    });
}

void reserve_products(Engine& e, size_t extra) {
    e.pool.reserve_local(std::max(kPanelScratch + 2 * kAccBytes, extra));
}

void run_panel(const Engine& e, const PackedView& w, int panel, const Rows& rows, bool exact, int t0, int t1, float* acc,
               uint8_t* scratch) {
    if (exact)
        e.kernels.panel_f32(w, panel, rows.x, rows.ldx, t0, t1, acc, scratch);
    else if (needs_float(w, exact))
        e.kernels.panel_mixed(w, panel, {rows.x, rows.ldx, rows.rounded, rows.ld_rounded}, t0, t1, acc, scratch);
    else
        e.kernels.panel(w, panel, rows.act, t0, t1, acc, scratch, e.reading(w.format));
}

void run_products(Engine& e, const Rows& rows, int tokens, bool exact, const Product* products, int count) {
    int panels = 0;
    for (int i = 0; i < count; i++) panels += products[i].w->panels;
    const int chunks = (tokens + kTokenChunk - 1) / kTokenChunk;
    e.pool.run(panels * chunks, [&](int item, int thread) {
        const int t0 = item / panels * kTokenChunk, t1 = std::min(tokens, t0 + kTokenChunk);
        int panel = item % panels;
        const Product* p = products;
        while (panel >= p->w->panels) panel -= (p++)->w->panels;
        uint8_t* scratch = e.pool.local(thread);
        float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
        run_panel(e, *p->w, panel, rows, exact, t0, t1, acc, scratch);
        const int row0 = panel * kPanelRows, n = std::min(kPanelRows, p->w->rows - row0);
        const size_t at = static_cast<size_t>(t0);
        e.kernels.store(acc, t1 - t0, n, p->out + at * p->ldo + row0, p->ldo, p->bias ? p->bias + row0 : nullptr,
                        p->residual ? p->residual + at * p->ldr + row0 : nullptr, p->ldr);
    });
}

void linear(Engine& e, const PackedMatrix& w, const float* x, float* out, int64_t tokens, const float* bias, bool exact) {
    const PackedView& v = w.view();
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e);
    const int n = static_cast<int>(tokens);
    Rows rows{x, static_cast<size_t>(v.cols), {nullptr, act_stride(padded_k(v.cols)), padded_k(v.cols)}};
    if (!needs_float(v, exact)) {
        Carver carver;
        carver.want(&rows.act.base, rows.act.stride * static_cast<size_t>(n));
        carver.carve(e.pool);
        prepare_rows(e, x, rows.ldx, n, v.cols, {}, 0.f, &rows.act, nullptr);
    }
    const Product product{&v, out, static_cast<size_t>(v.rows), bias, nullptr, 0};
    run_products(e, rows, n, exact, &product, 1);
}

}  // namespace ktcore

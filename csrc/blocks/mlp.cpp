// Two regions: gate and up panels side by side with the activation (and the quantisation for down) in the
// epilogue, then down.
#include "blocks/mlp.h"

#include <algorithm>

namespace ktcore {

Activation parse_activation(const std::string& name) {
    if (name == "silu") return Activation::Silu;
    if (name == "relu") return Activation::Relu;
    check(name == "gelu_tanh", "unknown activation '" + name + "'; known: silu, relu, gelu_tanh");
    return Activation::GeluTanh;
}

MLPBlock::MLPBlock(EnginePtr engine, Weight gate, Weight up, Weight down, Vector norm, float norm_eps,
                   const std::string& activation, bool residual, bool exact, Clamp clamp)
    : engine_(std::move(engine)), gate_(std::move(gate)), up_(std::move(up)), down_(std::move(down)),
      norm_(std::move(norm)), eps_(norm_eps), activation_(parse_activation(activation)), residual_(residual),
      exact_(exact), clamp_(clamp) {
    check_clamp(clamp_);
    const PackedView &g = gate_->view(), &u = up_->view(), &d = down_->view();
    check(g.rows == u.rows && g.cols == u.cols, "gate and up must have the same shape");
    check(d.cols == g.rows, "down must have as many columns as gate has rows");
    check(!residual_ || d.rows == g.cols, "a residual needs down's rows to equal gate's columns");
    check_length(norm_, g.cols, "norm");
}

void MLPBlock::forward(const float* x, float* out, int64_t tokens) {
    Engine& e = *engine_;
    const PackedView &g = gate_->view(), &u = up_->view(), &d = down_->view();
    const int n = static_cast<int>(tokens), hidden = g.cols, ffn = g.rows;
    const size_t count = static_cast<size_t>(n);
    const bool in_float = needs_float(g, exact_) || needs_float(u, exact_);
    const bool in_int8 = !needs_float(g, exact_) || !needs_float(u, exact_);
    const bool mid_float = needs_float(d, exact_), normed = in_float && !norm_.empty();
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e);
    Rows in{x, static_cast<size_t>(hidden), {nullptr, act_stride(padded_k(hidden)), padded_k(hidden)}};
    Rows mid{nullptr, static_cast<size_t>(ffn), {nullptr, act_stride(padded_k(ffn)), padded_k(ffn)}};
    float *rows = nullptr, *h = nullptr;
    Carver carver;
    carver.want(&in.act.base, in_int8 ? in.act.stride * count : 0);
    carver.want(&mid.act.base, mid_float ? 0 : mid.act.stride * count);
    carver.want(&rows, normed ? count * static_cast<size_t>(hidden) : 0);
    carver.want(&h, mid_float ? count * static_cast<size_t>(ffn) : 0);
    carver.carve(e.pool);
    if (normed) in.x = rows;
    mid.x = h;
    prepare_rows(e, x, static_cast<size_t>(hidden), n, hidden, norm_, eps_, in_int8 ? &in.act : nullptr,
                 normed ? rows : nullptr);

    const int chunks = (n + kTokenChunk - 1) / kTokenChunk;
    e.pool.run(g.panels * chunks, [&](int item, int thread) {
        const int panel = item % g.panels, row0 = panel * kPanelRows;
        const int t0 = item / g.panels * kTokenChunk, t1 = std::min(n, t0 + kTokenChunk);
        uint8_t* scratch = e.pool.local(thread);
        float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
        float* acc2 = acc + kTokenChunk * kPanelRows;
        run_panel(e, g, panel, in, exact_, t0, t1, acc, scratch);
        run_panel(e, u, panel, in, exact_, t0, t1, acc2, scratch);
        const Activation activation = clamp_.used() ? clamp_.apply(e.kernels, acc, acc2, t1 - t0) : activation_;
        if (mid_float)
            e.kernels.gated_store(acc, acc2, t1 - t0, std::min(kPanelRows, ffn - row0), activation,
                                  h + static_cast<size_t>(t0) * ffn + row0, static_cast<size_t>(ffn));
        else
            e.kernels.gated_quantize(acc, acc2, t1 - t0, activation, mid.act, t0, row0);
    });
    const size_t ldo = static_cast<size_t>(d.rows);
    const Product product{&d, out, ldo, nullptr, residual_ ? x : nullptr, ldo};
    run_products(e, mid, n, exact_, &product, 1);
}

}  // namespace ktcore

// Shared experts are one more group of all tokens, so that they fill the same two regions as the routed ones.
#include "blocks/moe.h"

#include <algorithm>
#include <cmath>

#include "blocks/mlp.h"

namespace ktcore {

MoEBlock::MoEBlock(EnginePtr engine, Bank bank, Weight router, Weight shared_gate_proj, Weight shared_up,
                   Weight shared_down, Weight shared_gate, Config config)
    : engine_(std::move(engine)), bank_(std::move(bank)), router_(std::move(router)), gate_(std::move(shared_gate_proj)),
      up_(std::move(shared_up)), down_(std::move(shared_down)), scale_(std::move(shared_gate)), c_(std::move(config)),
      activation_(parse_activation(c_.activation)) {
    const int hidden = bank_->hidden();
    check(bank_->packed() == bank_->experts(), "all experts must be packed");
    check_router(c_.router);
    check(c_.router.experts == bank_->experts(), "router and experts must be as many");
    check(router_->view().rows == c_.router.experts && router_->view().cols == hidden,
          "the router's weight must be [experts, hidden]");
    check_length(c_.norm, hidden, "norm");
    check(!gate_ == !up_ && !gate_ == !down_, "shared experts need gate, up and down");
    check(!scale_ || gate_, "a shared gate needs shared experts");
    check(!scale_ || (scale_->view().rows == 1 && scale_->view().cols == hidden), "the shared gate must be [1, hidden]");
    check(!c_.weight_on_input || !scale_, "weights on the input do not go with a shared gate");
    check_clamp(c_.clamp);
    check_clamp(c_.shared_clamp);
    check(!c_.shared_clamp.used() || gate_, "a clamped activation of shared experts needs these");
    if (!gate_) return;
    const PackedView &g = gate_->view(), &u = up_->view(), &d = down_->view();
    check(g.cols == hidden && u.cols == hidden && d.rows == hidden && g.rows == u.rows && d.cols == g.rows,
          "shared gate, up and down must be [width, hidden], the same, and [hidden, width]");
}

void MoEBlock::forward(const float* x, float* out, int64_t tokens, const float* before) {
    std::lock_guard<std::mutex> hold(engine_->pool.mutex());
    engine_->pool.reserve_local(expert_scratch(bank_->hidden(), std::max(bank_->ffn(), gate_ ? gate_->view().rows : 0)));
    const size_t step = static_cast<size_t>(kExpertTokens) * static_cast<size_t>(bank_->hidden());
    for (int64_t t = 0; t < tokens; t += kExpertTokens, x += step, out += step) {
        pass(x, out, static_cast<int>(std::min<int64_t>(kExpertTokens, tokens - t)), before);
        if (before) before += step;
    }
}

void MoEBlock::pass(const float* x, float* out, int n, const float* before) {
    Engine& e = *engine_;
    const int hidden = bank_->hidden(), k = padded_k(hidden), top_k = c_.router.top_k;
    const size_t count = static_cast<size_t>(n), ldx = static_cast<size_t>(hidden), experts = static_cast<size_t>(c_.router.experts);
    ExpertRun run{{x, ldx, {nullptr, act_stride(k), k}}, n, hidden, nullptr, out, c_.residual ? x : nullptr, activation_,
                  c_.weight_on_input, c_.exact};
    float *normed = nullptr, *logits = nullptr, *scratch = nullptr, *weights = nullptr, *gates = nullptr;
    int64_t* ids = nullptr;
    // The sorted rows are not known yet: room for all choices.
    const ExpertViews& w = bank_->shape();
    const size_t mid_row = needs_float(w.down, c_.exact) ? 4 * static_cast<size_t>(w.down.cols) : act_stride(padded_k(w.down.cols));
    const size_t shared_row = !down_ ? 0 : std::max(4 * static_cast<size_t>(down_->view().cols), act_stride(padded_k(down_->view().cols)));
    const size_t groups = std::min(experts, count * static_cast<size_t>(top_k)) + 1;
    Carver carver;
    carver.want(&run.in.act.base, run.in.act.stride * count);
    carver.want(&normed, c_.norm.empty() ? 0 : count * ldx);
    carver.want(&logits, count * experts);
    carver.want(&scratch, count * 2 * experts);
    carver.want(&weights, count * static_cast<size_t>(top_k));
    carver.want(&ids, count * static_cast<size_t>(top_k));
    carver.want(&gates, count);
    carver.want(&run.mid, count * static_cast<size_t>(top_k) * mid_row + count * shared_row + 64 * groups);
    carver.carve(e.pool);
    prepare_rows(e, x, ldx, n, hidden, c_.norm, c_.norm_eps, &run.in.act, c_.norm.empty() ? nullptr : normed);
    if (!c_.norm.empty()) run.in.x = normed;

    const Product products[2] = {{&router_->view(), logits, experts, nullptr, nullptr, 0},
                                 {scale_ ? &scale_->view() : nullptr, gates, 1, nullptr, nullptr, 0}};
    if (before) run_products(e, {before, ldx, {}}, n, true, products, 1);
    const int first = before ? 1 : 0, last = scale_ ? 2 : 1;
    if (first < last) run_products(e, run.in, n, true, products + first, last - first);
    choose_experts(e, c_.router, logits, scratch, experts, n, ids, weights);
    for (size_t t = 0; scale_ && t < count; t++) gates[t] = 1.f / (1.f + std::exp(-gates[t]));
    plan_.clear();
    plan_.assign(*bank_, ids, weights, n, top_k, c_.exact, c_.clamp);
    if (gate_)
        plan_.add_all({gate_->view(), up_->view(), down_->view()}, scale_ ? gates : nullptr, n, c_.exact, c_.shared_clamp);
    run_experts(e, plan_, run);
}

}  // namespace ktcore

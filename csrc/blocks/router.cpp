// Scores, group filter, top-k and weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, generalised).
#include "blocks/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ktcore {
namespace {
void scores_of(const RouterConfig& c, float* logits, int n) {
    if (c.root_softplus) {
        // without overflow, and exact where exp is small
        for (int i = 0; i < n; i++) logits[i] = std::sqrt(std::max(logits[i], 0.f) + std::log1p(std::exp(-std::fabs(logits[i]))));
        return;
    }
    if (c.sigmoid) {
        for (int i = 0; i < n; i++) logits[i] = 1.f / (1.f + std::exp(-logits[i]));
        return;
    }
    const float top = *std::max_element(logits, logits + n);
    float sum = 0.f;
    for (int i = 0; i < n; i++) sum += logits[i] = std::exp(logits[i] - top);
    for (int i = 0; i < n; i++) logits[i] /= sum;
}

// Indices of the k largest entries in falling order, the lower one first of equals, NaNs behind all numbers. One pass: an
// entry is looked at twice only if it is among the k largest so far.
template <class Index>
void largest(const float* v, int n, int k, Index* out) {
    const auto beats = [v](int i, Index j) { return v[i] > v[j] || (std::isnan(v[j]) && !std::isnan(v[i])); };
    int held = 0;
    for (int i = 0; i < n; i++) {
        if (held == k && !beats(i, out[k - 1])) continue;
        int at = held < k ? held++ : k - 1;
        for (; at > 0 && beats(i, out[at - 1]); at--) out[at] = out[at - 1];
        out[at] = i;
    }
}

void mask_groups(const RouterConfig& c, float* choice, float* score) {
    const int size = c.experts / c.groups;
    for (int g = 0; g < c.groups; g++) {
        const float* v = choice + g * size;
        const int two = c.top2_sum && size > 1 ? 2 : 1;
        int best[2];
        largest(v, size, two, best);
        score[g] = v[best[0]] + (two == 2 ? v[best[1]] : 0.f);
    }
    const float none = -std::numeric_limits<float>::infinity(), fill = c.top2_sum ? none : 0.f;
    // A kept group is one that fewer than groups_kept others beat.
    for (int g = 0; g < c.groups; g++) {
        int better = 0;
        for (int o = 0; o < c.groups; o++) better += score[o] > score[g] || (score[o] == score[g] && o < g);
        if (better >= c.groups_kept) std::fill(choice + g * size, choice + (g + 1) * size, fill);
    }
}
}  // namespace

void check_router(const RouterConfig& c) {
    check(c.experts > 0 && c.experts <= 1 << 20 && c.top_k > 0 && c.top_k <= c.experts, "top_k must be 1 to experts");
    check(c.groups > 0 && c.experts % c.groups == 0 && c.groups_kept > 0 && c.groups_kept <= c.groups,
          "experts must lie in equal groups, of which 1 to all are kept");
    check_length(c.bias, c.experts, "router bias");
    check_length(c.logit_bias, c.experts, "router logit_bias");
    check(!c.on_logits || (c.bias.empty() && c.groups == 1), "a choice by logits has neither groups nor a bias");
}

void choose_experts(const RouterConfig& c, float* logits, float* scratch, int64_t* ids, float* weights) {
    for (size_t i = 0; i < c.logit_bias.size(); i++) logits[i] += c.logit_bias[i];
    if (!c.on_logits) scores_of(c, logits, c.experts);
    float* choice = scratch;
    for (int i = 0; i < c.experts; i++) choice[i] = c.bias.empty() ? logits[i] : logits[i] + c.bias[static_cast<size_t>(i)];
    if (c.groups > 1) mask_groups(c, choice, scratch + c.experts);
    largest(choice, c.experts, c.top_k, ids);
    for (int k = 0; k < c.top_k; k++) weights[k] = logits[ids[k]];
    if (c.on_logits) scores_of(c, weights, c.top_k);
    float sum = 0.f;
    for (int k = 0; k < c.top_k; k++) sum += weights[k];
    const float factor = (c.renormalise ? 1.f / (sum + c.renorm_eps) : 1.f) * c.scale;
    for (int k = 0; k < c.top_k; k++) weights[k] *= factor;
}

void choose_experts(Engine& e, const RouterConfig& c, float* logits, float* scratch, size_t ld, int tokens, int64_t* ids,
                    float* weights) {
    each_token(e, tokens, [&](int t) {
        const size_t at = static_cast<size_t>(t), k = static_cast<size_t>(c.top_k);
        choose_experts(c, logits + at * ld, scratch + at * 2 * ld, ids + at * k, weights + at * k);
    });
}

RouterBlock::RouterBlock(EnginePtr engine, Weight weight, RouterConfig config)
    : engine_(std::move(engine)), weight_(std::move(weight)), c_(std::move(config)) {
    check_router(c_);
    check(weight_->view().rows == c_.experts, "the router's weight must have one row for each expert");
}

void RouterBlock::forward(const float* x, int64_t* ids, float* weights, int64_t tokens) {
    Engine& e = *engine_;
    const PackedView& w = weight_->view();
    const int n = static_cast<int>(tokens);
    const size_t count = static_cast<size_t>(n), ld = static_cast<size_t>(c_.experts);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e);
    float *logits = nullptr, *scratch = nullptr;
    Carver carver;
    carver.want(&logits, count * ld);
    carver.want(&scratch, count * 2 * ld);
    carver.carve(e.pool);
    const Rows rows{x, static_cast<size_t>(w.cols), {}};
    const Product product{&w, logits, ld, nullptr, nullptr, 0};
    run_products(e, rows, n, true, &product, 1);
    choose_experts(e, c_, logits, scratch, ld, n, ids, weights);
}

}  // namespace ktcore

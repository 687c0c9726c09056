// Sorting tokens by expert, and the block that runs routed experts alone.
#include "blocks/experts.h"

#include <algorithm>
#include <cmath>

#include "blocks/mlp.h"

namespace ktcore {

void ExpertPlan::clear() {
    groups.clear();
    token.clear();
    weight.clear();
    mid_bytes = 0;
}

void ExpertPlan::add_group(const ExpertViews& w, int start, int count, bool exact, const Clamp& clamp) {
    Group g{w, start, count, mid_bytes, 0, padded_k(w.down.cols), clamp};
    g.mid_stride = needs_float(w.down, exact) ? sizeof(float) * static_cast<size_t>(w.down.cols) : act_stride(g.mid_k);
    mid_bytes += (g.mid_stride * static_cast<size_t>(count) + 63) / 64 * 64;
    groups.push_back(g);
}

void ExpertPlan::assign(const ExpertBank& bank, const int64_t* ids, const float* weights, int tokens, int top_k,
                        bool exact, const Clamp& clamp) {
    const int experts = bank.experts(), pairs = tokens * top_k;
    cursor.assign(static_cast<size_t>(experts), 0);
    for (int i = 0; i < pairs; i++) {
        check(ids[i] < experts, "expert " + std::to_string(ids[i]) + " is not one of " + std::to_string(experts));
        if (ids[i] >= 0) cursor[static_cast<size_t>(ids[i])]++;
    }
    int total = 0;
    for (int e = 0; e < experts; e++) {
        int& at = cursor[static_cast<size_t>(e)];
        const int count = at;
        at = total;
        if (count > 0) {
            add_group(bank.expert(e), total, count, exact, clamp);
            bank.note(e, count);
        }
        total += count;
    }
    token.resize(static_cast<size_t>(total));
    weight.resize(static_cast<size_t>(total));
    for (int i = 0; i < pairs; i++) {
        if (ids[i] < 0) continue;
        const size_t at = static_cast<size_t>(cursor[static_cast<size_t>(ids[i])]++);
        token[at] = i / top_k;
        weight[at] = weights[i];
    }
}

void ExpertPlan::add_all(const ExpertViews& w, const float* weights, int tokens, bool exact, const Clamp& clamp) {
    add_group(w, static_cast<int>(token.size()), tokens, exact, clamp);
    for (int t = 0; t < tokens; t++) {
        token.push_back(t);
        weight.push_back(weights ? weights[t] : 1.f);
    }
}

ExpertsBlock::ExpertsBlock(EnginePtr engine, Bank bank, const std::string& activation, bool weight_on_input, bool exact,
                           Clamp clamp)
    : engine_(std::move(engine)), bank_(std::move(bank)), activation_(parse_activation(activation)),
      weight_on_input_(weight_on_input), exact_(exact), clamp_(clamp) {
    check_clamp(clamp_);
    check(bank_->packed() == bank_->experts(), "only " + std::to_string(bank_->packed()) + " of " +
                                                   std::to_string(bank_->experts()) + " experts are packed");
}

void ExpertsBlock::forward(const float* x, const int64_t* ids, const float* weights, float* out, int64_t tokens,
                           int64_t top_k) {
    Engine& e = *engine_;
    const ExpertViews& w = bank_->shape();
    const int hidden = bank_->hidden(), k = padded_k(hidden);
    const size_t ldx = static_cast<size_t>(hidden);
    const bool int8 = !needs_float(w.gate, exact_) || !needs_float(w.up, exact_);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    e.pool.reserve_local(expert_scratch(hidden, bank_->ffn()));
    for (int64_t t0 = 0; t0 < tokens; t0 += kExpertTokens, x += kExpertTokens * ldx, out += kExpertTokens * ldx) {
        const int n = static_cast<int>(std::min<int64_t>(kExpertTokens, tokens - t0));
        plan_.clear();
        plan_.assign(*bank_, ids + t0 * top_k, weights + t0 * top_k, n, static_cast<int>(top_k), exact_,
                     clamp_);
        ExpertRun run{{x, ldx, {nullptr, act_stride(k), k}}, n,          hidden, nullptr, out, nullptr, activation_,
                      weight_on_input_,                      exact_};
        Carver carver;
        carver.want(&run.in.act.base, int8 ? run.in.act.stride * static_cast<size_t>(n) : 0);
        carver.want(&run.mid, plan_.mid_bytes);
        carver.carve(e.pool);
        if (int8) prepare_rows(e, x, ldx, n, hidden, {}, 0.f, &run.in.act, nullptr);
        run_experts(e, plan_, run);
    }
}

}  // namespace ktcore

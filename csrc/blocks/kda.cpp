// Kimi delta attention of a layer: projections, convolutions, the recurrence a head, gated norm, output product.
#include "blocks/kda.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ktcore {
namespace {
constexpr float kL2Eps = 1e-6f;     // under the root of q's and k's norm
}  // namespace

struct KimiDeltaBlock::Buffers {
    Rows in, mid;
    ActView low_act{};
    float *normed = nullptr, *mixed = nullptr, *conv = nullptr, *f_low = nullptr, *g_low = nullptr, *f = nullptr,
          *gate = nullptr, *beta = nullptr, *context = nullptr;
};

KimiDeltaBlock::KimiDeltaBlock(EnginePtr engine, Weights weights, Config config)
    : engine_(std::move(engine)), w_(std::move(weights)), c_(std::move(config)) {
    check(c_.heads > 0 && c_.heads <= 1024 && c_.dim > 0 && c_.dim % 16 == 0 && c_.dim <= 1024,
          "there must be 1 to 1024 heads, whose width is a multiple of 16, at most 1024");
    check(c_.width > 1 && c_.width <= kMaxConvWidth, "the convolution must be 2 to 16 tokens wide");
    check(c_.bound <= 0.f && std::isfinite(c_.bound), "bound must be negative, or 0 for none");
    const int inner = c_.inner(), hidden = w_.q->view().cols;
    const auto fits = [](const Weight& w, int rows, int cols) { return w->view().rows == rows && w->view().cols == cols; };
    check(fits(w_.q, inner, hidden) && fits(w_.k, inner, hidden) && fits(w_.v, inner, hidden),
          "q, k and v must be [heads * dim, hidden]");
    check(fits(w_.f_b, inner, w_.f_a->view().rows) && w_.f_a->view().cols == hidden, "f_a and f_b must be [rank, hidden] and [heads * dim, rank]");
    check(fits(w_.g_b, inner, w_.g_a->view().rows) && w_.g_a->view().cols == hidden, "g_a and g_b must be [rank, hidden] and [heads * dim, rank]");
    check(fits(w_.b, c_.heads, hidden), "b must be [heads, hidden]");
    check(w_.o->view().cols == inner && (!c_.residual || w_.o->view().rows == hidden), "o must be [hidden, heads * dim]");
    const size_t n = 3 * static_cast<size_t>(inner), width = static_cast<size_t>(c_.width), d = static_cast<size_t>(c_.dim);
    check(c_.conv.size() == n * width, "conv must be [3 * heads * dim, width]");
    check(c_.rates.size() == static_cast<size_t>(c_.heads) && c_.dt_bias.size() == static_cast<size_t>(inner),
          "rates must have heads values, dt_bias heads * dim");
    check(c_.out_norm.size() == d, "out_norm must have dim values");
    check_length(c_.norm, hidden, "norm");
    taps_.resize(n * width);
    for (size_t c = 0; c < n; c++)
        for (size_t w = 0; w < width; w++) taps_[w * n + c] = c_.conv[c * width + w];
    // x / sqrt(sum + eps) = x / sqrt(sum / d + eps / d) / sqrt(d); q is divided by sqrt(d) once more.
    q_scale_.assign(d, 1.f / static_cast<float>(d));
    k_scale_.assign(d, 1.f / std::sqrt(static_cast<float>(d)));
}

void KimiDeltaBlock::forward(const float* x, float* out, const Step& step, const std::vector<int32_t>& own,
                             const DeltaStates& states) {
    Engine& e = *engine_;
    const int n = step.tokens(), hidden = w_.q->view().cols, inner = c_.inner();
    const size_t count = static_cast<size_t>(n), ldx = static_cast<size_t>(hidden), ld = static_cast<size_t>(inner);
    const size_t f_rank = static_cast<size_t>(w_.f_a->view().rows), g_rank = static_cast<size_t>(w_.g_a->view().rows);
    const std::vector<KeptState> none;
    const StateSlots slots(step, own, none, states.slots);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e, kda_scratch(c_.dim, c_.dim));
    Buffers b;
    b.in = {x, ldx, {nullptr, act_stride(padded_k(hidden)), padded_k(hidden)}};
    b.mid = {nullptr, ld, {nullptr, act_stride(padded_k(inner)), padded_k(inner)}};
    const int low = padded_k(static_cast<int>(std::max(f_rank, g_rank)));
    b.low_act = {nullptr, act_stride(low), low};
    Carver carver;
    carver.want(&b.in.act.base, b.in.act.stride * count);
    carver.want(&b.mid.act.base, b.mid.act.stride * count);
    carver.want(&b.low_act.base, b.low_act.stride * count);
    carver.want(&b.normed, c_.norm.empty() ? 0 : count * ldx);
    carver.want(&b.mixed, 3 * count * ld);
    carver.want(&b.conv, 3 * count * ld);
    carver.want(&b.f_low, count * f_rank);
    carver.want(&b.g_low, count * g_rank);
    carver.want(&b.f, count * ld);
    carver.want(&b.gate, count * ld);
    carver.want(&b.beta, count * static_cast<size_t>(c_.heads));
    carver.want(&b.context, count * ld);
    carver.carve(e.pool);
    project(x, n, b);
    expand(w_.f_b, b.f_low, f_rank, n, b.f, b);
    expand(w_.g_b, b.g_low, g_rank, n, b.gate, b);
    convolve(e, step, slots, states, taps_, c_.width, 3 * c_.inner(), b.mixed, b.conv);
    mix(step, slots, states, b);
    const PackedView& o = w_.o->view();
    if (!needs_float(o, c_.exact)) prepare_rows(e, b.context, ld, n, inner, {}, 0.f, &b.mid.act, nullptr);
    b.mid.x = b.context;
    const size_t ldo = static_cast<size_t>(o.rows);
    const Product product{&o, out, ldo, nullptr, c_.residual ? x : nullptr, ldo};
    run_products(e, b.mid, n, c_.exact, &product, 1);
}

// mixed [T][3 * inner], the low-rank rows of decay and gate, and beta before its sigmoid.
void KimiDeltaBlock::project(const float* x, int tokens, Buffers& b) {
    Engine& e = *engine_;
    const size_t ld = static_cast<size_t>(c_.inner()), heads = static_cast<size_t>(c_.heads);
    prepare_rows(e, x, b.in.ldx, tokens, w_.q->view().cols, c_.norm, c_.norm_eps, &b.in.act, c_.norm.empty() ? nullptr : b.normed);
    if (!c_.norm.empty()) b.in.x = b.normed;
    const PackedView &fa = w_.f_a->view(), &ga = w_.g_a->view();
    const Product products[6] = {{&w_.q->view(), b.mixed, 3 * ld, nullptr, nullptr, 0},
                                 {&w_.k->view(), b.mixed + ld, 3 * ld, nullptr, nullptr, 0},
                                 {&w_.v->view(), b.mixed + 2 * ld, 3 * ld, nullptr, nullptr, 0},
                                 {&fa, b.f_low, static_cast<size_t>(fa.rows), nullptr, nullptr, 0},
                                 {&ga, b.g_low, static_cast<size_t>(ga.rows), nullptr, nullptr, 0},
                                 {&w_.b->view(), b.beta, heads, nullptr, nullptr, 0}};
    run_products(e, b.in, tokens, c_.exact, products, 6);
}

// out [T][inner] = w low, low [T][rank].
void KimiDeltaBlock::expand(const Weight& w, float* low, size_t rank, int tokens, float* out, Buffers& b) {
    Engine& e = *engine_;
    const int k = padded_k(static_cast<int>(rank));
    Rows rows{low, rank, {b.low_act.base, act_stride(k), k}};
    if (!needs_float(w->view(), c_.exact)) prepare_rows(e, low, rank, tokens, static_cast<int>(rank), {}, 0.f, &rows.act, nullptr);
    const Product product{&w->view(), out, static_cast<size_t>(c_.inner()), nullptr, nullptr, 0};
    run_products(e, rows, tokens, c_.exact, &product, 1);
}

// The recurrence of each head over its normed queries and keys, its norm and its gate.
void KimiDeltaBlock::mix(const Step& step, const StateSlots& slots, const DeltaStates& states, Buffers& b) {
    Engine& e = *engine_;
    const size_t heads = static_cast<size_t>(c_.heads), d = static_cast<size_t>(c_.dim), inner = heads * d;
    const float eps = kL2Eps / static_cast<float>(c_.dim);
    e.pool.run(step.sequences() * c_.heads, [&](int item, int thread) {
        const int seq = item / c_.heads, n = step.queries(seq);
        if (n == 0) return;
        const size_t t0 = static_cast<size_t>(step.q_start(seq)), head = static_cast<size_t>(item % c_.heads);
        float* state = states.state + (slots.of(seq) * heads + head) * d * d;
        if (step.context(seq) == n) std::memset(state, 0, sizeof(float) * d * d);
        for (size_t t = t0; t < t0 + static_cast<size_t>(n); t++) {
            float* q = b.conv + t * 3 * inner + head * d;
            e.kernels.rms_norm(q, c_.dim, q_scale_.data(), eps, q, c_.dim);
            e.kernels.rms_norm(q + inner, c_.dim, k_scale_.data(), eps, q + inner, c_.dim);
            float& beta = b.beta[t * heads + head];
            beta = 1.f / (1.f + std::exp(-beta));
        }
        const float* q = b.conv + t0 * 3 * inner + head * d;
        float* out = b.context + t0 * inner + head * d;
        const KdaItem work{q, q + inner, q + 2 * inner, 3 * inner, b.f + t0 * inner + head * d, inner,
                           c_.dt_bias.data() + head * d, c_.rates[head], c_.bound, b.beta + t0 * heads + head, heads,
                           state, out, inner, n, c_.dim, c_.dim};
        e.kernels.kda(work, e.pool.local(thread));
        for (int t = 0; t < n; t++) {
            float* y = out + static_cast<size_t>(t) * inner;
            e.kernels.rms_norm(y, c_.dim, c_.out_norm.data(), c_.out_eps, y, c_.dim);
            e.kernels.sigmoid_gate(y, b.gate + (t0 + static_cast<size_t>(t)) * inner + head * d, c_.dim);
        }
    });
}

}  // namespace ktcore

// Norms of the streams, two products of low rank that make the mixture, and the injection.
#include "blocks/gated_streams.h"

#include <cmath>

namespace ktcore {

GatedStreamsBlock::GatedStreamsBlock(EnginePtr engine, Weight down, Weight up, Weight inject, Config config)
    : engine_(std::move(engine)), down_(std::move(down)), up_(std::move(up)), inject_(std::move(inject)),
      c_(std::move(config)) {
    check(c_.streams >= 1 && c_.streams <= kMaxStreams, "there must be 1 to " + std::to_string(kMaxStreams) + " streams");
    check(c_.hidden > 0 && c_.hidden % 16 == 0, "hidden must be a multiple of 16");
    const int width = c_.streams * c_.hidden;
    const PackedView &d = down_->view(), &u = up_->view();
    check(d.cols == width && u.rows == width && u.cols == d.rows, "down and up must be [rank, streams * hidden] and its turn");
    check(!inject_ || (inject_->view().rows == c_.streams && inject_->view().cols == width),
          "inject must be [streams, streams * hidden]");
    check(static_cast<int>(c_.norm.size()) == width, "norm must have streams * hidden values");
}

void GatedStreamsBlock::enter(const float* x, float* out, float* carry, int tokens) {
    Engine& e = *engine_;
    const PackedView &d = down_->view(), &u = up_->view();
    const int width = d.cols, rank = d.rows, n = c_.streams;
    const size_t count = static_cast<size_t>(tokens), ld = static_cast<size_t>(width), ldr = static_cast<size_t>(rank);
    const float share = 1.f / static_cast<float>(n);
    const bool in_int8 = !needs_float(d, c_.exact) || (inject_ && !needs_float(inject_->view(), c_.exact));
    const bool mid_int8 = !needs_float(u, c_.exact);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e);
    Rows in{nullptr, ld, {nullptr, act_stride(padded_k(width)), padded_k(width)}};
    Rows mid{nullptr, ldr, {nullptr, act_stride(padded_k(rank)), padded_k(rank)}};
    float *normed = nullptr, *low = nullptr, *mix = nullptr;
    Carver carver;
    carver.want(&in.act.base, in_int8 ? in.act.stride * count : 0);
    carver.want(&mid.act.base, mid_int8 ? mid.act.stride * count : 0);
    carver.want(&normed, count * ld);
    carver.want(&low, count * ldr);
    carver.want(&mix, count * ld);
    carver.carve(e.pool);
    in.x = normed;
    mid.x = low;
    each_token(e, tokens, [&](int t) {
        float* row = normed + static_cast<size_t>(t) * ld;
        for (int s = 0; s < n; s++) {
            const int at = s * c_.hidden;
            e.kernels.rms_norm(x + static_cast<size_t>(t) * ld + at, c_.hidden, c_.norm.data() + at, c_.eps, row + at, c_.hidden);
        }
        if (in_int8) e.kernels.quantize(row, width, nullptr, 0.f, in.act, t);
    });
    Product products[2] = {{&d, low, ldr, nullptr, nullptr, 0}, {}};
    if (inject_) products[1] = {&inject_->view(), carry, static_cast<size_t>(n), nullptr, nullptr, 0};
    run_products(e, in, tokens, c_.exact, products, inject_ ? 2 : 1);
    each_token(e, tokens, [&](int t) {
        float* row = low + static_cast<size_t>(t) * ldr;
        for (int r = 0; r < rank; r++) {
            const float v = row[r] * share;
            row[r] = v / (1.f + std::exp(-v));
        }
        if (mid_int8) e.kernels.quantize(row, rank, nullptr, 0.f, mid.act, t);
        if (!inject_) return;
        float* gates = carry + static_cast<size_t>(t) * static_cast<size_t>(n);
        for (int s = 0; s < n; s++) gates[s] = 2.f / (1.f + std::exp(-gates[s] * share));
    });
    const Product whole{&u, mix, ld, nullptr, nullptr, 0};
    run_products(e, mid, tokens, c_.exact, &whole, 1);
    float shares[kMaxStreams];
    for (float& s : shares) s = share;
    each_token(e, tokens, [&](int t) {
        float* row = normed + static_cast<size_t>(t) * ld;
        e.kernels.sigmoid_gate(row, mix + static_cast<size_t>(t) * ld, width);
        e.kernels.stream_enter(row, n, c_.hidden, shares, out + static_cast<size_t>(t) * static_cast<size_t>(c_.hidden));
    });
}

void GatedStreamsBlock::leave(const float* x, const float* y, const float* carry, float* out, int tokens) {
    Engine& e = *engine_;
    const size_t n = static_cast<size_t>(c_.streams), hidden = static_cast<size_t>(c_.hidden);
    check(inject_ != nullptr, "the end of the streams has no way back");
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    each_token(e, tokens, [&](int token) {
        const size_t t = static_cast<size_t>(token);
        const float* branch = y + t * hidden;
        for (size_t s = 0; s < n; s++) {
            const float gate = carry[t * n + s], *from = x + (t * n + s) * hidden;
            float* to = out + (t * n + s) * hidden;
            for (size_t i = 0; i < hidden; i++) to[i] = from[i] + gate * branch[i];
        }
    });
}

}  // namespace ktcore

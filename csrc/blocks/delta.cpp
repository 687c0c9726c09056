// The gated delta net of a layer: projections, convolution, the recurrence a head, gated norm, output product.
#include "blocks/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ktcore {
namespace {
constexpr int kSerialTokens = 4;
constexpr float kL2Eps = 1e-6f;     // under the root of q's and k's norm
}  // namespace

struct DeltaBlock::Buffers {
    float *mixed = nullptr, *conv = nullptr, *z = nullptr, *beta = nullptr, *g = nullptr, *context = nullptr;
};

DeltaBlock::DeltaBlock(EnginePtr engine, Weight qkv, Weight z, Weight b, Weight a, Weight o, Config config)
    : engine_(std::move(engine)), qkv_(std::move(qkv)), z_(std::move(z)), b_(std::move(b)), a_(std::move(a)),
      o_(std::move(o)), c_(std::move(config)) {
    check(c_.key_heads > 0 && c_.value_heads > 0 && c_.value_heads % c_.key_heads == 0,
          "value_heads must be a multiple of key_heads");
    check(c_.key_dim > 0 && c_.key_dim % 16 == 0 && c_.key_dim <= 1024 && c_.value_dim > 0 && c_.value_dim % 16 == 0 &&
              c_.value_dim <= 1024,
          "key_dim and value_dim must be multiples of 16, at most 1024");
    check(c_.width > 1 && c_.width <= kMaxConvWidth, "the convolution must be 2 to 16 tokens wide");
    const int64_t channels = c_.channels(), heads = c_.value_heads, inner = heads * c_.value_dim;
    const PackedView &vq = qkv_->view(), &vz = z_->view(), &vb = b_->view(), &va = a_->view(), &vo = o_->view();
    check(vq.rows == channels, "qkv must have 2 * key_heads * key_dim + value_heads * value_dim rows");
    check(vz.rows == inner && vz.cols == vq.cols, "z must be [value_heads * value_dim, hidden]");
    check(vb.rows == heads && va.rows == heads && vb.cols == vq.cols && va.cols == vq.cols,
          "b and a must be [value_heads, hidden]");
    check(vo.cols == inner && (!c_.residual || vo.rows == vq.cols), "o must be [hidden, value_heads * value_dim]");
    check(static_cast<int64_t>(c_.conv.size()) == channels * c_.width, "conv must be [channels, width]");
    check(static_cast<int64_t>(c_.decay.size()) == heads && static_cast<int64_t>(c_.dt_bias.size()) == heads,
          "decay and dt_bias must have value_heads values");
    check(static_cast<int>(c_.out_norm.size()) == c_.value_dim, "out_norm must have value_dim values");
    check_length(c_.norm, vq.cols, "norm");
    const size_t n = static_cast<size_t>(channels), width = static_cast<size_t>(c_.width);
    taps_.resize(n * width);
    for (size_t c = 0; c < n; c++)
        for (size_t w = 0; w < width; w++) taps_[w * n + c] = c_.conv[c * width + w];
    // x / sqrt(sum + eps) = x / sqrt(sum / d + eps / d) / sqrt(d); q is divided by sqrt(d) once more.
    const size_t d = static_cast<size_t>(c_.key_dim);
    q_scale_.assign(d, 1.f / static_cast<float>(d));
    k_scale_.assign(d, 1.f / std::sqrt(static_cast<float>(d)));
}

void DeltaBlock::forward(const float* x, float* out, const Step& step, const std::vector<int32_t>& own,
                         const DeltaStates& states, const std::vector<KeptState>& kept) {
    Engine& e = *engine_;
    const PackedView &vq = qkv_->view(), &vz = z_->view(), &vb = b_->view(), &va = a_->view(), &vo = o_->view();
    const int n = step.tokens(), hidden = vq.cols;
    const size_t count = static_cast<size_t>(n), ldx = static_cast<size_t>(hidden), inner = static_cast<size_t>(vo.cols),
                 channels = static_cast<size_t>(vq.rows), heads = static_cast<size_t>(vb.rows);
    const StateSlots slots(step, own, kept, states.slots);
    bool any_float = false, any_int8 = false;
    for (const PackedView* w : {&vq, &vz, &vb, &va}) (needs_float(*w, c_.exact) ? any_float : any_int8) = true;
    const bool normed = any_float && !c_.norm.empty(), out_int8 = !needs_float(vo, c_.exact);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    reserve_products(e, delta_scratch(c_.key_dim, c_.value_dim));
    Rows in{x, ldx, {nullptr, act_stride(padded_k(hidden)), padded_k(hidden)}};
    Rows mid{nullptr, inner, {nullptr, act_stride(padded_k(vo.cols)), padded_k(vo.cols)}};
    Buffers b;
    float* rows = nullptr;
    Carver carver;
    carver.want(&in.act.base, any_int8 ? in.act.stride * count : 0);
    carver.want(&mid.act.base, out_int8 ? mid.act.stride * count : 0);
    carver.want(&rows, normed ? count * ldx : 0);
    carver.want(&b.mixed, count * channels);
    carver.want(&b.conv, count * channels);
    carver.want(&b.z, count * inner);
    carver.want(&b.beta, count * heads);
    carver.want(&b.g, count * heads);
    carver.want(&b.context, count * inner);
    carver.carve(e.pool);
    if (normed) in.x = rows;
    mid.x = b.context;
    prepare_rows(e, x, ldx, n, hidden, c_.norm, c_.norm_eps, any_int8 ? &in.act : nullptr, normed ? rows : nullptr);
    const Product products[4] = {{&vq, b.mixed, channels, nullptr, nullptr, 0},
                                 {&vz, b.z, inner, nullptr, nullptr, 0},
                                 {&vb, b.beta, heads, nullptr, nullptr, 0},
                                 {&va, b.g, heads, nullptr, nullptr, 0}};
    run_products(e, in, n, c_.exact, products, 4);
    convolve(e, step, slots, states, taps_, c_.width, c_.channels(), b.mixed, b.conv);
    if (n <= kSerialTokens) {
        for (int t = 0; t < n; t++) prepare(t, b);
    } else {
        e.pool.run(n, [&](int t, int) { prepare(t, b); });
    }
    mix(step, slots, states, b);
    if (out_int8) prepare_rows(e, b.context, inner, n, vo.cols, {}, 0.f, &mid.act, nullptr);
    const size_t ldo = static_cast<size_t>(vo.rows);
    const Product o{&vo, out, ldo, nullptr, c_.residual ? x : nullptr, ldo};
    run_products(e, mid, n, c_.exact, &o, 1);
}

// L2 norms of a token's queries and keys, and its gates.
void DeltaBlock::prepare(int token, Buffers& b) const {
    const size_t t = static_cast<size_t>(token), heads = static_cast<size_t>(c_.value_heads), d = static_cast<size_t>(c_.key_dim);
    float* row = b.conv + t * static_cast<size_t>(c_.channels());
    const float eps = kL2Eps / static_cast<float>(c_.key_dim);
    for (int h = 0; h < 2 * c_.key_heads; h++) {
        float* x = row + static_cast<size_t>(h) * d;
        const Vector& scale = h < c_.key_heads ? q_scale_ : k_scale_;
        engine_->kernels.rms_norm(x, c_.key_dim, scale.data(), eps, x, c_.key_dim);
    }
    for (size_t h = 0; h < heads; h++) {
        float& beta = b.beta[t * heads + h];
        float& g = b.g[t * heads + h];
        beta = 1.f / (1.f + std::exp(-beta));
        const float a = g + c_.dt_bias[h];
        g = c_.decay[h] * (a > 20.f ? a : std::log1p(std::exp(a)));
    }
}

// The recurrence of each head, its norm and its gate.
void DeltaBlock::mix(const Step& step, const StateSlots& slots, const DeltaStates& states, Buffers& b) {
    Engine& e = *engine_;
    const size_t channels = static_cast<size_t>(c_.channels()), heads = static_cast<size_t>(c_.value_heads),
                 dk = static_cast<size_t>(c_.key_dim), dv = static_cast<size_t>(c_.value_dim), inner = heads * dv;
    const int group = c_.tiled ? 1 : c_.value_heads / c_.key_heads;
    const size_t keys = static_cast<size_t>(c_.key_heads) * dk;
    e.pool.run(step.sequences() * c_.value_heads, [&](int item, int thread) {
        const int seq = item / c_.value_heads, h = item % c_.value_heads, n = step.queries(seq);
        if (n == 0) return;
        const size_t t0 = static_cast<size_t>(step.q_start(seq)), head = static_cast<size_t>(h);
        float* state = states.state + (slots.of(seq) * heads + head) * dk * dv;
        if (step.context(seq) == n) std::memset(state, 0, sizeof(float) * dk * dv);
        const auto run = [&](int begin, int end) {
            const size_t t = t0 + static_cast<size_t>(begin);
            const float* row = b.conv + t * channels + static_cast<size_t>(h / group % c_.key_heads) * dk;
            const DeltaItem work{row, row + keys, b.conv + t * channels + 2 * keys + head * dv, channels, channels,
                                 b.g + t * heads + head, b.beta + t * heads + head, heads, state,
                                 b.context + t * inner + head * dv, inner, end - begin, c_.key_dim, c_.value_dim};
            e.kernels.delta(work, e.pool.local(thread));
        };
        const KeptState k = slots.keep(seq);
        const int first = k.slot < 0 ? n : k.tokens;
        run(0, first);
        if (k.slot >= 0)
            std::memcpy(states.state + (static_cast<size_t>(k.slot) * heads + head) * dk * dv, state, sizeof(float) * dk * dv);
        if (first < n) run(first, n);
        float* out = b.context + t0 * inner + head * dv;
        for (int t = 0; t < n; t++) {
            float* y = out + static_cast<size_t>(t) * inner;
            const float* z = b.z + (t0 + static_cast<size_t>(t)) * inner + head * dv;
            e.kernels.rms_norm(y, c_.value_dim, c_.out_norm.data(), c_.out_eps, y, c_.value_dim);
            if (c_.sigmoid_gate) {
                e.kernels.sigmoid_gate(y, z, c_.value_dim);
                continue;
            }
            for (int c = 0; c < c_.value_dim; c += kPanelRows)
                e.kernels.gated_store(z + c, y + c, 1, std::min(kPanelRows, c_.value_dim - c), Activation::Silu, y + c, dv);
        }
    });
}

void delta_rule(Engine& e, const DeltaInputs& in, float* state, float* out, int tokens, int heads, int dk, int dv) {
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    e.pool.reserve_local(delta_scratch(dk, dv));
    const size_t count = static_cast<size_t>(heads), keys = static_cast<size_t>(dk), values = static_cast<size_t>(dv);
    e.pool.run(heads, [&](int head, int thread) {
        const size_t h = static_cast<size_t>(head);
        const DeltaItem item{in.q + h * keys, in.k + h * keys, in.v + h * values, count * keys, count * values, in.g + h,
                             in.beta + h, count, state + h * keys * values, out + h * values, count * values, tokens, dk, dv};
        e.kernels.delta(item, e.pool.local(thread));
    });
}

}  // namespace ktcore

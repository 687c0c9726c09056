// The fused attention half of a layer: prepare rows, q/k/v products, rotate and append, attend, output product.
#include "blocks/attention.h"

#include <algorithm>
#include <cmath>

namespace ktcore {

CacheType parse_cache_type(const std::string& name) {
    if (name == "f16") return CacheType::F16;
    if (name == "bf16") return CacheType::BF16;
    if (name == "q8") return CacheType::Q8;
    if (name == "i16") return CacheType::I16;
    check(name == "f32", "unknown cache type '" + name + "'; known: i16, f16, bf16, f32, q8");
    return CacheType::F32;
}

void Temperature::apply(float* q, size_t values, int position) const {
    if (span <= 0.f) return;
    const float steps = std::floor((static_cast<float>(position) + offset) / span);
    const float factor = std::log1p(steps) * scale + 1.f;
    for (size_t i = 0; i < values; i++) q[i] *= factor;
}

AttentionBlock::AttentionBlock(EnginePtr engine, Weight q, Weight k, Weight v, Weight o, Config config)
    : engine_(std::move(engine)), q_(std::move(q)), k_(std::move(k)), v_(std::move(v)), o_(std::move(o)),
      c_(std::move(config)) {
    const PackedView &vq = q_->view(), &vk = k_->view(), &vv = v_->view(), &vo = o_->view();
    const AttendShape& s = c_.shape;
    check(s.heads > 0 && s.kv_heads > 0 && s.head_dim > 0 && s.head_dim <= 1024 && s.heads % s.kv_heads == 0,
          "heads must be a multiple of kv_heads, head_dim 1 to 1024");
    check(vq.rows == int64_t{s.heads} * s.head_dim, "q must have heads * head_dim rows");
    check(s.value_dim >= 0 && s.value_dim <= 1024, "value_dim must be 0 to 1024");
    check(vk.rows == int64_t{s.kv_heads} * s.head_dim, "k must have kv_heads * head_dim rows");
    check(vv.rows == int64_t{s.kv_heads} * s.value_width(), "v must have kv_heads * value width rows");
    check(vk.cols == vq.cols && vv.cols == vq.cols, "q, k and v must have the same columns");
    check(vo.cols == int64_t{s.heads} * s.value_width(), "o must have heads * value width columns");
    check(!c_.residual || vo.rows == vq.cols, "a residual needs o's rows to equal q's columns");
    check(static_cast<int>(2 * c_.inv_freq.size()) <= s.head_dim, "inv_freq is longer than half of head_dim");
    check(s.window >= 0 && s.chunk >= 0, "window and chunk must not be negative");
    check(c_.temperature.span >= 0.f, "the temperature's span must not be negative");
    check(!c_.norm_whole || !c_.norm_after_rope, "norms over whole rows come before RoPE");
    check(!c_.gate || ((c_.gate->view().rows == vo.cols || c_.gate->view().rows == s.heads) && c_.gate->view().cols == vq.cols),
          "gate must have o's columns, or the heads, as rows, and q's columns");
    check_length(c_.v_norm, s.value_width(), "v_norm");
    check_length(c_.sinks, s.heads, "sinks");
    c_.shape.sinks = data_or_null(c_.sinks);
    check_length(c_.norm, vq.cols, "norm");
    check_length(c_.q_norm, c_.norm_whole ? vq.rows : s.head_dim, "q_norm");
    check_length(c_.k_norm, c_.norm_whole ? vk.rows : s.head_dim, "k_norm");
    check_length(c_.q_bias, vq.rows, "q bias");
    check_length(c_.k_bias, vk.rows, "k bias");
    check_length(c_.v_bias, vv.rows, "v bias");
    check_length(c_.o_bias, vo.rows, "o bias");
}

void AttentionBlock::forward(const float* x, float* out, Step& step, const Cache& cache) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const AttendShape& s = c_.shape;
    const PackedView &vq = q_->view(), &vk = k_->view(), &vv = v_->view(), &vo = o_->view();
    const int n = step.tokens(), hidden = vq.cols;
    const int value = s.value_width();
    const size_t count = static_cast<size_t>(n), q_width = static_cast<size_t>(vq.rows),
                 k_width = static_cast<size_t>(vk.rows), v_width = static_cast<size_t>(vv.rows),
                 out_width = static_cast<size_t>(vo.cols), ldx = static_cast<size_t>(hidden),
                 gates = c_.gate ? static_cast<size_t>(c_.gate->view().rows) : 0;
    bool any_float = false, any_int8 = false;
    for (const PackedMatrix* w : {q_.get(), k_.get(), v_.get(), c_.gate.get()})
        if (w) (needs_float(w->view(), c_.exact) ? any_float : any_int8) = true;
    const bool normed = any_float && !c_.norm.empty(), out_int8 = !needs_float(vo, c_.exact);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    step.check_pages(cache.num_pages, cache.page_size);
    reserve_products(e);
    Rows in{x, ldx, {nullptr, act_stride(padded_k(hidden)), padded_k(hidden)}};
    Rows mid{nullptr, out_width, {nullptr, act_stride(padded_k(vo.cols)), padded_k(vo.cols)}};
    float *rows = nullptr, *q = nullptr, *k = nullptr, *v = nullptr, *context = nullptr, *gate = nullptr;
    Carver carver;
    carver.want(&in.act.base, any_int8 ? in.act.stride * count : 0);
    carver.want(&mid.act.base, out_int8 ? mid.act.stride * count : 0);
    carver.want(&rows, normed ? count * ldx : 0);
    carver.want(&q, count * q_width);
    carver.want(&k, count * k_width);
    carver.want(&v, count * v_width);
    carver.want(&context, count * out_width);
    carver.want(&gate, count * gates);
    carver.carve(e.pool);
    if (normed) in.x = rows;
    mid.x = context;
    prepare_rows(e, x, ldx, n, hidden, c_.norm, c_.norm_eps, any_int8 ? &in.act : nullptr, normed ? rows : nullptr);
    const Product qkvg[4] = {{&vq, q, q_width, data_or_null(c_.q_bias), nullptr, 0},
                             {&vk, k, k_width, data_or_null(c_.k_bias), nullptr, 0},
                             {&vv, v, v_width, data_or_null(c_.v_bias), nullptr, 0},
                             {c_.gate ? &c_.gate->view() : nullptr, gate, gates, nullptr, nullptr, 0}};
    run_products(e, in, n, c_.exact, qkvg, c_.gate ? 4 : 3);

    const int half = static_cast<int>(c_.inv_freq.size());
    const float* turns = half ? step.rotations(c_.inv_freq, c_.rope_scale) : nullptr;
    const auto rotate = [&](float* head, const Vector& norm, const float* turn) {
        if (half && c_.norm_after_rope) kn.rope(head, 2 * half, turn, turn + half, c_.interleaved);
        if (!norm.empty() && !c_.norm_whole) kn.rms_norm(head, s.head_dim, norm.data(), c_.qk_eps, head, s.head_dim);
        if (half && !c_.norm_after_rope) kn.rope(head, 2 * half, turn, turn + half, c_.interleaved);
    };
    const auto norm_row = [&](float* row, const Vector& norm) {
        const int width = static_cast<int>(norm.size());
        if (c_.norm_whole && width) kn.rms_norm(row, width, norm.data(), c_.qk_eps, row, width);
    };
    const size_t row_bytes = cache_row_bytes(cache.type, s.head_dim), v_bytes = cache_row_bytes(cache.type, value);
    each_token(e, n, [&](int t) {
        const size_t at = static_cast<size_t>(t);
        norm_row(q + at * q_width, c_.q_norm);
        norm_row(k + at * k_width, c_.k_norm);
        const float* turn = half ? turns + at * 2 * half : nullptr;
        for (int h = 0; h < s.heads; h++) rotate(q + at * q_width + h * s.head_dim, c_.q_norm, turn);
        const int seq = step.sequence_of(t);
        const int pos = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
        c_.temperature.apply(q + at * q_width, q_width, pos);
        const size_t page = static_cast<size_t>(step.blocks(seq)[pos / cache.page_size]);
        for (int h = 0; h < s.kv_heads; h++) {
            float *key = k + at * k_width + h * s.head_dim, *held = v + at * v_width + h * value;
            rotate(key, c_.k_norm, turn);
            if (!c_.v_norm.empty()) kn.rms_norm(held, value, c_.v_norm.data(), c_.v_eps, held, value);
            for (int i = 0; c_.value_scale != 1.f && i < value; i++) held[i] *= c_.value_scale;
            const size_t slot = (page * s.kv_heads + h) * cache.page_size + pos % cache.page_size;
            kn.to_cache(key, s.head_dim, s.head_dim, static_cast<uint8_t*>(cache.k) + slot * row_bytes, cache.type);
            kn.to_cache(held, value, value, static_cast<uint8_t*>(cache.v) + slot * v_bytes, cache.type);
        }
    });
    attend(e, s, step, cache, q, context, plan_);
    if (gates == out_width)
        e.pool.run(n, [&](int t, int) {
            kn.sigmoid_gate(context + static_cast<size_t>(t) * out_width, gate + static_cast<size_t>(t) * gates, vo.cols);
        });
    else if (gates)
        e.pool.run(n, [&](int t, int) {
            float* row = context + static_cast<size_t>(t) * out_width;
            for (size_t h = 0; h < gates; h++, row += value) {
                const float open = 1.f / (1.f + std::exp(-gate[static_cast<size_t>(t) * gates + h]));
                for (int i = 0; i < value; i++) row[i] *= open;
            }
        });
    if (out_int8) prepare_rows(e, context, out_width, n, vo.cols, {}, 0.f, &mid.act, nullptr);
    const size_t ldo = static_cast<size_t>(vo.rows);
    const Product o{&vo, out, ldo, data_or_null(c_.o_bias), c_.residual ? x : nullptr, ldo};
    run_products(e, mid, n, c_.exact, &o, 1);
}

}  // namespace ktcore

// The fused latent attention of a layer: projections, latents into the cache, attention, output product.
#include "blocks/mla.h"

#include <algorithm>
#include <cstring>

#include "blocks/head_product.h"

namespace ktcore {
namespace {
constexpr int kSerialTokens = 4;
// From so many new tokens of a sequence on, expanding the latents to keys and values costs less than attending over
// the wider latents: expansion is once a key, (latent + rope + latent) - (nope + rope + value) once a query and key.
constexpr int kExpandQueries = 128;

// More sequences than this, or tokens with a choice of their own, are work for all threads without cutting contexts.
constexpr int kWholeSpans = 16;
// Tokens that attend to a choice of their own go together in so many: their absorbed queries take 0.3 MB each.
constexpr int kChosenTokens = 64;

constexpr int padded_keys(int keys) { return (keys + 15) / 16 * 16; }
constexpr size_t kExpandScratch = kPanelScratch + sizeof(float) * kTokenChunk * kPanelRows;
// Expanded keys and values live for one call: half precision loses nothing beside what an 8-bit cache already has.
constexpr CacheType expanded_type(CacheType cache) { return cache == CacheType::Q8 ? CacheType::F16 : cache; }
}  // namespace

// All scratch of one call; pieces that the call does not need are empty.
struct MLABlock::Buffers {
    Rows in, low, mid;
    float *normed = nullptr, *q_low = nullptr, *q_normed = nullptr, *q = nullptr, *kv = nullptr, *context = nullptr;
    float *absorbed = nullptr, *latent_out = nullptr, *latents = nullptr;
    uint8_t *keys = nullptr, *values = nullptr;
    ActView latent_act{};
    int group_heads = 0;  // heads that are expanded at a time
};

MLABlock::MLABlock(EnginePtr engine, Weights weights, Config config)
    : engine_(std::move(engine)), w_(std::move(weights)), c_(std::move(config)) {
    check(c_.heads > 0 && c_.nope > 0 && c_.rope >= 0 && c_.value > 0 && c_.latent > 0 && c_.rope % 2 == 0,
          "head counts and widths must be positive, rope even");
    check(c_.latent + c_.rope <= 1024 && c_.nope + c_.rope <= 1024 && c_.value <= 1024, "widths must be at most 1024");
    const int64_t heads = c_.heads;
    absorb_ = {w_.k_absorb, c_.heads, c_.latent};
    expand_ = {w_.k_expand, c_.heads, c_.nope};
    v_ = {w_.v, c_.heads, c_.value};
    const PackedView &q = w_.q->view(), &kv = w_.kv_a->view(), &o = w_.o->view();
    const int q_in = w_.q_a ? w_.q_a->view().rows : kv.cols;
    check(q.rows == heads * (c_.nope + c_.rope) && q.cols == q_in, "q must be [heads * (nope + rope), its input]");
    check(!w_.q_a || w_.q_a->view().cols == kv.cols, "q_a must have hidden columns");
    check(kv.rows == c_.latent + c_.rope, "kv_a must have latent + rope rows");
    check(o.cols == heads * c_.value && (!c_.residual || o.rows == kv.cols), "o must be [hidden, heads * value]");
    const auto fits = [&](const HeadMatrix& m, int cols) {
        return m.w->view().rows == heads * m.panels() * kPanelRows && m.w->view().cols == cols;
    };
    check(fits(absorb_, c_.nope) && fits(expand_, c_.latent) && fits(v_, c_.latent),
          "k_absorb, k_expand and v must hold each head's rows padded to whole panels");
    check(c_.inv_freq.empty() || static_cast<int>(2 * c_.inv_freq.size()) == c_.rope, "inv_freq must have rope / 2 values, or none");
    check_length(c_.norm, kv.cols, "norm");
    check_length(c_.kv_norm, c_.latent, "kv norm");
    check_length(c_.q_norm, q_in, "q norm");
    check(!c_.kv_norm.empty() && (!w_.q_a || !c_.q_norm.empty()), "the low-rank parts need their norms");
}

int MLABlock::expanded_heads(int context, CacheType type) const {
    constexpr size_t kBudget = size_t{64} << 20;
    const CacheType wide = expanded_type(type);
    const size_t row = cache_row_bytes(wide, c_.nope + c_.rope) + cache_row_bytes(wide, c_.value);
    const size_t head = static_cast<size_t>(padded_keys(context)) * row;
    return static_cast<int>(std::clamp<size_t>(kBudget / head, 1, static_cast<size_t>(c_.heads)));
}

void MLABlock::forward(const float* x, float* out, Step& step, const Cache& cache, const Sparse* sparse) {
    Engine& e = *engine_;
    const int n = step.tokens(), hidden = w_.kv_a->view().cols, q_dim = c_.nope + c_.rope, row = c_.latent + c_.rope;
    const size_t count = static_cast<size_t>(n), heads = static_cast<size_t>(c_.heads), ldx = static_cast<size_t>(hidden);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    step.check_pages(cache.num_pages, cache.page_size);
    few_.clear();
    many_.clear();
    sparse_.clear();
    if (sparse && sparse->indexer)
        check(sparse->indexer->rank() == w_.q->view().cols && sparse->indexer->hidden() == hidden && w_.q_a,
              "the indexer reads other widths than these");
    int longest = 0;
    for (int s = 0; s < step.sequences(); s++) {
        const AttendSpan span{step.q_start(s), step.queries(s), step.context(s), step.blocks(s)};
        if (span.queries == 0) continue;
        // up to top_k tokens a choice is all of them, and that is dense attention
        if (sparse && span.context > sparse->top_k) {
            for (int t = 0; t < span.queries; t++) sparse_.push_back(span.token + t);
            continue;
        }
        (span.queries < kExpandQueries ? few_ : many_).push_back(span);
        if (span.queries >= kExpandQueries) longest = std::max(longest, span.context);
    }
    const auto rows_of = [](size_t ld) {
        const int cols = static_cast<int>(ld), k = padded_k(cols);
        return Rows{nullptr, ld, {nullptr, act_stride(k), k}};
    };
    Buffers b;
    if (longest) b.group_heads = expanded_heads(longest, cache.type);
    b.in = rows_of(ldx);
    b.in.x = x;
    b.low = w_.q_a ? rows_of(static_cast<size_t>(w_.q->view().cols)) : Rows{};
    b.mid = rows_of(heads * static_cast<size_t>(c_.value));
    b.latent_act = {nullptr, act_stride(padded_k(c_.latent)), padded_k(c_.latent)};
    const CacheType wide_type = expanded_type(cache.type);
    const size_t keys = static_cast<size_t>(padded_keys(longest));
    const size_t key_values = keys * static_cast<size_t>(b.group_heads);
    Carver carver;
    carver.want(&b.in.act.base, b.in.act.stride * count);
    carver.want(&b.low.act.base, w_.q_a ? b.low.act.stride * count : 0);
    carver.want(&b.mid.act.base, b.mid.act.stride * count);
    carver.want(&b.normed, c_.norm.empty() ? 0 : count * ldx);
    carver.want(&b.q_low, w_.q_a ? count * b.low.ldx : 0);
    carver.want(&b.q_normed, w_.q_a ? count * b.low.ldx : 0);
    carver.want(&b.q, count * heads * static_cast<size_t>(q_dim));
    carver.want(&b.kv, count * static_cast<size_t>(row));
    carver.want(&b.context, count * b.mid.ldx);
    const size_t absorbed = !few_.empty() ? count : std::min(sparse_.size(), size_t{kChosenTokens});
    carver.want(&b.absorbed, absorbed * heads * static_cast<size_t>(row));
    carver.want(&b.latent_out, absorbed * heads * static_cast<size_t>(c_.latent));
    carver.want(&b.latents, keys * static_cast<size_t>(row));
    carver.want(&b.latent_act.base, keys * b.latent_act.stride);
    carver.want(&b.keys, key_values * cache_row_bytes(wide_type, q_dim));
    carver.want(&b.values, key_values * cache_row_bytes(wide_type, c_.value));
    carver.carve(e.pool);
    const size_t wide_rows = sizeof(float) * kTokenChunk * static_cast<size_t>(std::max(q_dim, c_.value));
    reserve_products(e, std::max(head_scratch(std::max(c_.nope, c_.latent)), longest ? kExpandScratch + wide_rows : 0));

    project(x, step, b);
    append(step, cache, b);
    if (sparse && sparse->indexer) sparse->indexer->choose(b.in, b.low, step, sparse->keys, sparse->chosen);
    if (!sparse_.empty()) attend_chosen(step, cache, *sparse, b);
    if (!few_.empty()) attend_absorbed(few_, cache, b);
    for (const AttendSpan& span : many_) attend_expanded(span, cache, b);
    const PackedView& o = w_.o->view();
    if (!needs_float(o, c_.exact)) prepare_rows(e, b.context, b.mid.ldx, n, o.cols, {}, 0.f, &b.mid.act, nullptr);
    b.mid.x = b.context;
    const size_t ldo = static_cast<size_t>(o.rows);
    const Product product{&o, out, ldo, nullptr, c_.residual ? x : nullptr, ldo};
    run_products(e, b.mid, n, c_.exact, &product, 1);
}

// q [T][heads][nope + rope] and kv [T][latent + rope], before norms and rotation.
void MLABlock::project(const float* x, Step& step, Buffers& b) {
    Engine& e = *engine_;
    const int n = step.tokens();
    const PackedView &q = w_.q->view(), &kv = w_.kv_a->view();
    prepare_rows(e, x, b.in.ldx, n, kv.cols, c_.norm, c_.norm_eps, &b.in.act, c_.norm.empty() ? nullptr : b.normed);
    if (!c_.norm.empty()) b.in.x = b.normed;
    const size_t kv_width = static_cast<size_t>(kv.rows), q_width = static_cast<size_t>(q.rows);
    const PackedView& first = w_.q_a ? w_.q_a->view() : q;
    const Product down[2] = {{&first, w_.q_a ? b.q_low : b.q, static_cast<size_t>(first.rows), nullptr, nullptr, 0},
                             {&kv, b.kv, kv_width, nullptr, nullptr, 0}};
    run_products(e, b.in, n, c_.exact, down, 2);
    if (!w_.q_a) return;
    prepare_rows(e, b.q_low, b.low.ldx, n, q.cols, c_.q_norm, c_.q_eps, &b.low.act, b.q_normed);
    b.low.x = b.q_normed;
    const Product up{&q, b.q, q_width, nullptr, nullptr, 0};
    run_products(e, b.low, n, c_.exact, &up, 1);
}

// Norms the latents, rotates queries and the shared key, and writes the step's rows into the cache.
void MLABlock::append(Step& step, const Cache& cache, const Buffers& b) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const int n = step.tokens(), half = c_.rope / 2, q_dim = c_.nope + c_.rope, row = c_.latent + c_.rope;
    const size_t row_bytes = cache_row_bytes(cache.type, row);
    const bool turned = !c_.inv_freq.empty();
    const float* turns = turned ? step.rotations(c_.inv_freq, c_.rope_scale) : nullptr;
    const auto one = [&](int t) {
        const size_t at = static_cast<size_t>(t);
        float* q = b.q + at * static_cast<size_t>(c_.heads * q_dim);
        float* kv = b.kv + at * static_cast<size_t>(row);
        kn.rms_norm(kv, c_.latent, c_.kv_norm.data(), c_.kv_eps, kv, c_.latent);
        if (turned) {
            const float* turn = turns + at * static_cast<size_t>(c_.rope);
            for (int h = 0; h < c_.heads; h++) kn.rope(q + h * q_dim + c_.nope, c_.rope, turn, turn + half, c_.interleaved);
            kn.rope(kv + c_.latent, c_.rope, turn, turn + half, c_.interleaved);
        }
        const int seq = step.sequence_of(t), pos = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
        c_.temperature.apply(q, static_cast<size_t>(c_.heads * q_dim), pos);
        const size_t page = static_cast<size_t>(step.blocks(seq)[pos / cache.page_size]);
        const size_t slot = page * static_cast<size_t>(cache.page_size) + static_cast<size_t>(pos % cache.page_size);
        kn.to_cache(kv, row, c_.latent, static_cast<uint8_t*>(cache.k) + slot * row_bytes, cache.type);
    };
    if (n <= kSerialTokens) {
        for (int t = 0; t < n; t++) one(t);
        return;
    }
    e.pool.run(n, [&](int t, int) { one(t); });
}

// Queries go through each head's K once, attention runs over the latents, its result through each head's V.
// Tokens of spans are counted from token `first` of the step.
void MLABlock::attend_absorbed(const std::vector<AttendSpan>& spans, const Cache& cache, Buffers& b, int first) {
    Engine& e = *engine_;
    const int q_dim = c_.nope + c_.rope, row = c_.latent + c_.rope;
    const size_t heads = static_cast<size_t>(c_.heads), q_width = heads * static_cast<size_t>(q_dim),
                 row_width = heads * static_cast<size_t>(row), latent_width = heads * static_cast<size_t>(c_.latent);
    // (first token, count) of pieces of neighbouring spans, at most kHeadChunk long.
    std::vector<std::pair<int, int>> pieces;
    for (const AttendSpan& s : spans)
        for (int t = 0; t < s.queries; t++) {
            const int token = s.token + t;
            if (!pieces.empty() && pieces.back().first + pieces.back().second == token && pieces.back().second < kHeadChunk)
                pieces.back().second++;
            else
                pieces.push_back({token, 1});
        }
    const int items = c_.heads * static_cast<int>(pieces.size());
    e.pool.run(items, [&](int i, int thread) {
        const int h = i % c_.heads;
        const auto [t0, n] = pieces[static_cast<size_t>(i / c_.heads)];
        const float* q = b.q + static_cast<size_t>(first + t0) * q_width + h * q_dim;
        float* to = b.absorbed + static_cast<size_t>(t0) * row_width + h * row;
        head_rows(e, absorb_, c_.exact, h, q, q_width, c_.nope, n, e.pool.local(thread),
                  [&](const float* acc, int col, int cols) {
                      e.kernels.store(acc, n, cols, to + col, row_width, nullptr, nullptr, 0);
                  });
        for (int t = 0; t < n; t++)
            std::memcpy(to + static_cast<size_t>(t) * row_width + c_.latent, q + static_cast<size_t>(t) * q_width + c_.nope,
                        sizeof(float) * static_cast<size_t>(c_.rope));
    });
    AttendShape shape{c_.heads, 1, row, c_.scale, 0, c_.latent, row, row};
    shape.whole = static_cast<int>(spans.size()) > kWholeSpans;
    plan_.clear();
    for (const AttendSpan& s : spans) plan_.add(shape, s, cache, b.absorbed, row_width, b.latent_out, latent_width);
    plan_.run(e, shape, b.latent_out, latent_width);
    e.pool.run(items, [&](int i, int thread) {
        const int h = i % c_.heads;
        const auto [t0, n] = pieces[static_cast<size_t>(i / c_.heads)];
        float* to = b.context + static_cast<size_t>(first + t0) * b.mid.ldx + h * c_.value;
        head_rows(e, v_, c_.exact, h, b.latent_out + static_cast<size_t>(t0) * latent_width + h * c_.latent, latent_width,
                  c_.latent, n, e.pool.local(thread), [&](const float* acc, int col, int cols) {
                      e.kernels.store(acc, n, cols, to + col, b.mid.ldx, nullptr, nullptr, 0);
                  });
    });
}

// A token's keys are the slots of what was chosen for it, in the order of their positions: pages of one token each.
void MLABlock::attend_chosen(const Step& step, const Cache& cache, const Sparse& sparse, Buffers& b) {
    Engine& e = *engine_;
    const size_t top_k = static_cast<size_t>(sparse.top_k);
    check(cache.num_pages * cache.page_size <= INT32_MAX, "a cache for chosen tokens has fewer than 2^31 slots");
    const Cache slots{cache.k, cache.v, cache.num_pages * cache.page_size, 1, cache.type};
    std::vector<int> counts(kChosenTokens);
    slots_.resize(kChosenTokens * top_k);
    for (size_t at = 0; at < sparse_.size();) {
        const int first = sparse_[at];
        size_t end = at;
        while (end < sparse_.size() && sparse_[end] < first + kChosenTokens) end++;
        std::atomic<bool> sound{true};
        each_token(e, static_cast<int>(end - at), [&](int i) {
            const int token = sparse_[at + static_cast<size_t>(i)], seq = step.sequence_of(token);
            const int pos = step.context(seq) - step.queries(seq) + token - step.q_start(seq);
            const int32_t* chosen = sparse.chosen + static_cast<size_t>(token) * top_k;
            int32_t* to = slots_.data() + static_cast<size_t>(i) * top_k;
            int n = 0;
            for (; n < sparse.top_k && chosen[n] >= 0 && chosen[n] <= pos; n++)
                to[n] = step.blocks(seq)[chosen[n] / cache.page_size] * cache.page_size + chosen[n] % cache.page_size;
            if (n == 0 || (n < sparse.top_k && chosen[n] != -1)) sound = false;
            counts[static_cast<size_t>(i)] = n;
        });
        check(sound, "a choice names a token that is later than its own, or none");
        each_.clear();
        for (size_t i = at; i < end; i++)
            each_.push_back({sparse_[i] - first, 1, counts[i - at], slots_.data() + (i - at) * top_k});
        attend_absorbed(each_, slots, b, first);
        at = end;
    }
}

// All cached latents become keys and values of some heads at a time, which plain attention then reads.
void MLABlock::attend_expanded(const AttendSpan& span, const Cache& cache, Buffers& b) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const int q_dim = c_.nope + c_.rope, row = c_.latent + c_.rope, keys = span.context;
    const CacheType wide_type = expanded_type(cache.type);
    const size_t row_bytes = cache_row_bytes(cache.type, row), ldx = static_cast<size_t>(row);
    const PackedView &kw = expand_.w->view(), &vw = v_.w->view();
    const bool int8 = !needs_float(kw, c_.exact) || !needs_float(vw, c_.exact);
    constexpr int kStep = 16;
    e.pool.run((keys + kStep - 1) / kStep, [&](int item, int) {
        for (int t = item * kStep; t < std::min(keys, (item + 1) * kStep); t++) {
            const size_t page = static_cast<size_t>(span.blocks[t / cache.page_size]);
            const size_t slot = page * static_cast<size_t>(cache.page_size) + static_cast<size_t>(t % cache.page_size);
            float* to = b.latents + static_cast<size_t>(t) * ldx;
            kn.from_cache(static_cast<const uint8_t*>(cache.k) + slot * row_bytes, row, c_.latent, to, cache.type);
            if (int8) kn.quantize(to, c_.latent, nullptr, 0.f, b.latent_act, t);
        }
    });
    const Rows rows{b.latents, ldx, b.latent_act};
    const int padded = padded_keys(keys), step = b.group_heads, chunks = (keys + kTokenChunk - 1) / kTokenChunk;
    const size_t key_row = cache_row_bytes(wide_type, q_dim), value_row = cache_row_bytes(wide_type, c_.value);
    const size_t q_width = static_cast<size_t>(c_.heads * q_dim);
    for (int h0 = 0; h0 < c_.heads; h0 += step) {
        const int n = std::min(step, c_.heads - h0);
        e.pool.run(n * chunks, [&](int item, int thread) {
            const int h = item % n, t0 = item / n * kTokenChunk, t1 = std::min(keys, t0 + kTokenChunk);
            uint8_t* scratch = e.pool.local(thread);
            float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
            float* wide = reinterpret_cast<float*>(scratch + kExpandScratch);
            // Whole rows of `width` values; `tail` follows what the matrix makes of the latents.
            const auto expand = [&](const HeadMatrix& m, int width, const float* tail, uint8_t* to, size_t stride) {
                for (int p = 0; p < m.panels(); p++) {
                    run_panel(e, m.w->view(), (h0 + h) * m.panels() + p, rows, c_.exact, t0, t1, acc, scratch);
                    const int col = p * kPanelRows, cols = std::min(kPanelRows, m.rows - col);
                    kn.store(acc, t1 - t0, cols, wide + col, static_cast<size_t>(width), nullptr, nullptr, 0);
                }
                for (int t = t0; t < t1; t++) {
                    float* row = wide + (t - t0) * width;
                    const size_t rest = sizeof(float) * static_cast<size_t>(width - m.rows);
                    if (tail) std::memcpy(row + m.rows, tail + static_cast<size_t>(t) * ldx, rest);
                    kn.to_cache(row, width, width, to + static_cast<size_t>(t) * stride, wide_type);
                }
            };
            const size_t first = static_cast<size_t>(h) * static_cast<size_t>(padded);
            expand(expand_, q_dim, b.latents + c_.latent, b.keys + first * key_row, key_row);
            expand(v_, c_.value, nullptr, b.values + first * value_row, value_row);
        });
        // One page, as long as the context or a little longer.
        const int32_t page = 0;
        const Cache wide{b.keys, b.values, 1, padded, wide_type};
        const AttendShape shape{n, n, q_dim, c_.scale, 0, c_.value, q_dim, c_.value};
        plan_.clear();
        plan_.add(shape, {span.token, span.queries, keys, &page}, wide, b.q + h0 * q_dim, q_width, b.context + h0 * c_.value,
                  b.mid.ldx);
        plan_.run(e, shape, b.context + h0 * c_.value, b.mid.ldx);
    }
}

}  // namespace ktcore

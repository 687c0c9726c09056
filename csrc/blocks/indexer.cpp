// Index queries, keys and scores of a step's tokens, and the choice among the scores.
#include "blocks/indexer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

namespace ktcore {
namespace {
constexpr int kTokens = 8;      // tokens of one item, which read a key block once
constexpr int kKeys = 1024;     // keys of one item
constexpr size_t kScores = size_t{16} << 20;  // scores that are kept at a time, unless one token has more

// Higher floats are higher integers; NaN with a plus sign is above all.
uint32_t ordered(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The value of the `rank`-th highest (from 1) of `count` scores, and how many are above it: digit by digit.
uint32_t highest(const float* scores, int count, int rank, int* above) {
    constexpr struct { int low; uint32_t digits; } kSteps[] = {{21, 2047}, {10, 2047}, {0, 1023}};
    int counts[2048];
    uint32_t prefix = 0, mask = 0;
    *above = 0;
    for (const auto& step : kSteps) {
        std::fill(std::begin(counts), std::end(counts), 0);
        for (int i = 0; i < count; i++) {
            const uint32_t v = ordered(scores[i]);
            counts[(v >> step.low) & step.digits] += (v & mask) == prefix;
        }
        uint32_t digit = step.digits;
        while (*above + counts[digit] < rank) *above += counts[digit--];
        prefix |= digit << step.low;
        mask |= step.digits << step.low;
    }
    return prefix;
}

void layer_norm(float* x, int n, const Vector& weight, const Vector& bias, float eps) {
    double sum = 0, square = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    const double mean = sum / n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    const double gain = 1 / std::sqrt(square / n + static_cast<double>(eps));
    for (int i = 0; i < n; i++) {
        const size_t at = static_cast<size_t>(i);
        x[i] = static_cast<float>((x[i] - mean) * gain) * weight[at] + bias[at];
    }
}
}  // namespace

void choose_highest(const float* scores, int count, int top_k, int32_t* out) {
    int n = 0;
    if (count <= top_k) {
        for (; n < count; n++) out[n] = n;
    } else {
        int above;
        const uint32_t last = highest(scores, count, top_k, &above);
        int equal = top_k - above;
        for (int i = 0; i < count; i++) {
            const uint32_t v = ordered(scores[i]);
            if (v > last || (v == last && equal-- > 0)) out[n++] = i;
        }
    }
    std::fill(out + n, out + top_k, -1);
}

TokenIndexer::TokenIndexer(EnginePtr engine, Weight q, Weight k, Weight weights, Config config, Weight gate)
    : engine_(std::move(engine)), q_(std::move(q)), k_(std::move(k)), weights_(std::move(weights)), gate_(std::move(gate)),
      c_(std::move(config)) {
    check(c_.heads > 0 && c_.heads <= 1024 && c_.dim > 0 && c_.dim <= 1024 && c_.top_k > 0,
          "an indexer has 1 to 1024 heads of 1 to 1024 values, and chooses at least one token");
    check(c_.pool >= 0 && c_.pool <= 256 && c_.top_k % group() == 0, "pools have at most 256 tokens, of which top_k is a multiple");
    const bool turned = !c_.inv_freq.empty();
    check(c_.rope >= 0 && c_.rope % 2 == 0 && c_.rope <= c_.dim, "rope must be even, and no wider than a head");
    check(static_cast<int>(2 * c_.inv_freq.size()) == (turned ? c_.rope : 0), "inv_freq must have rope / 2 values, or none");
    const PackedView &vq = q_->view(), &vk = k_->view(), &vw = weights_->view();
    check(vq.rows == int64_t{c_.heads} * c_.dim, "the indexer's q must have heads * dim rows");
    check(vk.rows == c_.dim && vw.rows == c_.heads && vw.cols == vk.cols, "k must be [dim, hidden], weights [heads, hidden]");
    check(static_cast<int>(c_.k_norm.size()) == c_.dim && c_.k_bias.size() == c_.k_norm.size(),
          "k_norm and k_bias must have dim values");
    check((gate_ != nullptr) == (c_.pool > 0) && static_cast<int>(c_.ape.size()) == c_.pool * c_.dim,
          "pooled keys have gates and ape [pool, dim], others have neither");
    check(!gate_ || (gate_->view().rows == c_.dim && gate_->view().cols == vk.cols), "gate must be [dim, hidden]");
}

void TokenIndexer::choose(const Rows& in, const Rows& low, Step& step, const Cache& keys, int32_t* chosen) {
    Engine& e = *engine_;
    const int n = step.tokens(), pool = group();
    step.check_pages(keys.num_pages, keys.page_size);
    check(keys.page_size % pool == 0, "pages must hold whole pools");
    const size_t count = static_cast<size_t>(n), width = static_cast<size_t>(c_.heads) * static_cast<size_t>(c_.dim);
    const size_t dim = static_cast<size_t>(c_.dim), heads = static_cast<size_t>(c_.heads), row = gate_ ? 2 * dim : dim;
    const size_t need = sizeof(float) * count * (width + row + heads);
    if (buffer_.size() < need) buffer_ = Memory(need);
    queries_ = reinterpret_cast<float*>(buffer_.data());
    keys_ = queries_ + count * width;
    gains_ = keys_ + count * row;
    const Product up{&q_->view(), queries_, width, nullptr, nullptr, 0};
    run_products(e, low, n, c_.exact, &up, 1);
    const Product down[3] = {{&k_->view(), keys_, row, nullptr, nullptr, 0},
                             {&weights_->view(), gains_, heads, nullptr, nullptr, 0},
                             {gate_ ? &gate_->view() : nullptr, keys_ + dim, row, nullptr, nullptr, 0}};
    run_products(e, in, n, c_.exact, down, gate_ ? 3 : 2);
    append(step, keys);
    if (c_.pool) pool_keys(step, keys);
    const size_t listed = static_cast<size_t>(this->width());
    for (int s = 0; s < step.sequences(); s++) {
        const int queries = step.queries(s), context = step.context(s), before = context - queries;
        // tokens that see no more than may be chosen need no scores
        const int first = std::clamp(c_.top_k + pool - 1 - before, 0, queries);
        int32_t* to = chosen + static_cast<size_t>(step.q_start(s)) * listed;
        each_token(e, first, [&](int t) { list(nullptr, before + t + 1, to + static_cast<size_t>(t) * listed); });
        const size_t stride = static_cast<size_t>(context / pool);
        const int at_once = static_cast<int>(std::max<size_t>(1, kScores / std::max<size_t>(1, stride)));
        for (int t0 = first; t0 < queries; t0 += at_once) {
            const int some = std::min(at_once, queries - t0);
            score(step, s, t0, some, keys);
            const float* scores = reinterpret_cast<const float*>(scores_.data());
            e.pool.run(some, [&](int i, int) {
                list(scores + static_cast<size_t>(i) * stride, before + t0 + i + 1, to + static_cast<size_t>(t0 + i) * listed);
            });
        }
    }
}

// What a token chooses that sees `seen` tokens: the best pools token by token, and those behind the last whole one.
void TokenIndexer::list(const float* scores, int seen, int32_t* out) const {
    const int pool = group(), whole = seen / pool, top = c_.top_k / pool;
    choose_highest(scores, whole, top, out);
    if (pool == 1) return;
    const int named = std::min(whole, top);
    int n = named * pool;
    // from behind: a pool's number lies no further than its first token
    for (int i = named - 1; i >= 0; i--)
        for (int j = pool - 1; j >= 0; j--) out[i * pool + j] = out[i] * pool + j;
    for (int t = whole * pool; t < seen; t++) out[n++] = t;
    std::fill(out + n, out + width(), -1);
}

// Rotates queries, norms and rotates keys, and writes those into the cache, with their gates where keys are pooled.
void TokenIndexer::append(Step& step, const Cache& keys) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const bool turned = !c_.inv_freq.empty();
    const int half = c_.rope / 2, width = c_.heads * c_.dim, row = c_.pool ? 2 * c_.dim : c_.dim;
    const float scale = 1.f / std::sqrt(static_cast<float>(width));
    const size_t row_bytes = cache_row_bytes(keys.type, row);
    const float* turns = turned ? step.rotations(c_.inv_freq, c_.rope_scale) : nullptr;
    each_token(e, step.tokens(), [&](int t) {
        const size_t at = static_cast<size_t>(t);
        float* key = keys_ + at * static_cast<size_t>(row);
        for (int h = 0; h < c_.heads; h++) gains_[at * static_cast<size_t>(c_.heads) + static_cast<size_t>(h)] *= scale;
        layer_norm(key, c_.dim, c_.k_norm, c_.k_bias, c_.eps);
        if (turned) {
            const float* turn = turns + at * static_cast<size_t>(c_.rope);
            float* q = queries_ + at * static_cast<size_t>(width);
            for (int h = 0; h < c_.heads; h++) kn.rope(q + h * c_.dim, c_.rope, turn, turn + half, c_.interleaved);
            kn.rope(key, c_.rope, turn, turn + half, c_.interleaved);
        }
        const int seq = step.sequence_of(t), pos = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
        if (c_.pool) {
            const float* ape = c_.ape.data() + static_cast<size_t>(pos % c_.pool) * static_cast<size_t>(c_.dim);
            for (int i = 0; i < c_.dim; i++) key[c_.dim + i] += ape[i];
        }
        const size_t page = static_cast<size_t>(step.blocks(seq)[pos / keys.page_size]);
        const size_t slot = page * static_cast<size_t>(keys.page_size) + static_cast<size_t>(pos % keys.page_size);
        void* rows = c_.pool ? keys.v : keys.k;
        kn.to_cache(key, row, c_.dim, static_cast<uint8_t*>(rows) + slot * row_bytes, keys.type);
    });
}

// Keys of the pools that end with one of the step's tokens, from the cached rows of their tokens: what steps they came in
// does not matter.
void TokenIndexer::pool_keys(const Step& step, const Cache& keys) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const int dim = c_.dim, pool = c_.pool;
    const size_t row_bytes = cache_row_bytes(keys.type, 2 * dim), key_bytes = cache_row_bytes(keys.type, dim);
    each_token(e, step.tokens(), [&](int t) {
        const int seq = step.sequence_of(t), pos = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
        if (pos % pool != pool - 1) return;
        const size_t page = static_cast<size_t>(step.blocks(seq)[pos / keys.page_size]);
        const size_t last = page * static_cast<size_t>(keys.page_size) + static_cast<size_t>(pos % keys.page_size);
        std::vector<float> rows(static_cast<size_t>(pool * 2 * dim)), key(static_cast<size_t>(dim));
        for (int j = 0; j < pool; j++)
            kn.from_cache(static_cast<const uint8_t*>(keys.v) + (last - static_cast<size_t>(pool - 1 - j)) * row_bytes, 2 * dim, dim,
                          rows.data() + j * 2 * dim, keys.type);
        for (int i = 0; i < dim; i++) {
            float top = rows[static_cast<size_t>(dim + i)], sum = 0.f, total = 0.f;
            for (int j = 1; j < pool; j++) top = std::max(top, rows[static_cast<size_t>(j * 2 * dim + dim + i)]);
            for (int j = 0; j < pool; j++) {
                const float weight = std::exp(rows[static_cast<size_t>(j * 2 * dim + dim + i)] - top);
                sum += weight;
                total += weight * rows[static_cast<size_t>(j * 2 * dim + i)];
            }
            key[static_cast<size_t>(i)] = total / sum;
        }
        kn.to_cache(key.data(), dim, dim, static_cast<uint8_t*>(keys.k) + last / static_cast<size_t>(pool) * key_bytes, keys.type);
    });
}

// Scores [count][context / pool] of the sequence's new tokens from `from` on, of keys that the item's last token sees.
void TokenIndexer::score(const Step& step, int sequence, int from, int count, const Cache& keys) {
    Engine& e = *engine_;
    const int pool = group(), context = step.context(sequence), before = context - step.queries(sequence);
    const size_t stride = static_cast<size_t>(context / pool), need = sizeof(float) * stride * static_cast<size_t>(count);
    if (scores_.size() < need) scores_ = Memory(need);
    float* scores = reinterpret_cast<float*>(scores_.data());
    const int tiles = (count + kTokens - 1) / kTokens, parts = ((before + from + count) / pool + kKeys - 1) / kKeys;
    e.pool.reserve_local(index_scratch(c_.heads, c_.dim, kTokens));
    e.pool.run(tiles * parts, [&](int i, int thread) {
        const int t0 = i / parts * kTokens, key0 = i % parts * kKeys;
        const int tokens = std::min(kTokens, count - t0), end = (before + from + t0 + tokens) / pool;
        if (key0 >= end) return;
        const size_t token = static_cast<size_t>(step.q_start(sequence) + from + t0);
        const size_t width = static_cast<size_t>(c_.heads) * static_cast<size_t>(c_.dim), heads = static_cast<size_t>(c_.heads);
        const IndexItem item{queries_ + token * width,
                             width,
                             gains_ + token * heads,
                             heads,
                             scores + static_cast<size_t>(t0) * stride + key0,
                             stride,
                             keys.k,
                             step.blocks(sequence),
                             keys.page_size / pool,
                             c_.heads,
                             c_.dim,
                             tokens,
                             key0,
                             std::min(end, key0 + kKeys),
                             keys.type};
        e.kernels.index_scores(item, e.pool.local(thread));
    });
}

}  // namespace ktcore

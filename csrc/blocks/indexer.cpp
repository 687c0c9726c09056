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

TokenIndexer::TokenIndexer(EnginePtr engine, Weight q, Weight k, Weight weights, Config config)
    : engine_(std::move(engine)), q_(std::move(q)), k_(std::move(k)), weights_(std::move(weights)), c_(std::move(config)) {
    check(c_.heads > 0 && c_.heads <= 1024 && c_.dim > 0 && c_.dim <= 1024 && c_.top_k > 0,
          "an indexer has 1 to 1024 heads of 1 to 1024 values, and chooses at least one token");
    check(c_.rope > 0 && c_.rope % 2 == 0 && c_.rope <= c_.dim, "rope must be even, and no wider than a head");
    const PackedView &vq = q_->view(), &vk = k_->view(), &vw = weights_->view();
    check(vq.rows == int64_t{c_.heads} * c_.dim, "the indexer's q must have heads * dim rows");
    check(vk.rows == c_.dim && vw.rows == c_.heads && vw.cols == vk.cols, "k must be [dim, hidden], weights [heads, hidden]");
    check(static_cast<int>(2 * c_.inv_freq.size()) == c_.rope, "inv_freq must have rope / 2 values");
    check(static_cast<int>(c_.k_norm.size()) == c_.dim && c_.k_bias.size() == c_.k_norm.size(),
          "k_norm and k_bias must have dim values");
}

void TokenIndexer::choose(const Rows& in, const Rows& low, Step& step, const Cache& keys, int32_t* chosen) {
    Engine& e = *engine_;
    const int n = step.tokens();
    step.check_pages(keys.num_pages, keys.page_size);
    const size_t count = static_cast<size_t>(n), width = static_cast<size_t>(c_.heads) * static_cast<size_t>(c_.dim);
    const size_t dim = static_cast<size_t>(c_.dim), heads = static_cast<size_t>(c_.heads);
    const size_t need = sizeof(float) * count * (width + dim + heads);
    if (buffer_.size() < need) buffer_ = Memory(need);
    queries_ = reinterpret_cast<float*>(buffer_.data());
    keys_ = queries_ + count * width;
    gains_ = keys_ + count * dim;
    const Product up{&q_->view(), queries_, width, nullptr, nullptr, 0};
    run_products(e, low, n, c_.exact, &up, 1);
    const Product both[2] = {{&k_->view(), keys_, dim, nullptr, nullptr, 0}, {&weights_->view(), gains_, heads, nullptr, nullptr, 0}};
    run_products(e, in, n, c_.exact, both, 2);
    append(step, keys);
    for (int s = 0; s < step.sequences(); s++) {
        const int queries = step.queries(s), context = step.context(s), before = context - queries;
        // tokens that see no more than may be chosen need no scores
        const int first = std::clamp(c_.top_k - before, 0, queries);
        int32_t* to = chosen + static_cast<size_t>(step.q_start(s)) * static_cast<size_t>(c_.top_k);
        each_token(e, first, [&](int t) {
            choose_highest(nullptr, before + t + 1, c_.top_k, to + static_cast<size_t>(t) * static_cast<size_t>(c_.top_k));
        });
        const int at_once = static_cast<int>(std::max<size_t>(1, kScores / static_cast<size_t>(context)));
        for (int t0 = first; t0 < queries; t0 += at_once) {
            const int some = std::min(at_once, queries - t0);
            score(step, s, t0, some, keys);
            const float* scores = reinterpret_cast<const float*>(scores_.data());
            e.pool.run(some, [&](int i, int) {
                choose_highest(scores + static_cast<size_t>(i) * static_cast<size_t>(context), before + t0 + i + 1, c_.top_k,
                               to + static_cast<size_t>(t0 + i) * static_cast<size_t>(c_.top_k));
            });
        }
    }
}

// Rotates queries, norms and rotates keys, and writes those into the cache.
void TokenIndexer::append(Step& step, const Cache& keys) {
    Engine& e = *engine_;
    const Kernels& kn = e.kernels;
    const int half = c_.rope / 2, width = c_.heads * c_.dim;
    const float scale = 1.f / std::sqrt(static_cast<float>(width));
    const size_t row_bytes = cache_row_bytes(keys.type, c_.dim);
    const float* turns = step.rotations(c_.inv_freq, c_.rope_scale);
    each_token(e, step.tokens(), [&](int t) {
        const size_t at = static_cast<size_t>(t);
        const float* turn = turns + at * static_cast<size_t>(c_.rope);
        float* q = queries_ + at * static_cast<size_t>(width);
        for (int h = 0; h < c_.heads; h++) kn.rope(q + h * c_.dim, c_.rope, turn, turn + half, c_.interleaved);
        for (int h = 0; h < c_.heads; h++) gains_[at * static_cast<size_t>(c_.heads) + static_cast<size_t>(h)] *= scale;
        float* key = keys_ + at * static_cast<size_t>(c_.dim);
        layer_norm(key, c_.dim, c_.k_norm, c_.k_bias, c_.eps);
        kn.rope(key, c_.rope, turn, turn + half, c_.interleaved);
        const int seq = step.sequence_of(t), pos = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
        const size_t page = static_cast<size_t>(step.blocks(seq)[pos / keys.page_size]);
        const size_t slot = page * static_cast<size_t>(keys.page_size) + static_cast<size_t>(pos % keys.page_size);
        kn.to_cache(key, c_.dim, c_.dim, static_cast<uint8_t*>(keys.k) + slot * row_bytes, keys.type);
    });
}

// Scores [count][context] of the sequence's new tokens from `from` on, of keys that the item's last token sees.
void TokenIndexer::score(const Step& step, int sequence, int from, int count, const Cache& keys) {
    Engine& e = *engine_;
    const int context = step.context(sequence), before = context - step.queries(sequence);
    const size_t stride = static_cast<size_t>(context), need = sizeof(float) * stride * static_cast<size_t>(count);
    if (scores_.size() < need) scores_ = Memory(need);
    float* scores = reinterpret_cast<float*>(scores_.data());
    const int tiles = (count + kTokens - 1) / kTokens, parts = (before + from + count + kKeys - 1) / kKeys;
    e.pool.reserve_local(index_scratch(c_.heads, c_.dim, kTokens));
    e.pool.run(tiles * parts, [&](int i, int thread) {
        const int t0 = i / parts * kTokens, key0 = i % parts * kKeys;
        const int tokens = std::min(kTokens, count - t0), end = before + from + t0 + tokens;
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
                             keys.page_size,
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

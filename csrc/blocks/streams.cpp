// Products of the streams over chunks of columns, the weights of each token, and sums over streams.
#include "blocks/streams.h"

#include <algorithm>
#include <cmath>

namespace ktcore {
namespace {
constexpr int kChunk = 1024;   // columns of a work item
constexpr int kTogether = 8;   // tokens of a work item: the rows of fn stay in cache
float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
}  // namespace

HyperBlock::HyperBlock(EnginePtr engine, Vector fn, Config config)
    : engine_(std::move(engine)), fn_(std::move(fn)), c_(std::move(config)) {
    check(c_.streams >= 1 && c_.streams <= kMaxStreams, "there must be 1 to " + std::to_string(kMaxStreams) + " streams");
    check(c_.hidden > 0 && c_.hidden % 16 == 0, "hidden must be a multiple of 16");
    check(c_.rounds >= 0 && c_.rounds <= 1000, "rounds must be 0 to 1000");
    const size_t rows = static_cast<size_t>(c_.rows()), width = static_cast<size_t>(c_.streams) * static_cast<size_t>(c_.hidden);
    check(fn_.size() == rows * width, "fn must be [rows, streams * hidden]");
    check(c_.base.size() == rows, "base must have a value a row");
    check(c_.scale.size() == (c_.leaves ? 3u : 1u), "scale must have a value a part");
    chunks_ = static_cast<int>((width + kChunk - 1) / kChunk);
}

void HyperBlock::enter(const float* x, float* out, float* carry, int tokens) {
    Engine& e = *engine_;
    const int rows = c_.rows(), width = c_.streams * c_.hidden;
    const size_t ld = static_cast<size_t>(width), ldp = static_cast<size_t>(rows) + 1, chunks = static_cast<size_t>(chunks_);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    float* parts = nullptr;
    Carver carver;
    carver.want(&parts, static_cast<size_t>(tokens) * chunks * ldp);
    carver.carve(e.pool);
    const int groups = (tokens + kTogether - 1) / kTogether;
    e.pool.run(groups * chunks_, [&](int item, int) {
        const int t0 = item / chunks_ * kTogether, c0 = item % chunks_ * kChunk;
        const size_t t = static_cast<size_t>(t0), c = static_cast<size_t>(c0);
        e.kernels.stream_rows({fn_.data() + c, ld, rows, x + t * ld + c, ld, std::min(kTogether, tokens - t0),
                               std::min(kChunk, width - c0), parts + (t * chunks + static_cast<size_t>(item % chunks_)) * ldp,
                               chunks * ldp});
    });
    each_token(e, tokens, [&](int token) {
        const size_t t = static_cast<size_t>(token);
        float pre[kMaxStreams];
        weights(parts + t * chunks * ldp, pre, carry + t * static_cast<size_t>(c_.carry()));
        e.kernels.stream_enter(x + t * ld, c_.streams, c_.hidden, pre, out + t * static_cast<size_t>(c_.hidden));
    });
}

void HyperBlock::weights(const float* parts, float* pre, float* carry) const {
    const int n = c_.streams, rows = c_.rows();
    float z[kMaxStreams * (2 + kMaxStreams) + 1] = {};
    for (int chunk = 0; chunk < chunks_; chunk++)
        for (int r = 0; r <= rows; r++) z[r] += parts[chunk * (rows + 1) + r];
    const float unit = 1.f / std::sqrt(z[rows] / static_cast<float>(n * c_.hidden) + c_.rms_eps);
    const auto value = [&](int r, int part) { return z[r] * unit * c_.scale[static_cast<size_t>(part)] + c_.base[static_cast<size_t>(r)]; };
    for (int i = 0; i < n; i++) pre[i] = sigmoid(value(i, 0)) + c_.eps;
    if (!c_.leaves) return;
    float* mix = carry + n;
    for (int i = 0; i < n; i++) carry[i] = 2.f * sigmoid(value(n + i, 1));
    for (int i = 0; i < n; i++) {
        float* row = mix + i * n;
        float top = -INFINITY, sum = 0.f;
        for (int j = 0; j < n; j++) top = std::max(top, row[j] = value(2 * n + i * n + j, 2));
        for (int j = 0; j < n; j++) sum += row[j] = std::exp(row[j] - top);
        for (int j = 0; j < n; j++) row[j] = row[j] / sum + c_.eps;
    }
    // Sinkhorn and Knopp's normalisation: rows, then columns; the softmax was the first one's rows
    const auto normalise = [&](int along, int across) {
        for (int i = 0; i < n; i++) {
            float sum = c_.eps;
            for (int j = 0; j < n; j++) sum += mix[i * across + j * along];
            for (int j = 0; j < n; j++) mix[i * across + j * along] /= sum;
        }
    };
    for (int round = 0; round < c_.rounds; round++) {
        if (round) normalise(1, n);
        normalise(n, 1);
    }
}

void HyperBlock::leave(const float* x, const float* y, const float* carry, float* out, int tokens) {
    Engine& e = *engine_;
    const int n = c_.streams;
    const size_t ld = static_cast<size_t>(n) * static_cast<size_t>(c_.hidden);
    check(c_.leaves, "the end of the streams has no way back");
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    each_token(e, tokens, [&](int token) {
        const size_t t = static_cast<size_t>(token);
        const float* post = carry + t * static_cast<size_t>(c_.carry());
        e.kernels.stream_leave(x + t * ld, y + t * static_cast<size_t>(c_.hidden), n, c_.hidden, post, post + n, out + t * ld);
    });
}

}  // namespace ktcore

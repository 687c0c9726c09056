// Names the rows that each token attends to, and chooses among entries by the scores of an indexer.
#include "blocks/entries.h"

#include <algorithm>
#include <cstring>

#include "blocks/indexer.h"

namespace ktcore {
namespace {
constexpr int kTokens = 8;   // tokens of one item, which read a block of entries once
constexpr int kKeys = 1024;  // entries of one item
}  // namespace

EntryAttention::EntryAttention(EnginePtr engine, Config config) : engine_(std::move(engine)), c_(std::move(config)) {
    check(c_.heads > 0 && c_.heads <= 4096 && c_.dim > 0 && c_.dim <= 1024, "heads must be 1 to 4096, of 1 to 1024 values");
    check(c_.window > 0 && c_.window <= 1 << 20 && c_.ratio >= 0 && c_.ratio <= 1 << 20, "window and ratio are out of range");
    check(static_cast<int>(c_.sinks.size()) == c_.heads, "sinks must have a value a head");
}

int64_t EntryAttention::entry_row(const Step& step, int sequence, int entry, const EntryRows& rows) const {
    const int64_t last = (int64_t{entry} + 1) * c_.ratio - 1;
    const int64_t page = step.blocks(sequence)[last / rows.page_size], each = page_entries(rows.page_size);
    return kStaged + rows.slots * c_.window + page * each + last % rows.page_size / c_.ratio;
}

// The rows of one token, of which the keys from `from` on, a token of the step, are staged.
void EntryAttention::name_rows(const Step& step, const std::vector<int32_t>& slots, int from, int token, const EntryRows& rows,
                               const int32_t* chosen, int top_k) {
    const int seq = step.sequence_of(token), first = step.q_start(seq), before = step.context(seq) - step.queries(seq);
    const int position = before + token - first, staged = std::max(from, first), held = before + staged - first;
    const int64_t ring = kStaged + int64_t{slots[static_cast<size_t>(seq)]} * c_.window;
    for (int p = std::max(0, position - c_.window + 1); p <= position; p++)
        names_.push_back(static_cast<int32_t>(p < held ? ring + p % c_.window : staged - from + p - held));
    const int closed = c_.ratio ? (position + 1) / c_.ratio : 0;
    if (!chosen) {
        for (int e = 0; e < closed; e++) names_.push_back(static_cast<int32_t>(entry_row(step, seq, e, rows)));
        return;
    }
    const int32_t* named = chosen + static_cast<size_t>(token) * static_cast<size_t>(top_k);
    for (int i = 0; i < top_k && named[i] >= 0; i++) {
        check(named[i] < closed, "a chosen entry has not closed");
        names_.push_back(static_cast<int32_t>(entry_row(step, seq, named[i], rows)));
    }
}

void EntryAttention::forward(Step& step, const std::vector<int32_t>& slots, const float* q, const float* k, float* out,
                             const EntryRows& rows, const int32_t* chosen, int top_k) {
    Engine& e = *engine_;
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    check(static_cast<int>(slots.size()) == step.sequences(), "every sequence has a slot");
    for (int32_t slot : slots) check(slot >= 0 && slot < rows.slots, "a state slot was not allocated");
    if (c_.ratio) step.check_pages(rows.pages, rows.page_size);
    const int64_t all = kStaged + rows.slots * c_.window + rows.pages * page_entries(rows.page_size);
    check(all <= INT32_MAX, "a memory of keys and entries has fewer than 2^31 rows");
    const size_t row = cache_row_bytes(rows.type, c_.dim), width = static_cast<size_t>(c_.heads) * static_cast<size_t>(c_.dim);
    uint8_t* base = static_cast<uint8_t*>(rows.base);
    AttendShape shape{};
    shape.heads = c_.heads;
    shape.kv_heads = 1;
    shape.head_dim = c_.dim;
    shape.scale = c_.scale;
    shape.sinks = c_.sinks.data();
    const Cache cache{rows.base, rows.base, all, 1, rows.type};
    for (int from = 0; from < step.tokens(); from += kStaged) {
        const int end = std::min(step.tokens(), from + kStaged);
        each_token(e, end - from, [&](int i) {
            const float* key = k + static_cast<size_t>(from + i) * static_cast<size_t>(c_.dim);
            e.kernels.to_cache(key, c_.dim, c_.dim, base + static_cast<size_t>(i) * row, rows.type);
        });
        names_.clear();
        ends_.assign(1, 0);
        for (int t = from; t < end; t++) {
            name_rows(step, slots, from, t, rows, chosen, top_k);
            ends_.push_back(static_cast<int32_t>(names_.size()));
        }
        plan_.clear();
        for (int t = from; t < end; t++) {
            const int32_t begin = ends_[static_cast<size_t>(t - from)], count = ends_[static_cast<size_t>(t - from + 1)] - begin;
            plan_.add(shape, {t, 1, count, names_.data() + begin}, cache, q, width, out, width);
        }
        plan_.run(e, shape, out, width);
        for (int t = from; t < end; t++) {
            const int seq = step.sequence_of(t), position = step.context(seq) - step.queries(seq) + t - step.q_start(seq);
            const size_t ring = static_cast<size_t>(kStaged) + static_cast<size_t>(slots[static_cast<size_t>(seq)]) *
                                                                   static_cast<size_t>(c_.window);
            std::memcpy(base + (ring + static_cast<size_t>(position % c_.window)) * row,
                        base + static_cast<size_t>(t - from) * row, row);
        }
    }
}

void store_rows(Engine& e, const float* values, int count, int dim, const std::vector<int64_t>& rows, void* base, CacheType type) {
    const size_t row = cache_row_bytes(type, dim);
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    each_token(e, count, [&](int i) {
        e.kernels.to_cache(values + static_cast<size_t>(i) * static_cast<size_t>(dim), dim, dim,
                           static_cast<uint8_t*>(base) + static_cast<size_t>(rows[static_cast<size_t>(i)]) * row, type);
    });
}

void choose_entries(Engine& e, const EntryChoice& c, const Step& step, const Cache& keys, int32_t* out, Memory& buffer) {
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    const size_t width = static_cast<size_t>(c.heads) * static_cast<size_t>(c.dim), heads = static_cast<size_t>(c.heads);
    const size_t top_k = static_cast<size_t>(c.top_k);
    for (int s = 0; s < step.sequences(); s++) {
        const int queries = step.queries(s), before = step.context(s) - queries, entries = step.context(s) / c.ratio;
        const auto seen = [&](int t) { return (before + t + 1) / c.ratio; };
        const size_t stride = static_cast<size_t>(std::max(entries, 1));
        const int at_once = std::clamp(static_cast<int>((size_t{4} << 20) / stride), 1, 512);
        for (int t0 = 0; t0 < queries; t0 += at_once) {
            const int some = std::min(at_once, queries - t0), last = seen(t0 + some - 1);
            const size_t need = sizeof(float) * stride * static_cast<size_t>(some);
            if (buffer.size() < need) buffer = Memory(need);
            float* scores = reinterpret_cast<float*>(buffer.data());
            if (last > c.top_k) {  // else all are taken
                const int tiles = (some + kTokens - 1) / kTokens, parts = (last + kKeys - 1) / kKeys;
                e.pool.reserve_local(index_scratch(c.heads, c.dim, kTokens));
                e.pool.run(tiles * parts, [&](int i, int thread) {
                    const int t = i / parts * kTokens, key0 = i % parts * kKeys, tokens = std::min(kTokens, some - t);
                    const int end = seen(t0 + t + tokens - 1);
                    if (key0 >= end) return;
                    const size_t token = static_cast<size_t>(step.q_start(s) + t0 + t);
                    const IndexItem item{c.q + token * width, width, c.weights + token * heads, heads,
                                         scores + static_cast<size_t>(t) * stride + key0, stride, keys.k, step.blocks(s),
                                         keys.page_size, c.heads, c.dim, tokens, key0, std::min(end, key0 + kKeys), keys.type};
                    e.kernels.index_scores(item, e.pool.local(thread));
                });
            }
            e.pool.run(some, [&](int i, int) {
                choose_highest(scores + static_cast<size_t>(i) * stride, seen(t0 + i), c.top_k,
                               out + (static_cast<size_t>(step.q_start(s)) + static_cast<size_t>(t0 + i)) * top_k);
            });
        }
    }
}

}  // namespace ktcore

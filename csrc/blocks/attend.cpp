// Cuts a step's attention into work items: query tiles in prefill, chunks of the context in decode.
#include <algorithm>

#include "blocks/attention.h"

namespace ktcore {
namespace {
// All constants, none depends on the number of threads: neither does any result.
constexpr int kTileRows = 192;  // query rows (token x head of the group) that share one transposed key block
constexpr int kAlwaysSplit = 4;  // a sequence with at most so many queries is cut along its context too,
constexpr int kSplitTokens = 32;  // and one with at most so many,
constexpr int kSerialReady = 4;  // so many queries' rows are made integers before other threads are on their way
constexpr int kSplitRows = 1 << 14;  // while its parts have no more rows a head than this: 8 MB at 128 values

bool splits(const AttendShape& s, const AttendSpan& span) {
    if (s.whole) return false;
    if (span.queries <= kAlwaysSplit) return true;
    const int64_t rows = int64_t{span.queries} * (s.heads / s.kv_heads), parts = span.context / kSplitKeys + 1;
    return span.queries <= kSplitTokens && rows * parts <= kSplitRows;
}
}  // namespace

void AttendPlan::clear() {
    items.clear();
    merges.clear();
    shared.clear();
    max_rows = 0;
    partial_rows = 0;
}

void AttendPlan::add(const AttendShape& s, const AttendSpan& span, const Cache& cache, const float* q, size_t q_stride,
                     float* out, size_t out_stride) {
    const int group = s.heads / s.kv_heads, tile = std::max(1, kTileRows / group), n = span.queries;
    const int before = span.context - n;
    const bool split = splits(s, span);
    const int step = n <= kAlwaysSplit ? n : tile;
    for (int t = 0; t < n; t += step) {
        AttendItem it{};
        it.tokens = std::min(step, n - t);
        it.first_pos = before + t;
        it.k_pages = cache.k;
        it.v_pages = cache.v;
        it.blocks = span.blocks;
        it.page_size = cache.page_size;
        it.kv_heads = s.kv_heads;
        it.group = group;
        it.head_dim = s.head_dim;
        it.value_dim = s.value_width();
        it.k_row = s.k_row ? s.k_row : it.head_dim;
        it.v_row = s.v_row ? s.v_row : it.value_dim;
        it.window = s.window;
        it.chunk = s.chunk;
        it.scale = s.scale;
        it.type = cache.type;
        it.q_stride = q_stride;
        it.out_stride = out_stride;
        const int token = span.token + t, end = it.first_pos + it.tokens, rows = it.tokens * group;
        const int low = std::max(s.window > 0 ? std::max(0, it.first_pos + 1 - s.window) : 0,
                                 s.chunk > 0 ? it.first_pos / s.chunk * s.chunk : 0);
        const int begin = low / kKeyBlock * kKeyBlock;
        max_rows = std::max(max_rows, rows);
        for (int h = 0; h < s.kv_heads; h++) {
            it.kv_head = h;
            it.key_end = end;
            it.sinks = s.sinks ? s.sinks + h * group : nullptr;
            it.q = q + static_cast<size_t>(token) * q_stride + static_cast<size_t>(h) * group * it.head_dim;
            it.out = out + static_cast<size_t>(token) * out_stride + static_cast<size_t>(h) * group * it.value_dim;
            if (!split || begin / kSplitKeys == (end - 1) / kSplitKeys) {
                it.key0 = begin;
                it.key1 = end;
                items.push_back(it);
                continue;
            }
            const size_t first_row = partial_rows;
            int parts = 0;
            if (cache.type == CacheType::I16) {
                shared.push_back(items.size());
                it.ready = reinterpret_cast<const uint8_t*>(shared.size());  // which, for now
            }
            for (int key = begin; key < end; key = it.key1, parts++) {
                it.key0 = key;
                it.key1 = std::min(end, (key / kSplitKeys + 1) * kSplitKeys);
                // Offsets for now: the buffer is sized when all are known. Non-null marks a part.
                it.partial_ml = reinterpret_cast<float*>(partial_rows + 1);
                partial_rows += static_cast<size_t>(rows);
                items.push_back(it);
            }
            it.partial_ml = nullptr;
            it.ready = nullptr;
            merges.push_back({first_row, parts, token, h, rows});
        }
    }
}

// Queries that several items share become integers once.
void AttendPlan::ready_queries(Engine& e, int width) {
    const size_t bytes = (attend_ready_bytes(width, max_rows) + 63) / 64 * 64;
    if (ready.size() < bytes * shared.size()) ready = Memory(bytes * shared.size() * 2);
    for (AttendItem& it : items)
        if (it.ready) it.ready = ready.data() + (reinterpret_cast<size_t>(it.ready) - 1) * bytes;
    const auto one = [&](int i, int thread) {
        const AttendItem& it = items[shared[static_cast<size_t>(i)]];
        e.kernels.attend_ready(it, const_cast<uint8_t*>(it.ready), e.pool.local(thread));
    };
    const int count = static_cast<int>(shared.size());
    if (count > kSerialReady) return e.pool.run(count, one);
    for (int i = 0; i < count; i++) one(i, 0);
}

void AttendPlan::run(Engine& e, const AttendShape& s, float* out, size_t out_stride) {
    const int value = s.value_width(), group = s.heads / s.kv_heads, dp = dpad(value);
    const size_t need = partial_rows * static_cast<size_t>(dp + 2) * 4;
    if (partial.size() < need) partial = Memory(need * 2);
    float* part_out = reinterpret_cast<float*>(partial.data());
    float* part_ml = part_out + partial_rows * dp;
    for (AttendItem& it : items) {
        if (!it.partial_ml) continue;
        const size_t row = reinterpret_cast<size_t>(it.partial_ml) - 1;
        it.partial_ml = part_ml + row * 2;
        it.partial_out = part_out + row * dp;
    }
    e.pool.reserve_local(attend_scratch(std::max(s.head_dim, value), max_rows));
    ready_queries(e, s.head_dim);
    e.pool.run(static_cast<int>(items.size()), [&](int i, int thread) {
        e.kernels.attend(items[static_cast<size_t>(i)], e.pool.local(thread));
    });
    if (merges.empty()) return;
    e.pool.run(static_cast<int>(merges.size()), [&](int i, int) {
        const Merge& m = merges[static_cast<size_t>(i)];
        const size_t at = static_cast<size_t>(m.token) * out_stride + static_cast<size_t>(m.kv_head) * group * value;
        e.kernels.attend_merge(part_ml + m.first_row * 2, part_out + m.first_row * dp, m.parts, m.rows, value, group,
                               s.sinks ? s.sinks + m.kv_head * group : nullptr, out + at, out_stride);
    });
}

void attend(Engine& e, const AttendShape& s, const Step& step, const Cache& cache, const float* q, float* out,
            AttendPlan& plan) {
    const size_t q_width = static_cast<size_t>(s.heads) * s.head_dim;
    const size_t out_width = static_cast<size_t>(s.heads) * s.value_width();
    plan.clear();
    for (int i = 0; i < step.sequences(); i++)
        plan.add(s, {step.q_start(i), step.queries(i), step.context(i), step.blocks(i)}, cache, q, q_width, out, out_width);
    plan.run(e, s, out, out_width);
}

}  // namespace ktcore

// Cuts a step's attention into work items: query tiles in prefill, chunks of the context in decode.
#include <algorithm>

#include "blocks/attention.h"

namespace ktcore {
namespace {
// All constants, none depends on the number of threads: neither does any result.
constexpr int kTileRows = 96;    // query rows (token x head of the group) that share one transposed key block
constexpr int kSplitTokens = 4;  // a sequence with at most so many queries is cut along its context too
}  // namespace

void attend(Engine& e, const AttendShape& s, const Step& step, const Cache& cache, const float* q, float* out,
            AttendPlan& plan) {
    const int group = s.heads / s.kv_heads, dp = dpad(s.head_dim), tile = std::max(1, kTileRows / group);
    const size_t width = static_cast<size_t>(s.heads) * s.head_dim;
    plan.items.clear();
    plan.merges.clear();
    int parts = 0, max_rows = 0;
    size_t partial_rows = 0;
    for (int seq = 0; seq < step.sequences(); seq++) {
        const int n = step.queries(seq), before = step.context(seq) - n;
        for (int t = 0; t < n; t += n <= kSplitTokens ? n : tile) {
            AttendItem it{};
            it.tokens = std::min(n <= kSplitTokens ? n : tile, n - t);
            it.first_pos = before + t;
            it.k_pages = cache.k;
            it.v_pages = cache.v;
            it.blocks = step.blocks(seq);
            it.page_size = cache.page_size;
            it.kv_heads = s.kv_heads;
            it.head_dim = s.head_dim;
            it.group = group;
            it.window = s.window;
            it.scale = s.scale;
            it.type = cache.type;
            it.q_stride = it.out_stride = width;
            const int token = step.q_start(seq) + t, end = it.first_pos + it.tokens, rows = it.tokens * group;
            const int low = s.window > 0 ? std::max(0, it.first_pos + 1 - s.window) : 0;
            const int begin = low / kKeyBlock * kKeyBlock;
            max_rows = std::max(max_rows, rows);
            for (int h = 0; h < s.kv_heads; h++) {
                it.kv_head = h;
                const size_t at = static_cast<size_t>(token) * width + static_cast<size_t>(h) * group * s.head_dim;
                it.q = q + at;
                it.out = out + at;
                if (n > kSplitTokens || begin / kSplitKeys == (end - 1) / kSplitKeys) {
                    it.key0 = begin;
                    it.key1 = end;
                    plan.items.push_back(it);
                    continue;
                }
                const int first = parts;
                for (int key = begin; key < end; key = it.key1, parts++) {
                    it.key0 = key;
                    it.key1 = std::min(end, (key / kSplitKeys + 1) * kSplitKeys);
                    // Offsets for now: the buffer is sized when all are known. Non-null marks a part.
                    it.partial_ml = reinterpret_cast<float*>(partial_rows + 1);
                    partial_rows += static_cast<size_t>(rows);
                    plan.items.push_back(it);
                }
                it.partial_ml = nullptr;
                plan.merges.push_back({first, parts - first, token, h, rows});
            }
        }
    }
    const size_t need = partial_rows * static_cast<size_t>(dp + 2) * 4;
    if (plan.partial.size() < need) plan.partial = Memory(need * 2);
    float* part_out = reinterpret_cast<float*>(plan.partial.data());
    float* part_ml = part_out + partial_rows * dp;
    for (AttendItem& it : plan.items) {
        if (!it.partial_ml) continue;
        const size_t row = reinterpret_cast<size_t>(it.partial_ml) - 1;
        it.partial_ml = part_ml + row * 2;
        it.partial_out = part_out + row * dp;
    }
    e.pool.reserve_local(attend_scratch(s.head_dim, max_rows));
    e.pool.run(static_cast<int>(plan.items.size()), [&](int i, int thread) {
        e.kernels.attend(plan.items[static_cast<size_t>(i)], e.pool.local(thread));
    });
    size_t row = 0;
    for (const auto& m : plan.merges) {
        const size_t at = static_cast<size_t>(m.token) * width + static_cast<size_t>(m.kv_head) * group * s.head_dim;
        e.kernels.attend_merge(part_ml + row * 2, part_out + row * dp, m.parts, m.rows, s.head_dim, group, out + at, width);
        row += static_cast<size_t>(m.parts) * m.rows;
    }
}

}  // namespace ktcore

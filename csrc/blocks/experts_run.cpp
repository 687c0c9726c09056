// The two parallel regions of a layer's experts. Items are cut by cost, so that one token through eight experts and
// a skewed batch both spread over the threads; how they are cut never changes a result.
#include <algorithm>
#include <cstring>

#include "blocks/experts.h"

namespace ktcore {
namespace {
constexpr size_t kAcc = size_t{kTokenChunk} * kPanelRows;
constexpr int kPassCost = 8;  // reading a panel once costs about as much as so many rows of it
constexpr int kItemsPerThread = 24;

size_t gather_stride(int hidden) { return act_stride(padded_k(hidden)); }
size_t gather_floats(int hidden) { return (static_cast<size_t>(hidden) * 4 + 63) / 64 * 64; }

// Rows of a group are cut evenly: a chunk of few rows would read the weights for little.
int chunks_of(int count) { return (count + kTokenChunk - 1) / kTokenChunk; }
int chunk_begin(int count, int chunks, int i) { return static_cast<int>(int64_t{count} * i / chunks); }

// The next run of panels starts elsewhere: ask for its beginning while this one ends.
void touch_ahead(const Engine& e, const PackedView& w, int panel) {
    const uint8_t* p = w.data + w.panel_bytes * static_cast<size_t>(panel);
    for (int i = 0, n = e.reading(w.format).ahead; i < n; i += 64) __builtin_prefetch(p + i);
}

void cut_items(ExpertPlan& plan, int threads) {
    int64_t cost = 0;
    for (const auto& g : plan.groups) cost += int64_t{g.w.gate.panels} * (g.count + kPassCost * chunks_of(g.count));
    const int64_t target = std::max<int64_t>(1, cost / (int64_t{threads} * kItemsPerThread));
    plan.items.clear();
    for (size_t i = 0; i < plan.groups.size(); i++) {
        const auto& g = plan.groups[i];
        const int chunks = chunks_of(g.count);
        for (int c = 0; c < chunks; c++) {
            const int r0 = chunk_begin(g.count, chunks, c), r1 = chunk_begin(g.count, chunks, c + 1);
            const int step = static_cast<int>(std::clamp<int64_t>(target / (r1 - r0 + kPassCost), 1, g.w.gate.panels));
            for (int p = 0; p < g.w.gate.panels; p += step)
                plan.items.push_back({static_cast<int>(i), r0, r1, p, std::min(g.w.gate.panels, p + step)});
        }
    }
}

// The item's input rows side by side, copied once for all items of the same rows on this thread.
Rows gather(const ExpertPlan& plan, const ExpertPlan::Item& it, const ExpertRun& run, bool int8, bool floats,
            uint8_t* to, int64_t& held) {
    const int first = plan.groups[static_cast<size_t>(it.group)].start + it.row0, n = it.row1 - it.row0;
    const int32_t* token = plan.token.data() + first;
    Rows rows = run.in;
    bool neighbours = true;
    for (int i = 1; i < n && neighbours; i++) neighbours = token[i] == token[0] + i;
    if (neighbours) {
        // One token, or all of a chunk's: nothing to copy.
        const size_t at = static_cast<size_t>(token[0]);
        if (int8) rows.act.base += at * rows.act.stride;
        if (floats) rows.x += at * rows.ldx;
        return rows;
    }
    const size_t stride = rows.act.stride, width = static_cast<size_t>(run.hidden);
    float* x = reinterpret_cast<float*>(to + stride * kTokenChunk);
    if (held != first) {
        for (int i = 0; i < n; i++) {
            const size_t at = static_cast<size_t>(token[i]);
            if (int8) std::memcpy(to + stride * static_cast<size_t>(i), rows.act.base + at * stride, stride);
            if (floats) std::memcpy(x + width * static_cast<size_t>(i), rows.x + at * rows.ldx, width * sizeof(float));
        }
        held = first;
    }
    rows.act.base = to;
    if (floats) rows.x = x, rows.ldx = width;
    return rows;
}

void scale_rows(float* acc, int rows, const float* weight) {
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < kPanelRows; r++) acc[i * kPanelRows + r] *= weight[i];
}

void add_bias(float* acc, int rows, const float* bias) {
    for (int i = 0; bias && i < rows; i++)
        for (int r = 0; r < kPanelRows; r++) acc[i * kPanelRows + r] += bias[r];
}

constexpr int kFewRows = 4;  // up to so many rows the kernels round as they go

uint16_t* rounded_at(uint8_t* scratch, int hidden) {
    return reinterpret_cast<uint16_t*>(scratch + kPanelScratch + 2 * kAcc * sizeof(float) +
                                       kTokenChunk * (gather_stride(hidden) + gather_floats(hidden)));
}
// Rows [r0, r1) as bfloat16 into `to`, for all panels that follow.
void round_once(const Engine& e, Rows& rows, int r0, int r1, int width, uint16_t* to) {
    const size_t ld = static_cast<size_t>(padded_k(width)), at = static_cast<size_t>(r0);
    e.kernels.round_rows(rows.x + at * rows.ldx, rows.ldx, r1 - r0, width, to, ld);
    rows.rounded = to - at * ld;
    rows.ld_rounded = ld;
}

void gate_up(Engine& e, ExpertPlan& plan, const ExpertRun& run, const ExpertPlan::Item& it, int thread) {
    const auto& g = plan.groups[static_cast<size_t>(it.group)];
    const PackedView &gate = g.w.gate, &up = g.w.up, &down = g.w.down;
    const bool float_gate = needs_float(gate, run.exact), float_up = needs_float(up, run.exact);
    uint8_t* scratch = e.pool.local(thread);
    float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
    float* acc2 = acc + kAcc;
    uint8_t* copies = reinterpret_cast<uint8_t*>(acc2 + kAcc);
    Rows in = gather(plan, it, run, !float_gate || !float_up, float_gate || float_up, copies,
                           plan.gathered[static_cast<size_t>(thread)]);
    const int n = it.row1 - it.row0;
    if (n > kFewRows && (takes_rounded(e, gate, run.exact) || takes_rounded(e, up, run.exact)))
        round_once(e, in, 0, n, run.hidden, rounded_at(scratch, run.hidden));
    const float* weight = plan.weight.data() + g.start + it.row0;
    uint8_t* mid = run.mid + g.mid_at;
    for (int p = it.panel0; p < it.panel1; p++) {
        const int row0 = p * kPanelRows;
        run_panel(e, gate, p, in, run.exact, 0, n, acc, scratch);
        run_panel(e, up, p, in, run.exact, 0, n, acc2, scratch);
        if (run.weight_on_input) {
            scale_rows(acc, n, weight);
            scale_rows(acc2, n, weight);
        }
        add_bias(acc, n, g.w.gate_bias ? g.w.gate_bias + row0 : nullptr);
        add_bias(acc2, n, g.w.up_bias ? g.w.up_bias + row0 : nullptr);
        const Activation activation = g.clamp.used() ? g.clamp.apply(e.kernels, acc, acc2, n) : run.activation;
        if (needs_float(down, run.exact))
            e.kernels.gated_store(acc, acc2, n, std::min(kPanelRows, gate.rows - row0), activation,
                                  reinterpret_cast<float*>(mid + g.mid_stride * static_cast<size_t>(it.row0)) + row0,
                                  g.mid_stride / sizeof(float));
        else
            e.kernels.gated_quantize(acc, acc2, n, activation, {mid, g.mid_stride, g.mid_k}, it.row0, row0);
    }
}

// Panels [p0, p1) of every group's down, added up group by group.
void down(Engine& e, const ExpertPlan& plan, const ExpertRun& run, const float* weights, int p0, int p1, int thread) {
    uint8_t* scratch = e.pool.local(thread);
    float* acc = reinterpret_cast<float*>(scratch + kPanelScratch);
    const int col0 = p0 * kPanelRows, cols = std::min(run.hidden, p1 * kPanelRows) - col0;
    const size_t ldo = static_cast<size_t>(run.hidden), bytes = sizeof(float) * static_cast<size_t>(cols);
    for (int t = 0; t < run.tokens; t++) {
        float* to = run.out + static_cast<size_t>(t) * ldo + col0;
        if (!run.residual)
            std::memset(to, 0, bytes);
        else if (run.residual != run.out)
            std::memcpy(to, run.residual + static_cast<size_t>(t) * ldo + col0, bytes);
    }
    for (size_t i = 0; i < plan.groups.size(); i++) {
        const auto& g = plan.groups[i];
        const PackedView& w = g.w.down;
        const int chunks = chunks_of(g.count);
        uint8_t* mid = run.mid + g.mid_at;
        Rows in{reinterpret_cast<const float*>(mid), g.mid_stride / sizeof(float), {mid, g.mid_stride, g.mid_k}};
        for (int c = 0; c < chunks; c++) {
            const int r0 = chunk_begin(g.count, chunks, c), r1 = chunk_begin(g.count, chunks, c + 1);
            in.rounded = nullptr;
            if (r1 - r0 > kFewRows && takes_rounded(e, w, run.exact))
                round_once(e, in, r0, r1, w.cols, reinterpret_cast<uint16_t*>(acc + kAcc));
            for (int p = p0; p < p1; p++) {
                if (p + 1 == p1 && i + 1 < plan.groups.size()) touch_ahead(e, plan.groups[i + 1].w.down, p0);
                run_panel(e, w, p, in, run.exact, r0, r1, acc, scratch);
                add_bias(acc, r1 - r0, g.w.down_bias ? g.w.down_bias + p * kPanelRows : nullptr);
                e.kernels.accumulate(acc, r1 - r0, std::min(kPanelRows, w.rows - p * kPanelRows), run.out + p * kPanelRows,
                                     ldo, plan.token.data() + g.start + r0, weights + g.start + r0);
            }
        }
    }
}
}  // namespace

size_t expert_scratch(int hidden, int ffn) {
    const size_t copies = kTokenChunk * (gather_stride(hidden) + gather_floats(hidden) + sizeof(uint16_t) * padded_k(hidden));
    const size_t rounded = kTokenChunk * sizeof(uint16_t) * padded_k(ffn);  // of hidden rows, behind one accumulator
    return kPanelScratch + 2 * kAcc * sizeof(float) + std::max(copies, rounded);
}

void run_experts(Engine& e, ExpertPlan& plan, const ExpertRun& run) {
    const int threads = e.pool.threads();
    cut_items(plan, threads);
    plan.gathered.assign(static_cast<size_t>(threads), -1);
    e.pool.run(static_cast<int>(plan.items.size()),
               [&](int i, int thread) { gate_up(e, plan, run, plan.items[static_cast<size_t>(i)], thread); });
    if (run.weight_on_input) std::fill(plan.weight.begin(), plan.weight.end(), 1.f);
    const int panels = (run.hidden + kPanelRows - 1) / kPanelRows;
    // Long runs: each group's are read from end to end, then comes another's. Eight panels are 5% quicker than four.
    const int step = std::clamp(panels / (threads * 4), 1, 16);
    e.pool.run((panels + step - 1) / step, [&](int i, int thread) {
        down(e, plan, run, plan.weight.data(), i * step, std::min(panels, (i + 1) * step), thread);
    });
}

}  // namespace ktcore

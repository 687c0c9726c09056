// Times both ways of a product with few tokens.
#include "blocks/switch.h"

#include <algorithm>
#include <cstring>

#include "core/os.h"

namespace ktcore {
namespace {
constexpr int kCols = 2048;
constexpr size_t kBytes = size_t{4} << 20;  // more than a core's own caches keep
constexpr double kTarget = 250e3;  // ns of a pass with one token: slow units take fewer panels
constexpr int kRounds = 5;
constexpr double kMargin = 1.02;  // as much slower may reading the panel directly be: it is the way with less to go wrong
}  // namespace

int measure_few(Engine& e, Format format) {
    if (e.kernels.few(format) == 0) return 0;  // there is one way
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    PackedView w = packed_shape(format, kPanelRows, kCols);
    int panels = static_cast<int>(kBytes / w.panel_bytes);
    const Memory weights(w.panel_bytes * static_cast<size_t>(panels) + kReadAhead);
    std::memset(weights.data(), 0x11, weights.size());  // codes and scales that are ordinary numbers
    w.data = weights.data();
    w.panels = panels;
    const Memory rows(act_stride(kCols) * kMostFew), scratch(kPanelScratch), acc(size_t{kMostFew} * kPanelRows * sizeof(float));
    std::memset(rows.data(), 0x11, rows.size());
    const ActView x{rows.data(), act_stride(kCols), kCols};
    const auto took = [&](int tokens, int few) {
        const int64_t start = now_ns();
        for (int p = 0; p < panels; p++)
            e.kernels.panel(w, p, x, 0, tokens, reinterpret_cast<float*>(acc.data()), scratch.data(), few);
        return static_cast<double>(now_ns() - start);
    };
    const int all = panels;
    panels = 1;
    took(1, 1);
    panels = std::clamp(static_cast<int>(kTarget / std::max(1.0, took(1, 1))), 1, all);
    int best = 0;
    for (const int tokens : {1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, kMostFew}) {
        double direct = took(tokens, tokens), unpacked = took(tokens, 0);
        for (int r = 1; r < kRounds; r++) {
            direct = std::min(direct, took(tokens, tokens));
            unpacked = std::min(unpacked, took(tokens, 0));
        }
        if (direct > unpacked * kMargin) break;
        best = tokens;
    }
    return best;
}

void set_few(Engine& e, const std::string& format, int tokens) {
    check(tokens >= 0 && tokens <= kMostFew, "few tokens are 0 to " + std::to_string(kMostFew));
    e.few[static_cast<int>(parse_format(format))] = tokens;
}

}  // namespace ktcore

// Times the ways in which a panel can be read.
#include "blocks/switch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/os.h"

namespace ktcore {
namespace {
constexpr int kCols = 2048;
constexpr size_t kBytes = size_t{4} << 20;  // more than a core's own caches keep
constexpr double kTarget = 250e3;  // ns of a pass with one token: slow units take fewer panels
constexpr int kRounds = 5;
constexpr double kMargin = 1.02;  // as much slower may reading the panel directly be: it is the way with less to go wrong
constexpr int kDistances[] = {kReadAhead, 2048, 256, 0};
constexpr double kClear = 0.97;  // of the usual distance's time must another one take, at most

// Panels of ordinary numbers, and what a product with them needs.
class Sample {
  public:
    Sample(const Engine& e, Format format)
        : e_(e), w_(packed_shape(format, kPanelRows, kCols)), all_(static_cast<int>(kBytes / w_.panel_bytes)),
          weights_(w_.panel_bytes * static_cast<size_t>(all_) + kReadAhead), rows_(act_stride(kCols) * kMostFew),
          scratch_(kPanelScratch), acc_(size_t{kMostFew} * kPanelRows * sizeof(float)) {
        std::memset(weights_.data(), 0x11, weights_.size());
        std::memset(rows_.data(), 0x11, rows_.size());
        w_.data = weights_.data();
        w_.panels = 1;
        took(1, {1, kReadAhead});
        w_.panels = std::clamp(static_cast<int>(kTarget / std::max(1.0, took(1, {1, kReadAhead}))), 1, all_);
    }
    // ns of a pass with so many tokens over panels that lie in no cache, as a model's do: a way may be slower but wait less.
    double took(int tokens, Reading how) {
        evicts_ = evict_lines(weights_.data(), w_.panel_bytes * static_cast<size_t>(w_.panels));
        const int64_t start = now_ns();
        for (int p = 0; p < w_.panels; p++)
            e_.kernels.panel(w_, p, {rows_.data(), act_stride(kCols), kCols}, 0, tokens, reinterpret_cast<float*>(acc_.data()),
                             scratch_.data(), how);
        return static_cast<double>(now_ns() - start);
    }
    bool evicts() const { return evicts_; }

  private:
    const Engine& e_;
    PackedView w_;
    const int all_;
    const Memory weights_, rows_, scratch_, acc_;
    bool evicts_ = false;
};
}  // namespace

int measure_few(Engine& e, Format format) {
    if (e.kernels.few(format) == 0) return 0;  // there is one way
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    Sample sample(e, format);
    const int ahead = e.reading(format).ahead;
    int best = 0;
    for (const int tokens : {1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, kMostFew}) {
        double direct = sample.took(tokens, {tokens, ahead}), unpacked = sample.took(tokens, {0, ahead});
        for (int r = 1; r < kRounds; r++) {
            direct = std::min(direct, sample.took(tokens, {tokens, ahead}));
            unpacked = std::min(unpacked, sample.took(tokens, {0, ahead}));
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

int measure_ahead(Engine& e, Format format) {
    if (e.kernels.few(format) == 0) return kReadAhead;
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    Sample sample(e, format);
    if (!sample.evicts()) return kReadAhead;
    constexpr int kWays = sizeof kDistances / sizeof *kDistances;
    double least[kWays];
    std::fill(least, least + kWays, std::numeric_limits<double>::infinity());
    for (int r = 0; r < kRounds; r++)
        for (int i = 0; i < kWays; i++) least[i] = std::min(least[i], sample.took(1, {1, kDistances[i]}));
    const auto best = std::min_element(least, least + kWays);
    return *best <= least[0] * kClear ? kDistances[best - least] : kReadAhead;
}

void set_ahead(Engine& e, const std::string& format, int bytes) {
    check(bytes >= 0 && bytes <= kMostAhead && bytes % 64 == 0,
          "bytes read ahead are 0 to " + std::to_string(kMostAhead) + ", whole cache lines");
    e.ahead[static_cast<int>(parse_format(format))] = bytes;
}

}  // namespace ktcore

// Checks of a step's shapes, and the rotation tables that all layers of a step share.
#include "blocks/step.h"

#include <algorithm>
#include <cmath>

namespace ktcore {

Step::Step(std::vector<int32_t> positions, std::vector<int32_t> starts, std::vector<int32_t> context_lens,
           std::vector<int32_t> block_table, int64_t max_blocks)
    : positions_(std::move(positions)), q_start_(std::move(starts)), context_(std::move(context_lens)),
      table_(std::move(block_table)), max_blocks_(static_cast<size_t>(max_blocks)) {
    const size_t n = context_.size();
    check(q_start_.size() == n + 1, "q_start needs one entry more than context_lens");
    check(max_blocks >= 0 && table_.size() == n * max_blocks_, "block_table must be [sequences, max_blocks]");
    check(q_start_.front() == 0 && q_start_.back() == tokens(), "q_start must run from 0 to the number of tokens");
    owner_.resize(positions_.size());
    for (int s = 0; s < sequences(); s++) {
        check(q_start(s) >= 0 && q_start(s) <= q_start(s + 1) && q_start(s + 1) <= tokens(), "q_start must not decrease");
        check(context(s) >= queries(s) && context(s) < 1 << 30,
              "sequence " + std::to_string(s) + ": context length " + std::to_string(context(s)) +
                  " must cover its own " + std::to_string(queries(s)) + " new tokens");
        std::fill(owner_.begin() + q_start(s), owner_.begin() + q_start(s + 1), s);
    }
    for (int32_t p : positions_) check(p >= 0, "positions must not be negative");
}

void Step::check_pages(int64_t num_pages, int page_size) {
    const std::pair<int64_t, int> key{num_pages, page_size};
    std::lock_guard<std::mutex> hold(mutex_);
    if (std::find(checked_.begin(), checked_.end(), key) != checked_.end()) return;
    check(page_size > 0 && num_pages >= 0, "page_size must be positive");
    for (int s = 0; s < sequences(); s++) {
        const size_t used = (static_cast<size_t>(context(s)) + page_size - 1) / page_size;
        check(used <= max_blocks_, "sequence " + std::to_string(s) + ": context length " + std::to_string(context(s)) +
                                       " does not fit its " + std::to_string(max_blocks_) + " pages");
        for (size_t b = 0; b < used; b++)
            check(blocks(s)[b] >= 0 && blocks(s)[b] < num_pages,
                  "sequence " + std::to_string(s) + ": page " + std::to_string(blocks(s)[b]) + " is not one of " +
                      std::to_string(num_pages));
    }
    checked_.push_back(key);
}

const float* Step::rotations(const Vector& inv_freq, float scale) {
    std::lock_guard<std::mutex> hold(mutex_);
    for (const auto& r : rotations_)
        if (r->scale == scale && r->inv_freq == inv_freq) return r->values.data();
    auto made = std::make_unique<Rotation>(Rotation{inv_freq, scale, {}});
    const size_t n = inv_freq.size();
    made->values.resize(positions_.size() * 2 * n);
    float* out = made->values.data();
    for (size_t t = 0; t < positions_.size(); t++, out += 2 * n) {
        // Tokens of a batch often repeat positions in order; no need to be clever, this is once a step.
        for (size_t i = 0; i < n; i++) {
            const float angle = static_cast<float>(positions_[t]) * inv_freq[i];
            out[i] = std::cos(angle) * scale;
            out[n + i] = std::sin(angle) * scale;
        }
    }
    rotations_.push_back(std::move(made));
    return rotations_.back()->values.data();
}

}  // namespace ktcore

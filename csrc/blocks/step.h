// A ragged batch of one engine step: which tokens belong to which sequence, and where their cache pages are.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

class Step {
  public:
    // positions [T]; q_start [n+1]; context_lens [n], after this step; block_table [n][max_blocks].
    // Throws std::invalid_argument.
    Step(std::vector<int32_t> positions, std::vector<int32_t> q_start, std::vector<int32_t> context_lens,
         std::vector<int32_t> block_table, int64_t max_blocks);

    int tokens() const { return static_cast<int>(positions_.size()); }
    int sequences() const { return static_cast<int>(context_.size()); }
    int q_start(int s) const { return q_start_[static_cast<size_t>(s)]; }
    int queries(int s) const { return q_start(s + 1) - q_start(s); }
    int context(int s) const { return context_[static_cast<size_t>(s)]; }
    const int32_t* blocks(int s) const { return table_.data() + static_cast<size_t>(s) * max_blocks_; }
    // Sequence of token t.
    int sequence_of(int t) const { return owner_[static_cast<size_t>(t)]; }

    // Throws std::invalid_argument unless every context fits its row of the table and every page exists.
    void check_pages(int64_t num_pages, int page_size);
    // cos then sin, [tokens][2][inv_freq.size()], computed once a step for each distinct table.
    const float* rotations(const Vector& inv_freq, float scale);

  private:
    struct Rotation {
        Vector inv_freq;
        float scale;
        std::vector<float> values;
    };
    std::vector<int32_t> positions_, q_start_, context_, table_, owner_;
    size_t max_blocks_;
    std::vector<std::pair<int64_t, int>> checked_;
    std::vector<std::unique_ptr<Rotation>> rotations_;
    std::mutex mutex_;  // layers of two engines may share a step
};

}  // namespace ktcore

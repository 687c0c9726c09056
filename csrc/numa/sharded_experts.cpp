// Composition over ExpertsBlock: pairs of token and expert are handed to nodes by masking the others' ids.
#include "numa/sharded_experts.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace ktcore {
namespace {
constexpr size_t kSerialMerge = size_t{1} << 16;  // values: below, waking the nodes costs more than adding
constexpr size_t kMergeStep = size_t{1} << 13;
}  // namespace

ShardedExpertsBlock::ShardedExpertsBlock(TeamPtr team, std::vector<Share> shares, Config config)
    : team_(std::move(team)), config_(std::move(config)) {
    check(static_cast<int>(shares.size()) == team_->nodes(), "expected one share for each node of the team");
    check(config_.slots.empty() || config_.slots.size() == shares.size(), "expected slots for each node");
    for (int slots : config_.slots) check(slots > 0, "slots must be positive");
    const auto whole = [&](const Share& s) { return s.bank && s.first == 0 && s.bank->experts() == config_.experts; };
    const bool all_whole = std::all_of(shares.begin(), shares.end(), whole);
    check(all_whole || config_.slots.empty(), "slots are for nodes that hold all experts");
    int64_t next = 0;
    for (size_t i = 0; i < shares.size(); i++) {
        Share& s = shares[i];
        check(s.bank != nullptr && s.bank->hidden() == (i ? nodes_[0].share.bank->hidden() : s.bank->hidden()),
              "all shares must have the same hidden width");
        check(all_whole || s.first == next, "the nodes' experts must follow each other without a gap");
        next = s.first + s.bank->experts();
        auto block = std::make_unique<ExpertsBlock>(team_->engine(static_cast<int>(i)), s.bank, config_.activation,
                                                    config_.weight_on_input, config_.exact);
        nodes_.push_back({std::move(s), std::move(block), {}, nullptr});
    }
    check(next == config_.experts, "the nodes hold " + std::to_string(next) + " of " + std::to_string(config_.experts) +
                                       " experts");
}

void ShardedExpertsBlock::choose(const int64_t* ids, int64_t tokens, int64_t top_k) {
    const int64_t whole = std::accumulate(config_.slots.begin(), config_.slots.end(), int64_t{0});
    int64_t before = 0, slot0 = 0, slot1 = top_k;
    for (size_t i = 0; i < nodes_.size(); i++) {
        Node& n = nodes_[i];
        if (whole > 0) {  // rounded to nearest; not by position in the batch, on which no result may depend
            slot0 = (2 * top_k * before + whole) / (2 * whole);
            before += config_.slots[i];
            slot1 = (2 * top_k * before + whole) / (2 * whole);
        }
        const int64_t first = n.share.first, last = first + n.share.bank->experts();
        n.ids.resize(static_cast<size_t>(tokens * top_k));
        int64_t* to = n.ids.data();
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = 0; j < top_k; j++, to++) {
                const int64_t id = ids[t * top_k + j];
                *to = j >= slot0 && j < slot1 && id >= first && id < last ? id - first : -1;
            }
    }
}

void ShardedExpertsBlock::merge(float* out, size_t begin, size_t end) const {
    std::memcpy(out + begin, nodes_[0].partial + begin, (end - begin) * sizeof(float));
    for (size_t n = 1; n < nodes_.size(); n++) {
        const float* from = nodes_[n].partial;
        for (size_t i = begin; i < end; i++) out[i] += from[i];
    }
}

void ShardedExpertsBlock::forward(const float* x, const int64_t* ids, const float* weights, float* out, int64_t tokens,
                                  int64_t top_k) {
    for (int64_t i = 0; i < tokens * top_k; i++)
        check(ids[i] < config_.experts,
              "expert " + std::to_string(ids[i]) + " is not one of " + std::to_string(config_.experts));
    const size_t hidden = static_cast<size_t>(nodes_[0].share.bank->hidden());
    std::lock_guard<std::mutex> hold(team_->mutex());
    for (int64_t t0 = 0; t0 < tokens; t0 += kExpertTokens) {
        const int64_t n = std::min<int64_t>(kExpertTokens, tokens - t0);
        const size_t at = static_cast<size_t>(t0) * hidden, values = static_cast<size_t>(n) * hidden;
        choose(ids + t0 * top_k, n, top_k);
        for (size_t i = 0; i < nodes_.size(); i++)
            nodes_[i].partial = reinterpret_cast<float*>(team_->buffer(static_cast<int>(i), values * sizeof(float)));
        team_->run([&](int i) {
            Node& node = nodes_[static_cast<size_t>(i)];
            node.block->forward(x + at, node.ids.data(), weights + t0 * top_k, const_cast<float*>(node.partial), n, top_k);
        });
        if (values <= kSerialMerge) {
            merge(out + at, 0, values);
            continue;
        }
        const size_t count = nodes_.size();
        team_->run([&](int i) {
            const size_t begin = values * static_cast<size_t>(i) / count, end = values * (static_cast<size_t>(i) + 1) / count;
            Pool& pool = team_->engine(i)->pool;
            std::lock_guard<std::mutex> own(pool.mutex());
            pool.run(static_cast<int>((end - begin + kMergeStep - 1) / kMergeStep), [&](int step, int) {
                const size_t from = begin + static_cast<size_t>(step) * kMergeStep;
                merge(out + at, from, std::min(end, from + kMergeStep));
            });
        });
    }
}

}  // namespace ktcore

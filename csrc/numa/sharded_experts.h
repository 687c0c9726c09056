// Routed experts over several NUMA nodes: each node runs what it holds, then the nodes' sums are added up.
#pragma once
#include "blocks/experts.h"
#include "numa/team.h"

namespace ktcore {

class ShardedExpertsBlock {
  public:
    // What one node holds: a bank of its part of the intermediate columns (all banks then have the same experts), or of
    // the experts from `first` on.
    struct Share {
        Bank bank;
        int64_t first;
    };
    struct Config {
        int64_t experts;          // of the layer
        std::vector<int> slots;   // not empty: every node holds all, and takes of each token's choices a share so large
        std::string activation;
        bool weight_on_input, exact;
    };
    // One share a node of the team. Throws std::invalid_argument.
    ShardedExpertsBlock(TeamPtr team, std::vector<Share> shares, Config config);
    // As ExpertsBlock::forward. A token's result depends on neither its batch nor the threads, but on the shares: float
    // sums are taken within a node, then over nodes in their order.
    void forward(const float* x, const int64_t* ids, const float* weights, float* out, int64_t tokens, int64_t top_k);

  private:
    struct Node {
        Share share;
        std::unique_ptr<ExpertsBlock> block;
        std::vector<int64_t> ids;  // as the node's bank numbers them; -1 where another node has the pair
        const float* partial;
    };
    void choose(const int64_t* ids, int64_t tokens, int64_t top_k);
    void merge(float* out, size_t begin, size_t end) const;

    TeamPtr team_;
    std::vector<Node> nodes_;
    Config config_;
};

}  // namespace ktcore

// Which experts a token goes to, and with what weights.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

struct RouterConfig {
    int experts, top_k;
    bool sigmoid;  // else softmax
    Vector bias;   // added for the choice only; empty: none
    int groups, groups_kept;
    bool top2_sum;  // a group's score: sum of its best two, the rest masked to -inf; else its best, masked to 0
    bool renormalise;
    float renorm_eps, scale;
    Vector logit_bias;  // added to the logits; empty: none
    bool on_logits;      // chosen by logits, scores of the chosen alone; not with bias or groups
    bool root_softplus;  // scores are sqrt(log(1 + exp(logit)))
};
// Throws std::invalid_argument on numbers that do not fit each other.
void check_router(const RouterConfig& c);
// ids, weights [top_k] from logits [experts], which are overwritten; scratch [2 * experts]. Equal scores: the lowest
// expert first. NaNs rank last.
void choose_experts(const RouterConfig& c, float* logits, float* scratch, int64_t* ids, float* weights);
// The same for all tokens: in parallel when they are many.
void choose_experts(Engine& e, const RouterConfig& c, float* logits, float* scratch, size_t ld, int tokens, int64_t* ids,
                    float* weights);

class RouterBlock {
  public:
    RouterBlock(EnginePtr engine, Weight weight, RouterConfig config);
    // x [tokens][hidden]; ids, weights [tokens][top_k]. Logits are float32.
    void forward(const float* x, int64_t* ids, float* weights, int64_t tokens);

  private:
    EnginePtr engine_;
    Weight weight_;
    RouterConfig c_;
};

}  // namespace ktcore

// A whole MoE branch: norm, router, routed and shared experts, residual.
#pragma once
#include "blocks/experts.h"
#include "blocks/router.h"

namespace ktcore {

class MoEBlock {
  public:
    struct Config {
        RouterConfig router;
        Vector norm;
        float norm_eps;
        std::string activation;
        bool weight_on_input, residual, exact;
        Clamp clamp{}, shared_clamp{};
    };
    // shared_*: null for none; shared_gate [1, hidden] may be null beside them.
    MoEBlock(EnginePtr engine, Bank bank, Weight router, Weight shared_gate_proj, Weight shared_up, Weight shared_down,
             Weight shared_gate, Config config);
    // x, out [tokens][hidden]; out may be x. before: what the router sees instead of the normed x; null: that.
    void forward(const float* x, float* out, int64_t tokens, const float* before);

  private:
    void pass(const float* x, float* out, int tokens, const float* before);

    EnginePtr engine_;
    Bank bank_;
    Weight router_, gate_, up_, down_, scale_;
    Config c_;
    Activation activation_;
    ExpertPlan plan_;
};

}  // namespace ktcore

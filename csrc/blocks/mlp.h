// Gated feed-forward: out = (x +) down(act(gate(norm(x))) * up(norm(x))).
#pragma once
#include "blocks/clamp.h"

namespace ktcore {

class MLPBlock {
  public:
    MLPBlock(EnginePtr engine, Weight gate, Weight up, Weight down, Vector norm, float norm_eps,
             const std::string& activation, bool residual, bool exact, Clamp clamp = {});
    // x, out [tokens][hidden]; out may be x.
    void forward(const float* x, float* out, int64_t tokens);

  private:
    EnginePtr engine_;
    Weight gate_, up_, down_;
    Vector norm_;
    float eps_;
    Activation activation_;
    bool residual_, exact_;
    Clamp clamp_;
};

Activation parse_activation(const std::string& name);

}  // namespace ktcore

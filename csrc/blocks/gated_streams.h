// Gated residual streams (Qwen3.8-Flash-Next): what a branch reads of them, and how its result is injected.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

class GatedStreamsBlock {
  public:
    struct Config {
        int hidden, streams;
        Vector norm;  // [streams * hidden], as it multiplies
        float eps;
        bool exact;
    };
    // down [rank, streams * hidden], up [streams * hidden, rank], inject [streams, streams * hidden] or null: no way back.
    GatedStreamsBlock(EnginePtr engine, Weight down, Weight up, Weight inject, Config config);
    int carry() const { return inject_ ? c_.streams : 0; }
    // x [tokens][streams * hidden] -> out [tokens][hidden], carry [tokens][carry()].
    void enter(const float* x, float* out, float* carry, int tokens);
    // x and the branch's y [tokens][hidden] -> out [tokens][streams * hidden], which may be x.
    void leave(const float* x, const float* y, const float* carry, float* out, int tokens);

  private:
    EnginePtr engine_;
    Weight down_, up_, inject_;
    Config c_;
};

}  // namespace ktcore

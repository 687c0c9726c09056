// Hyper-connections (Xie et al., arXiv 2512.24880; DeepSeek-V4): what a branch reads of the residual streams, and what
// becomes of them.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

class HyperBlock {
  public:
    struct Config {
        int hidden, streams, rounds;
        float eps, rms_eps;
        bool leaves;         // false: the end of a model, pre-weights alone
        Vector base, scale;  // [rows()], [parts()]

        int rows() const { return leaves ? streams * (2 + streams) : streams; }
        // Floats of a token that `leave` needs: post [streams] and mix [streams][streams].
        int carry() const { return leaves ? streams * (1 + streams) : 0; }
    };
    // fn [rows][streams * hidden].
    HyperBlock(EnginePtr engine, Vector fn, Config config);
    int carry() const { return c_.carry(); }
    // x [tokens][streams * hidden] -> out [tokens][hidden], carry [tokens][carry()].
    void enter(const float* x, float* out, float* carry, int tokens);
    // x and the branch's y [tokens][hidden] -> out [tokens][streams * hidden], which may be x.
    void leave(const float* x, const float* y, const float* carry, float* out, int tokens);

  private:
    // A token's pre [streams] and carry, of what its chunks of columns gave: [chunks][rows + 1], the last the square.
    void weights(const float* parts, float* pre, float* carry) const;

    EnginePtr engine_;
    Vector fn_;
    Config c_;
    int chunks_;
};

}  // namespace ktcore

// Kimi delta attention (Kimi Linear, arXiv 2510.26692) as a fused residual branch with caller-owned states.
#pragma once
#include "blocks/delta.h"

namespace ktcore {

class KimiDeltaBlock {
  public:
    struct Config {
        int heads, dim, width;
        Vector conv;      // [3 * heads * dim][width], of q, k and v, the oldest token's factor first
        Vector rates;     // [heads], positive
        Vector dt_bias;   // [heads * dim]
        float bound;      // negative, or 0 for none
        Vector out_norm;  // [dim]
        float out_eps;
        Vector norm;
        float norm_eps;
        bool residual, exact;

        int inner() const { return heads * dim; }
    };
    // q, k, v [heads * dim, hidden]; f_a, g_a [rank, hidden]; f_b, g_b [heads * dim, rank]; b [heads, hidden];
    // o [hidden, heads * dim].
    struct Weights {
        Weight q, k, v, f_a, f_b, b, g_a, g_b, o;
    };
    KimiDeltaBlock(EnginePtr engine, Weights weights, Config config);
    // x, out [step.tokens()][hidden]; out may be x. states.conv is [slots][width - 1][3 * heads * dim], states.state
    // [slots][heads][dim][dim]. A sequence that begins with this step starts from zeros, whatever its slot holds.
    void forward(const float* x, float* out, const Step& step, const std::vector<int32_t>& slots, const DeltaStates& states);

  private:
    struct Buffers;
    void project(const float* x, int tokens, Buffers& b);
    void expand(const Weight& w, float* low, size_t rank, int tokens, float* out, Buffers& b);
    void mix(const Step& step, const StateSlots& slots, const DeltaStates& states, Buffers& b);

    EnginePtr engine_;
    Weights w_;
    Config c_;
    Vector taps_;               // conv as [width][3 * heads * dim]
    Vector q_scale_, k_scale_;  // weights that make an RMS norm the L2 norm
};

}  // namespace ktcore

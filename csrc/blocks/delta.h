// Gated delta net (Yang et al., arXiv 2412.06464; Qwen3-Next) as a fused residual branch with caller-owned states.
#pragma once
#include "blocks/delta_states.h"

namespace ktcore {

// The recurrence alone: q, k [tokens][heads][dk] normalised and scaled, v [tokens][heads][dv], g, beta [tokens][heads].
struct DeltaInputs {
    const float *q, *k, *v, *g, *beta;
};
// state [heads][dk][dv] goes on; out [tokens][heads][dv].
void delta_rule(Engine& e, const DeltaInputs& in, float* state, float* out, int tokens, int heads, int dk, int dv);

class DeltaBlock {
  public:
    struct Config {
        int key_heads, value_heads, key_dim, value_dim, width;
        Vector conv;            // [channels][width], the oldest token's factor first
        Vector decay, dt_bias;  // [value_heads]
        Vector out_norm;        // [value_dim]
        float out_eps;
        Vector norm;
        float norm_eps;
        bool residual, exact;
        bool tiled;  // value head i has key head i mod key_heads, instead of i / (value_heads / key_heads)
        bool sigmoid_gate;  // sigmoid(z) multiplies the normed result, instead of silu(z)

        int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    };
    // qkv [channels, hidden], z [value_heads * value_dim, hidden], b and a [value_heads, hidden],
    // o [hidden, value_heads * value_dim].
    DeltaBlock(EnginePtr engine, Weight qkv, Weight z, Weight b, Weight a, Weight o, Config config);
    // x, out [step.tokens()][hidden]; out may be x. slots: of each sequence; one that begins with this step starts from
    // zeros, whatever its slot holds. kept: of each sequence, or of none.
    void forward(const float* x, float* out, const Step& step, const std::vector<int32_t>& slots, const DeltaStates& states,
                 const std::vector<KeptState>& kept = {});

  private:
    struct Buffers;
    void prepare(int token, Buffers& b) const;
    void mix(const Step& step, const StateSlots& slots, const DeltaStates& states, Buffers& b);

    EnginePtr engine_;
    Weight qkv_, z_, b_, a_, o_;
    Config c_;
    Vector taps_;               // conv as [width][channels]
    Vector q_scale_, k_scale_;  // weights that make an RMS norm the L2 norm
};

}  // namespace ktcore

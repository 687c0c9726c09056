// What branches with recurrent states share: the slots of a step's sequences, and the convolution over their last inputs.
#pragma once
#include "blocks/step.h"

namespace ktcore {

constexpr int kMaxConvWidth = 16;

// States of one layer, a slot a sequence: conv [slots][width - 1][channels], the last inputs of the convolution, oldest
// first, and state [slots][value_heads][key_dim][value_dim].
struct DeltaStates {
    float* conv;
    float* state;
    int64_t slots;
};

// A slot that is given a sequence's state after its first `tokens` of a step, before the others; slot -1: none is.
struct KeptState {
    int32_t slot;
    int32_t tokens;
};

// Slots of a step's sequences: every one is used once. Refers to what it is made of.
struct StateSlots {
    const std::vector<int32_t>& own;
    const std::vector<KeptState>& kept;

    StateSlots(const Step& step, const std::vector<int32_t>& slots, const std::vector<KeptState>& keep, int64_t count);
    size_t of(int seq) const { return static_cast<size_t>(own[static_cast<size_t>(seq)]); }
    KeptState keep(int seq) const { return kept.empty() ? KeptState{-1, 0} : kept[static_cast<size_t>(seq)]; }
};

// out [tokens][channels] = silu of the convolution of x, each sequence behind the inputs in its slot, which go on. A sequence
// that begins with this step starts from zeros. taps [width][channels], the oldest token's first.
void convolve(Engine& e, const Step& step, const StateSlots& slots, const DeltaStates& states, const Vector& taps, int width,
              int channels, const float* x, float* out);

}  // namespace ktcore

// A gated product within limits, in place of act(gate) * up.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

// limit 0: not so. With u = up clamped to +-limit it is g * sigmoid(alpha * g) * (u + plus) of g = min(gate, limit), or
// with `after`, which needs alpha 1, min(gate * sigmoid(gate), limit) * (u + plus).
struct Clamp {
    float alpha = 0.f, limit = 0.f, plus = 1.f;
    bool after = false;

    bool used() const { return limit > 0.f; }
    // Makes rows of 32 values such that the activation that is returned, of gate, times up is the product. NaN stays.
    Activation apply(const Kernels& kernels, float* gate, float* up, int rows) const;
};
void check_clamp(const Clamp& c);  // throws std::invalid_argument

}  // namespace ktcore

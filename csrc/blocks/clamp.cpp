// The clamped activation, said by those that the kernels have.
#include "blocks/clamp.h"

#include <algorithm>
#include <cmath>

namespace ktcore {

Activation Clamp::apply(const Kernels& kernels, float* gate, float* up, int rows) const {
    const int n = rows * kPanelRows;
    if (after) {
        kernels.sigmoid_gate(gate, gate, n);
        for (int i = 0; i < n; i++) {
            up[i] = (std::min(std::max(up[i], -limit), limit) + plus) * std::min(gate[i], limit);
            gate[i] = 1.f;
        }
        return Activation::Relu;  // of 1
    }
    // silu(alpha * g) is alpha * (g * sigmoid(alpha * g))
    const float inverse = 1.f / alpha;
    for (int i = 0; i < n; i++) {
        gate[i] = alpha * std::min(gate[i], limit);
        up[i] = (std::min(std::max(up[i], -limit), limit) + plus) * inverse;
    }
    return Activation::Silu;
}

void check_clamp(const Clamp& c) {
    check(c.limit == 0.f || (c.limit > 0.f && c.alpha > 0.f && std::isfinite(c.alpha) && std::isfinite(c.plus)),
          "a clamped activation needs a positive alpha and limit");
    check(!c.after || c.alpha == 1.f, "a limit after the activation goes with an alpha of 1");
}

}  // namespace ktcore

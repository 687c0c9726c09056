// How Python hands a clamped activation over.
#pragma once
#include <optional>
#include <tuple>

#include "blocks/clamp.h"

namespace {
// (alpha, limit, plus, after) of ktcore.ops.mlp.ClampedGLU.
using ClampArgs = std::optional<std::tuple<float, float, float, bool>>;
[[maybe_unused]] ktcore::Clamp to_clamp(const ClampArgs& a) {
    if (!a) return {};
    const ktcore::Clamp c{std::get<0>(*a), std::get<1>(*a), std::get<2>(*a), std::get<3>(*a)};
    ktcore::check(c.limit > 0.f, "a clamped activation needs a positive alpha and limit");
    return c;
}
}  // namespace

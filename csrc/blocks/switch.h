// How many tokens are few: up to here a product reads the panel directly, beyond it unpacks the panel first. Where that is
// depends on the machine: measured, not known.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

constexpr int kMostFew = 32;

// The largest number of tokens, 0 to kMostFew, up to which products straight from the panel are no slower, timed on the
// calling thread over up to 4 MB of panels, some 20 ms. Formats with one way alone: what they have.
int measure_few(Engine& e, Format format);
// Throws std::invalid_argument unless tokens is 0 to kMostFew.
void set_few(Engine& e, const std::string& format, int tokens);

}  // namespace ktcore

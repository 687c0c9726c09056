// How panels are best read depends on the machine: measured, not known. Up to how many tokens a product takes the panel as it
// lies and beyond them unpacks it first, and how far ahead lines are asked for. No result depends on either.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

constexpr int kMostFew = 32;
constexpr int kMostAhead = 1 << 16;

// The largest number of tokens, 0 to kMostFew, up to which products straight from the panel are no slower, timed on the
// calling thread over up to 4 MB of panels that lie in no cache, some 100 ms. Formats with one way alone: what they have.
int measure_few(Engine& e, Format format);
// Throws std::invalid_argument unless tokens is 0 to kMostFew.
void set_few(Engine& e, const std::string& format, int tokens);

// How many bytes ahead of a product with one token lines are best asked for, timed in the same way, some 20 ms.
// Formats that are read in another way, and processors whose caches cannot be emptied: kReadAhead.
int measure_ahead(Engine& e, Format format);
// Throws std::invalid_argument unless bytes is 0 to kMostAhead and whole cache lines.
void set_ahead(Engine& e, const std::string& format, int bytes);

}  // namespace ktcore

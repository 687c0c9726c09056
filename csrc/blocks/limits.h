// What the machine can do at most, measured: arithmetic without memory, and memory without arithmetic.
#pragma once
#include "blocks/engine.h"

namespace ktcore {

// Operations a second of all threads; 0 where the CPU has no such instructions.
double peak_rate(Engine& e, Arithmetic arithmetic, double seconds);
// Bytes a second that all threads read, from a buffer well beyond the caches.
double read_bandwidth(Engine& e, double seconds);

}  // namespace ktcore

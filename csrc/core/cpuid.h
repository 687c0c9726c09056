// Which instruction sets this CPU and operating system offer, and which the process uses.
#pragma once
#include <string>
#include <vector>

#include "core/kernels.h"

namespace ktcore {

// Instruction sets this build can run here, lowest first; "scalar" always.
std::vector<std::string> isa_supported();
// Units that imitate instructions, for tests; KTCORE_ISA takes them, nothing chooses them.
std::vector<std::string> isa_emulated();
// The flags found that the kernels care about.
std::vector<std::string> cpu_flags();
// The kernels of the best set, or of the one that the environment variable KTCORE_ISA names. Throws
// std::invalid_argument if that is unknown or not available.
const Kernels& select_kernels();

}  // namespace ktcore

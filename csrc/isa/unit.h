// What every instruction-set unit begins with. Each unit is compiled with its own set's flags, and only it: nothing here
// may define a function that two units would share.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "core/f16.h"
#include "core/grids.h"
#include "core/iq_grids.h"
#include "core/rectangles.h"
#include "core/kernels.h"
#include "core/raw_blocks.h"

#define AI inline __attribute__((always_inline))
#ifndef UNR
#define UNR _Pragma("GCC unroll 16")
#endif

// Codes made 16-bit floats in registers: (code - zero), an integer that either type holds exactly.
#pragma once
#include "fragments.h"

namespace kt {

// A 16-bit float whose last bits are an integer: 1024 + i in float16 for i < 1024, 128 + i in bfloat16 for i < 128.
template <class T>
struct Magic {
  static constexpr uint32_t base = T::kHalf ? 0x6400 : 0x4300, one = T::kHalf ? 0x3c00 : 0x3f80;
};

template <class T>
KT_DEVICE uint32_t pair_of_ones() {
  return Magic<T>::one * 0x10001;
}

// The bits of a small integer, |value| <= 256, in bfloat16: exact.
KT_DEVICE uint32_t whole(int value) { return float_bits(static_cast<float>(value)) >> 16; }

// Two codes less `zero`, in 16 bits each on either side.
template <class T, int kBits>
KT_DEVICE uint32_t expand(uint32_t pair, int zero) {
  const uint32_t magic = Magic<T>::base * 0x10001;
#if defined(KT_NV)
  constexpr bool kByMagic = T::kHalf || kBits == 4;
#else
  constexpr bool kByMagic = T::kHalf;  // bfloat16 has no packed arithmetic there
#endif
  if constexpr (kByMagic) {
    return subtract<T>(pair | magic, (Magic<T>::base + static_cast<uint32_t>(zero)) * 0x10001);
  } else {
#if defined(KT_NV)
    // in two steps of 7 bits: 128 + low is exact, and so is each difference, as |code - zero| <= 256
    uint32_t low = subtract<T>((pair & 0x007f007f) | magic, magic);
    // bit 7 is 128 itself: taken from the zero point instead of added to the code
    uint32_t high = ((pair >> 7) & 0x00010001) * 128u;
    int first = zero - static_cast<int>(high & 0xffff), second = zero - static_cast<int>(high >> 16);
    return subtract<T>(low, whole(first) | whole(second) << 16);
#else
    return whole(static_cast<int>(pair & 0xffff) - zero) | whole(static_cast<int>(pair >> 16) - zero) << 16;
#endif
  }
}

}  // namespace kt

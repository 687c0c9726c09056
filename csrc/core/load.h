// Reads a value that need not be aligned, as the blocks of files have them.
#pragma once
#include <cstdint>
#include <cstring>

namespace ktcore {

template <class T>
T load(const uint8_t* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

}  // namespace ktcore

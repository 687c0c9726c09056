// Where one token finds its activations: a record of core/types.h. Inside the unit's namespace.

// `x` codes, `kp` the record's padded length.
struct ActRow {
    const uint8_t* base;
    AI const uint8_t* x(int k) const { return base + k; }
    AI const float* scale(int kp, int g16) const { return reinterpret_cast<const float*>(base + act_scale_at(kp)) + g16; }
    AI const int32_t* nsum(int kp, int g16) const { return reinterpret_cast<const int32_t*>(base + act_nsum_at(kp)) + g16; }
    AI const float* ssum(int kp, int g16) const { return reinterpret_cast<const float*>(base + act_ssum_at(kp)) + g16; }
    AI const float* ssum32(int kp, int g32) const { return reinterpret_cast<const float*>(base + act_ssum32_at(kp)) + g32; }
};

// What an integer accumulator starts from: minus offset * sum of the group's activations. Formats with a min have no
// offset. Wide codes are multiplied 128 less than they are where kLessHalf; the only offset that they come with is 128.
template <bool kMin, bool kWide = false>
AI VI seed(const ActRow& a, int kp, int g16, int shift) {
    if (kWide && kLessHalf) return kMin ? subi(seti(0), sll(bci(a.nsum(kp, g16)), 7)) : seti(0);
    return kMin ? seti(0) : sll(bci(a.nsum(kp, g16)), shift);
}

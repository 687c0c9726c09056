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

// What all kernels share: names, the sub-group, and reading weights of the affine group layout.
namespace sx = sycl::ext::oneapi;
namespace ex = sycl::ext::oneapi::experimental;

#define KERNEL                                                         \
    extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((ex::nd_range_kernel<3>)) \
        SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((ex::sub_group_size<LANES>))

// local memory of the work-group, uninitialised; group_local_memory crashed the just-in-time compiler of 2026.2.0
#define LOCAL(type, name, count)                            \
    static ex::work_group_static<type[count]> name##_room; \
    type *name = &name##_room[0]

using uint8 = std::uint8_t;
// minus this is the least of all numbers
constexpr float NOTHING = __builtin_huge_valf();

using words = sycl::vec<std::uint32_t, 4>;

inline sycl::nd_item<3> here() { return sx::this_work_item::get_nd_item<3>(); }

inline float lanes_sum(sycl::sub_group lanes, float value) {
    return sycl::reduce_over_group(lanes, value, sycl::plus<float>());
}

inline float lanes_max(sycl::sub_group lanes, float value) {
    return sycl::reduce_over_group(lanes, value, sycl::maximum<float>());
}

// bfloat16 by its bits: conversions of SYCL's own type need a device library, whose linking crashed the just-in-time
// compiler of intel-sycl-rt 2026.2.0 for CPU devices
struct brain {
    std::uint16_t bits;

    brain() = default;

    brain(float value) {
        const auto whole = sycl::bit_cast<std::uint32_t>(value);
        // to nearest, ties to even; a NaN stays one
        const std::uint32_t rounded = (whole + 0x7fffu + ((whole >> 16) & 1u)) >> 16;
        bits = static_cast<std::uint16_t>(value != value ? (whole >> 16) | 0x40u : rounded);
    }

    operator float() const { return sycl::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

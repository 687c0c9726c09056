// Formats of lattice points (core/grids.h): the unit's way to multiply and to unpack them. Inside the unit's namespace.
constexpr Rectangles kCover = make_rectangles();
constexpr const uint16_t* points_of(Format f) {
    switch (f) {
        case Format::IQ2_XXS: return kGrid2xxs;
        case Format::IQ2_XS: return kGrid2xs;
        case Format::IQ2_S: return kGrid2s;
        case Format::IQ3_XXS: return kGrid3xxs;
        case Format::IQ3_S: return kGrid3s;
        default: return kGrid1;
    }
}

// kGridVectors: Layout has codes, transposed as the activations behind the others (kernels/grids_vbmi.h). kGridBytes: there is
// grid_direct (kernels/grids_avx2.h).
#if defined(__AVX512VBMI__) && defined(__GFNI__)
constexpr bool kGridVectors = true, kGridBytes = false;
#elif defined(__AVX2__)
constexpr bool kGridVectors = false, kGridBytes = true;
#else
constexpr bool kGridVectors = false, kGridBytes = false;
#endif

// acc [tokens][32] = a panel of `blocks` blocks times the tokens at `act`.
template <Format F>
void grid_direct(const uint8_t* p, int blocks, const ActView& a, const uint8_t* act, int tokens, float* acc);
template <Format F>
void unpack_grid(const uint8_t* p, int blocks, const Unpacked& out);

#if defined(__AVX512VBMI__) && defined(__GFNI__)
#include "kernels/grids_vbmi.h"
#else
AI void keep_transposed(uint8_t*, VI) {}
#if defined(__AVX2__)
#include "kernels/grids_avx2.h"
#else
#include "kernels/grids_scalar.h"
#endif
#endif

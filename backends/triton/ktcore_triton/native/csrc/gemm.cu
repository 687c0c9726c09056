// C entry points of the quantised product; see gemm.h. Built by nvcc, by clang's HIP, or by g++ with -DKT_EMULATE.
#include "gemm.h"

namespace kt {

#if !defined(KT_EMULATE)
template <typename T, int BITS, int TOKENS>
KT_KERNEL void __launch_bounds__(WARPS * LANES) product(Args g) {
  stripe_of_block<T, BITS, TOKENS>(g);
}
#endif

template <typename T, int BITS, int TOKENS>
int launch(const Args& g, int blocks, int warp_size, void* stream) {
  int token_tiles = (g.m + TOKENS - 1) / TOKENS, threads = WARPS * warp_size;
#if defined(KT_EMULATE)
  (void)threads;
  emulate(blocks, token_tiles, WARPS * LANES, Shape<BITS, TOKENS>::BYTES, stream != nullptr,
          [&g] { stripe_of_block<T, BITS, TOKENS>(g); });
  return 0;
#elif defined(__HIP__)
  product<T, BITS, TOKENS><<<dim3(blocks, token_tiles), threads, Shape<BITS, TOKENS>::BYTES, kt_stream(stream)>>>(g);
  return int(hipGetLastError());
#else
  auto kernel = product<T, BITS, TOKENS>;
  constexpr int BYTES = Shape<BITS, TOKENS>::BYTES;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return int(error);
  kernel<<<dim3(blocks, token_tiles), threads, BYTES, kt_stream(stream)>>>(g);
  return int(cudaGetLastError());
#endif
}

inline int tokens_of(int m) { return m <= 16 ? 16 : m <= 32 ? 32 : 64; }

template <typename T, int BITS>
int by_tokens(const Args& g, int blocks, int warp_size, void* stream) {
  switch (tokens_of(g.m)) {
    case 16: return launch<T, BITS, 16>(g, blocks, warp_size, stream);
    case 32: return launch<T, BITS, 32>(g, blocks, warp_size, stream);
    default: return launch<T, BITS, 64>(g, blocks, warp_size, stream);
  }
}

}  // namespace kt

extern "C" {

// Mirrored field by field in Python (ctypes).
struct kt_gemm_args {
  const void *x, *codes, *scale, *extra;
  const float* bias;
  float* y;
  unsigned* counters;  // kt_gemm_counters() bytes, zeroed once; every call leaves zeros
  float* partial;      // kt_gemm_partial() bytes
  void* stream;     // in host emulation: not null runs the blocks from the last to the first
  int32_t m, n, k, group, kind, zero, bits, bf16, blocks, warp_size;
};

// bytes of counters for up to m tokens of n outputs
int64_t kt_gemm_counters(int32_t m, int32_t n) noexcept {
  int64_t tokens = kt::tokens_of(m);
  return (m + tokens - 1) / tokens * ((n + 63) / 64) * 4;
}

// bytes of partial sums for m tokens over `blocks` blocks
int64_t kt_gemm_partial(int32_t m, int32_t blocks) noexcept {
  int64_t tokens = kt::tokens_of(m);
  return (m + tokens - 1) / tokens * blocks * 2 * 64 * tokens * 4;
}

// 0, -1 for arguments that do not fit together, or the runtime's positive error
int kt_gemm(const kt_gemm_args* p) noexcept {
  bool groups = p->group == 32 || p->group == 64 || p->group == 128 || p->group == 0;
  bool sizes = p->m > 0 && p->n > 0 && p->k > 0 && p->k % 8 == 0 && p->blocks > 0 && p->m <= 65535 * 64;
  bool kinds = p->kind >= 0 && p->kind <= 2 && (p->kind == 0 || p->extra) && (p->bits == 4 || p->bits == 8);
  bool warps = p->warp_size == 32 || p->warp_size == 64;
  if (!groups || !sizes || !kinds || !warps || uintptr_t(p->x) % 16 || uintptr_t(p->codes) % 16) return -1;
  kt::Args g{};
  g.x = static_cast<const char*>(p->x);
  g.codes = static_cast<const char*>(p->codes);
  g.scale = static_cast<const char*>(p->scale);
  g.extra = static_cast<const char*>(p->extra);
  g.bias = p->bias;
  g.y = p->y;
  g.m = p->m, g.n = p->n, g.k = p->k, g.group = p->group, g.kind = p->kind;
  g.tiles_n = (p->n + 63) / 64, g.tiles_k = (p->k + 127) / 128, g.padded_n = g.tiles_n * 64;
  g.zero = uint32_t(p->zero);
  int total = g.tiles_n * g.tiles_k, blocks = p->blocks < total ? p->blocks : total;
  g.counters = p->counters;
  g.partial = p->partial;
  if (p->bf16)
    return p->bits == 4 ? kt::by_tokens<kt::BFloat, 4>(g, blocks, p->warp_size, p->stream)
                        : kt::by_tokens<kt::BFloat, 8>(g, blocks, p->warp_size, p->stream);
  return p->bits == 4 ? kt::by_tokens<kt::Half, 4>(g, blocks, p->warp_size, p->stream)
                      : kt::by_tokens<kt::Half, 8>(g, blocks, p->warp_size, p->stream);
}

}  // extern "C"

// y = x W^T with W in 4 or 8 bit codes. A block walks a stripe of (64 outputs, 128 inputs) tiles, inputs fastest; where
// several blocks share the outputs of a tile, the last to arrive adds their sums in the order of the blocks.
#pragma once
#include "mma.h"

namespace kt {

constexpr int TILE_N = 64, TILE_K = 128, WARPS = 4;

struct Args {
  const char* x;          // [m, k] in 16 bits, rows 16-byte aligned
  const char* codes;      // [tiles of 64 outputs][tiles of 128 inputs][4 warps][2][lanes][codes of 4 steps]
  const char* scale;      // [groups, padded n] in x's type
  const char* extra;      // zero points or offsets in the same layout, or null
  const float* bias;      // [n] or null
  float* y;               // [m, n]
  float* partial;         // [token tiles][blocks][2][64 * TOKENS]
  unsigned* counters;     // [token tiles][tiles of 64 outputs], zero before and after
  int m, n, k, tiles_n, tiles_k, padded_n;
  int group;              // 32, 64, 128, or 0 for one group of all inputs
  int kind;               // 0: one zero point, 1: a zero point a group, 2: an offset a group
  uint32_t zero;          // the zero point plus the decoder's bias, twice, for kinds 0 and 2
};

template <int BITS, int TOKENS>
struct Shape {
  static constexpr int X = TOKENS * TILE_K * 2, CODES = TILE_N * TILE_K * BITS / 8, GROUPS = TILE_N * 2 * 4;
  static constexpr int STAGE = X + CODES + 2 * GROUPS;
#if defined(KT_NV)
  static constexpr int STAGES = TOKENS == 64 ? 3 : 4;
#else
  static constexpr int STAGES = TOKENS == 64 ? 2 : TOKENS == 32 ? 3 : 4;  // 64 KiB of memory a block
#endif
  static constexpr int BYTES = STAGES * STAGE + 16;
};

template <int BITS, int TOKENS>
KT_DEVICE void load_stage(const Args& g, char* to, int tile, int token0) {
  using S = Shape<BITS, TOKENS>;
  constexpr int THREADS = WARPS * LANES;
  int tn = tile / g.tiles_k, tk = tile % g.tiles_k;
  const char* codes = g.codes + size_t(tile) * S::CODES;
  for (int i = thread(); i < S::CODES / 16; i += THREADS) copy16(to + S::X + i * 16, codes + i * 16, true);
  for (int i = thread(); i < TOKENS * 16; i += THREADS) {
    int token = i / 16, chunk = i % 16, k = tk * TILE_K + chunk * 8;
    bool real = token0 + token < g.m && k < g.k;
    copy16(to + x_chunk(token, chunk), real ? g.x + (size_t(token0 + token) * g.k + k) * 2 : g.x, real);
  }
  int rows = g.group ? TILE_K / g.group : 1;
  int first = g.group ? tk * rows : 0;
  for (int i = thread(); i < rows * 8; i += THREADS) {
    size_t from = (size_t(first + i / 8) * g.padded_n + tn * TILE_N) * 2 + i % 8 * 16;
    copy16(to + S::X + S::CODES + i * 16, g.scale + from, true);
    if (g.kind) copy16(to + S::X + S::CODES + S::GROUPS + i * 16, g.extra + from, true);
  }
}

KT_DEVICE uint32_t twice(const char* at) {
  uint16_t value;
  memcpy(&value, at, 2);
  return value * 0x10001u;
}

template <typename T, int BITS, int TOKENS>
KT_DEVICE void multiply(const Args& g, const char* stage, float (&acc)[TOKENS / 16][EC]) {
  using S = Shape<BITS, TOKENS>;
  constexpr int WORDS = EA * 4 * BITS / 32, PAIRS = 16 / BITS;  // words a lane in 4 steps; pairs in a word
  constexpr uint32_t MASK = BITS == 4 ? 0x000f000fu : 0x00ff00ffu;
  int lane = thread() % LANES, warp_index = thread() / LANES;
  const char* codes = stage + S::X + warp_index * (S::CODES / WARPS);
  const char* groups = stage + S::X + S::CODES;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    alignas(16) uint32_t words[WORDS];
    const char* from = codes + (half * STORED + lane % STORED) * (WORDS * 4);
    constexpr int WIDE = WORDS < 4 ? WORDS : 4;
#pragma unroll
    for (int i = 0; i < WORDS; i += WIDE) memcpy(words + i, __builtin_assume_aligned(from + i * 4, WIDE * 4), WIDE * 4);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      int all = half * 4 + step;
      int row = g.group ? all * 16 / g.group : 0;
      uint32_t s[ROWS], z[ROWS], o[ROWS], a[EA / 2];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        int at = (row * TILE_N + warp_index * 16 + a_row(lane, r)) * 2;
        s[r] = twice(groups + at);
        uint32_t extra = g.kind ? twice(groups + S::GROUPS + at) : 0;
        // zero points are stored with the decoder's bias already added
        z[r] = g.kind == 1 ? extra : g.zero;
        o[r] = g.kind == 2 ? extra : 0;
      }
#pragma unroll
      for (int p = 0; p < EA / 2; ++p) {
        int flat = step * (EA / 2) + p;
        uint32_t pair = (words[flat / PAIRS] >> (BITS * (flat % PAIRS))) & MASK;
        int r = pair_row(p);
        a[p] = affine<T>(Decode<T, BITS>::pair(pair), z[r], s[r], o[r]);
      }
#pragma unroll
      for (int t = 0; t < TOKENS / 16; ++t) {
        uint32_t b[EB / 2];
        load_b(b, stage, t * 16, all, lane);
        mma<T>(a, b, acc[t]);
      }
    }
  }
}

template <int TOKENS>
KT_DEVICE void store(const Args& g, const float (&acc)[TOKENS / 16][EC], int tn, int token0) {
  int lane = thread() % LANES, n0 = tn * TILE_N + thread() / LANES * 16;
#pragma unroll
  for (int t = 0; t < TOKENS / 16; ++t)
#pragma unroll
    for (int i = 0; i < EC; ++i) {
      int token = token0 + t * 16 + c_col(lane, i), n = n0 + c_row(lane, i);
      if (token < g.m && n < g.n) g.y[size_t(token) * g.n + n] = acc[t][i] + (g.bias ? g.bias[n] : 0.f);
    }
}

// adds what `first` to `last` have left, if this block is the last of them to arrive, and stores it
template <int TOKENS>
KT_DEVICE void reduce(const Args& g, float (&acc)[TOKENS / 16][EC], int tn, int stripe, int begin, int* flag) {
  constexpr int THREADS = WARPS * LANES;
  int start = tn * g.tiles_k, first = start / stripe, last = (start + g.tiles_k - 1) / stripe;
  float* base = g.partial + size_t(block_y()) * blocks_x() * 2 * TILE_N * TOKENS;
  float* mine = base + size_t(block_x() * 2 + (begin != block_x() * stripe)) * TILE_N * TOKENS;
#pragma unroll
  for (int t = 0; t < TOKENS / 16; ++t)
#pragma unroll
    for (int i = 0; i < EC; ++i) mine[(t * EC + i) * THREADS + thread()] = acc[t][i];
  fence();
  sync();
  unsigned* counter = g.counters + block_y() * g.tiles_n + tn;
  if (thread() == 0) *flag = int(add(counter)) == last - first;
  sync();
  if (*flag) {
    fence();
#pragma unroll
    for (int t = 0; t < TOKENS / 16; ++t)
#pragma unroll
      for (int i = 0; i < EC; ++i) acc[t][i] = 0.f;
    for (int b = first; b <= last; ++b) {
      const volatile float* part = base + size_t(b * 2 + (b * stripe < start)) * TILE_N * TOKENS;
#pragma unroll
      for (int t = 0; t < TOKENS / 16; ++t)
#pragma unroll
        for (int i = 0; i < EC; ++i) acc[t][i] += part[(t * EC + i) * THREADS + thread()];
    }
    store<TOKENS>(g, acc, tn, block_y() * TOKENS);
    if (thread() == 0) *counter = 0;
  }
}

template <typename T, int BITS, int TOKENS>
KT_DEVICE void stripe_of_block(const Args& g) {
  using S = Shape<BITS, TOKENS>;
  char* memory = shared();
  int* flag = reinterpret_cast<int*>(memory + S::STAGES * S::STAGE);
  int total = g.tiles_n * g.tiles_k, stripe = (total + blocks_x() - 1) / blocks_x();
  int begin = block_x() * stripe, end = begin + stripe < total ? begin + stripe : total;
  if (begin >= end) return;
  int token0 = block_y() * TOKENS;
  for (int s = 0; s < S::STAGES - 1; ++s) {
    if (begin + s < end) load_stage<BITS, TOKENS>(g, memory + s * S::STAGE, begin + s, token0);
    commit();
  }
  float acc[TOKENS / 16][EC] = {};
  int from = begin;
  for (int tile = begin; tile < end; ++tile) {
    wait<S::STAGES - 2>();
    sync();  // the stage is there for all, and all are done with the one that is filled next
    int next = tile + S::STAGES - 1;
    if (next < end) load_stage<BITS, TOKENS>(g, memory + (next - begin) % S::STAGES * S::STAGE, next, token0);
    commit();
    multiply<T, BITS, TOKENS>(g, memory + (tile - begin) % S::STAGES * S::STAGE, acc);
    int tn = tile / g.tiles_k;
    bool whole = (tile + 1) % g.tiles_k == 0;
    if (!whole && tile + 1 < end) continue;
    if (whole && from == tn * g.tiles_k) store<TOKENS>(g, acc, tn, token0);
    else reduce<TOKENS>(g, acc, tn, stripe, from, flag);
#pragma unroll
    for (int t = 0; t < TOKENS / 16; ++t)
#pragma unroll
      for (int i = 0; i < EC; ++i) acc[t][i] = 0.f;
    from = tile + 1;
  }
}

}  // namespace kt

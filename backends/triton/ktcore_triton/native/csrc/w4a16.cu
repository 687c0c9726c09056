// y [M, N] = x [M, K] W^T with W in 4- or 8-bit codes: W[n, k] = (code - zero) * scale[k / group, n] + offset[k / group, n].
//
// Made for few rows (up to 32 a block), where reading W is all the work. A block owns 64 columns and a part of K, which
// its warps share out; each warp streams its own tiles through a ring in shared memory, so the main loop has no barrier.
// Products of bare codes are summed in float32 and scaled once a group: exact codes, float32 scales. Sums over warps,
// then over blocks of a split, run in a fixed order: results do not depend on timing. Built by nvcc for NVIDIA and by
// clang's HIP for AMD, and by g++ for tests (device.h).
//
// Tile layout ("w4a16.16x64"): for each 16 of K and 64 of N 128 bytes a bit, in planes of up to 16 bytes a lane. A lane's
// codes are those of its B fragments (fragments.h) of four subtiles of 16 columns, one after the other; within a word the
// codes of pair p of values lie p codes from the bottom of its two halves, so that one mask takes both.
#include "expand.h"

namespace kt {
namespace {

constexpr int kColumns = 64, kSubtiles = 4;

struct Problem {
  const uint16_t* x;
  const uint8_t* codes;
  const void* scale;
  const void* offset;
  const float* bias;
  float* out;
  float* partial;
  int* arrived;
  int m, n, k, padded_n, tiles_a_group, zero, splits;
};

template <int kBits, int kRows16, bool kHalfScale, bool kOffset>
struct Stage {
  static constexpr int kScaleBytes = kColumns * (kHalfScale ? 2 : 4);
  static constexpr int codes = 0, x = codes + 128 * kBits, scale = x + 512 * kRows16, offset = scale + kScaleBytes;
  static constexpr int bytes = offset + (kOffset ? kScaleBytes : 0);
};

template <bool kHalf>
KT_DEVICE float read_scale(const uint8_t* at, int column) {
  if (kHalf) return half_to_float(reinterpret_cast<const uint16_t*>(at)[column]);
  return reinterpret_cast<const float*>(at)[column];
}

// A lane's codes of a tile: words, and how they lie in planes.
template <int kBits>
struct Words {
  static constexpr int count = kSubtiles * kB * 2 * kBits / 32, wide = count < 4 ? count : 4;
  static constexpr int pairs = 16 / kBits;  // a word
  static constexpr uint32_t mask = kBits == 4 ? 0x000f000f : 0x00ff00ff;
};

// What one warp asks for of a tile of K; every lane copies pieces of 16 bytes.
template <int kBits, int kRows16, bool kHalfScale, bool kOffset>
struct Fetch {
  using S = Stage<kBits, kRows16, kHalfScale, kOffset>;
  static constexpr int codes = 8 * kBits, rows = 32 * kRows16, scales = S::kScaleBytes / 16;
  static constexpr int codes_a_lane = (codes + kLanes - 1) / kLanes, rows_a_lane = (rows + kLanes - 1) / kLanes;
  Held held[codes_a_lane + rows_a_lane + 2];

  // calls copy(held, to, from, there, mine) for each of the lane's pieces; `from` can be read even where it is not the
  // lane's own or not there, so that a machine need not branch around a load
  template <class Copy>
  KT_DEVICE void each(const Problem& p, uint8_t* ring, int kt, int column_tile, int row0, int lane, Copy copy) {
    const uint8_t* tile = p.codes + (static_cast<size_t>(kt) * (p.padded_n / kColumns) + column_tile) * (128 * kBits);
    int n = 0;
#pragma unroll
    for (int i = 0; i < codes_a_lane; i++, n++) {
      int piece = i * kLanes + lane;
      bool mine = codes % kLanes == 0 || piece < codes;
      copy(held[n], ring + S::codes + piece * 16, tile + (mine ? piece * 16 : 0), true, mine);
    }
#pragma unroll
    for (int i = 0; i < rows_a_lane; i++, n++) {
      int piece = i * kLanes + lane, row = piece / 2, half = piece % 2, at = row0 + row;
      bool mine = rows % kLanes == 0 || piece < rows, there = at < p.m;
      uint8_t* to = ring + S::x + row / 16 * 512 + place_of_x(row % 16, half);
      copy(held[n], to, p.x + (there ? static_cast<size_t>(at) * p.k + kt * 16 + half * 8 : 0), there, mine);
    }
    size_t group = static_cast<size_t>(kt / p.tiles_a_group) * p.padded_n + column_tile * kColumns;
    size_t from = group * (kHalfScale ? 2 : 4) + (lane < scales ? lane * 16 : 0);
    copy(held[n], ring + S::scale + lane * 16, static_cast<const uint8_t*>(p.scale) + from, true, lane < scales);
    if (!kOffset) return;
    copy(held[n + 1], ring + S::offset + lane * 16, static_cast<const uint8_t*>(p.offset) + from, true, lane < scales);
  }
  KT_DEVICE void begin(const Problem& p, uint8_t* ring, int kt, int column_tile, int row0, int lane) {
    each(p, ring, kt, column_tile, row0, lane, [](Held& h, void* to, const void* from, bool there, bool mine) {
      begin_copy(h, to, from, there, mine);
    });
  }
  KT_DEVICE void end(const Problem& p, uint8_t* ring, int kt, int column_tile, int row0, int lane) {
    each(p, ring, kt, column_tile, row0, lane, [](Held& h, void* to, const void*, bool there, bool mine) {
      end_copy(h, to, there, mine);
    });
  }
};

template <class T, int kBits, int kRows16, bool kHalfScale, bool kOffset>
KT_KERNEL void __launch_bounds__(kWarps * kLanes) gemm(Problem p) {
  using S = Stage<kBits, kRows16, kHalfScale, kOffset>;
  KT_SHARED(shared);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int column_tile = blockIdx.x, split = blockIdx.y, row0 = blockIdx.z * 16 * kRows16;
  uint8_t* ring = shared + warp * kStages * S::bytes;

  // whole groups for every warp, so that each sum is scaled once
  const int groups = p.k / 16 / p.tiles_a_group, parts = p.splits * kWarps, part = split * kWarps + warp;
  const bool shared_group = groups < parts;  // few large groups: a group's sum may be scaled in pieces
  const int units = shared_group ? p.k / 16 : groups, unit = shared_group ? 1 : p.tiles_a_group;
  const int first = static_cast<int>(static_cast<int64_t>(units) * part / parts) * unit;
  const int last = static_cast<int>(static_cast<int64_t>(units) * (part + 1) / parts) * unit;

  float total[kRows16][kSubtiles][kC] = {}, sum[kRows16][kSubtiles][kC] = {}, ones[kRows16][kOnes] = {};
  using Tile = Fetch<kBits, kRows16, kHalfScale, kOffset>;
  for (int s = 0; s < kStages - 1; s++) {
    if (first + s < last) {
      Tile fetch;
      fetch.begin(p, ring + s * S::bytes, first + s, column_tile, row0, lane);
      fetch.end(p, ring + s * S::bytes, first + s, column_tile, row0, lane);
    }
    commit_copies();
  }
  for (int kt = first; kt < last; kt++) {
    wait_copies<kStages - 2>();
    sync_warp();
    // the slot read in the turn before is free: every lane has passed the barrier of this one
    const int next = kt + kStages - 1;
    uint8_t* filled = ring + (next - first) % kStages * S::bytes;
    Tile fetch;
    if (next < last) fetch.begin(p, filled, next, column_tile, row0, lane);
    const uint8_t* now = ring + (kt - first) % kStages * S::bytes;
    uint32_t a[kRows16][kA];
#pragma unroll
    for (int r16 = 0; r16 < kRows16; r16++) load_x(a[r16], now + S::x + r16 * 512, lane);
    using W = Words<kBits>;
#pragma unroll
    for (int s = 0; s < kSubtiles; s++) {
      uint32_t b[kB];
#pragma unroll
      for (int i = 0; i < kB; i++) {
        constexpr int kPairs = W::pairs;
        int pair = s * kB + i, word = pair / kPairs, plane = word / W::wide;
        const uint8_t* from = now + S::codes + (plane * kStored + lane % kStored) * (W::wide * 4);
        const uint32_t codes = reinterpret_cast<const uint32_t*>(from)[word % W::wide] >> (kBits * (pair % kPairs));
        b[i] = expand<T, kBits>(codes & W::mask, p.zero);
      }
#pragma unroll
      for (int r16 = 0; r16 < kRows16; r16++) mma<T>(sum[r16][s], a[r16], b);
    }
    if constexpr (kOffset)
      for (int r16 = 0; r16 < kRows16; r16++) mma_ones<T>(ones[r16], a[r16], pair_of_ones<T>());
    if ((kt + 1) % p.tiles_a_group == 0 || kt + 1 == last) {
#pragma unroll
      for (int s = 0; s < kSubtiles; s++) {
        float scale[kOwn], offset[kOwn];
#pragma unroll
        for (int own = 0; own < kOwn; own++) {
          int column = s * 16 + own_column(lane, own);
          scale[own] = read_scale<kHalfScale>(now + S::scale, column);
          offset[own] = kOffset ? read_scale<kHalfScale>(now + S::offset, column) : 0.0f;
        }
#pragma unroll
        for (int r16 = 0; r16 < kRows16; r16++)
#pragma unroll
          for (int i = 0; i < kC; i++) {
            total[r16][s][i] += scale[own_of(i)] * sum[r16][s][i] +
                                (kOffset ? offset[own_of(i)] * ones[r16][i % kOnes] : 0.0f);
            sum[r16][s][i] = 0.0f;
          }
      }
      for (int r16 = 0; r16 < kRows16; r16++)
        for (float& v : ones[r16]) v = 0.0f;
    }
    if (next < last) fetch.end(p, filled, next, column_tile, row0, lane);
    commit_copies();
  }
  wait_copies<0>();
  __syncthreads();

  // sums of the warps, in order; the ring's memory holds them now
  float* sums = reinterpret_cast<float*>(shared);
  constexpr int kTile = 16 * kRows16 * kColumns;
  for (int r16 = 0; r16 < kRows16; r16++)
    for (int s = 0; s < kSubtiles; s++)
      for (int i = 0; i < kC; i++) {
        int row = r16 * 16 + sum_row(lane, i), column = s * 16 + own_column(lane, own_of(i));
        sums[warp * kTile + row * kColumns + column] = total[r16][s][i];
      }
  __syncthreads();
  auto finish = [&](int row, int column, float value) {
    if (row < p.m && column < p.n) p.out[static_cast<size_t>(row) * p.n + column] = value + (p.bias ? p.bias[column] : 0.0f);
  };
  auto place = [&](int of, int row, int column) {
    return (static_cast<size_t>(of) * gridDim.z * 16 * kRows16 + row) * p.padded_n + column;
  };
  for (int i = threadIdx.x; i < kTile; i += kWarps * kLanes) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; w++) value += sums[w * kTile + i];
    int row = row0 + i / kColumns, column = column_tile * kColumns + i % kColumns;
    if (p.splits == 1) finish(row, column, value);
    else p.partial[place(split, row, column)] = value;
  }
  if (p.splits == 1) return;
  if (!last_to_arrive(p.arrived + blockIdx.z * gridDim.x + blockIdx.x, p.splits)) return;
  for (int i = threadIdx.x; i < kTile; i += kWarps * kLanes) {
    int row = row0 + i / kColumns, column = column_tile * kColumns + i % kColumns;
    float value = 0.0f;
    for (int s = 0; s < p.splits; s++) value += read_fresh(p.partial + place(s, row, column));
    finish(row, column, value);
  }
}

template <class T, int kBits, int kRows16, bool kHalfScale, bool kOffset>
int start(const Problem& p, void* stream) {
  using S = Stage<kBits, kRows16, kHalfScale, kOffset>;
  int ring = kWarps * kStages * S::bytes, sums = kWarps * 16 * kRows16 * kColumns * 4;
  Grid grid{p.padded_n / kColumns, p.splits, (p.m + 16 * kRows16 - 1) / (16 * kRows16)};
  return launch(gemm<T, kBits, kRows16, kHalfScale, kOffset>, grid, kWarps * kLanes, ring > sums ? ring : sums, stream, p);
}

template <class T, int kBits, int kRows16>
int choose_scale(const Problem& p, bool half_scale, void* stream) {
  if (half_scale)
    return p.offset ? start<T, kBits, kRows16, true, true>(p, stream) : start<T, kBits, kRows16, true, false>(p, stream);
  return p.offset ? start<T, kBits, kRows16, false, true>(p, stream) : start<T, kBits, kRows16, false, false>(p, stream);
}

template <class T, int kBits>
int choose_rows(const Problem& p, bool half_scale, void* stream) {
  return p.m <= 16 ? choose_scale<T, kBits, 1>(p, half_scale, stream) : choose_scale<T, kBits, 2>(p, half_scale, stream);
}

}  // namespace
}  // namespace kt

extern "C" {

// One product; the same as `Gemm` of build.py. x is bfloat16 where `bf16`, else float16; scale and offset (or null) are
// float16 where `half_scale`, else float32, [k / group, padded_n]; codes, scale and x lie at multiples of 16 bytes.
// `partial` holds splits * ceil(m / rows) * rows * padded_n floats, rows being 16 up to m = 16 and 32 beyond. `arrived`
// holds a zero for each 64 columns and rows, and is left so: of two launches that may run at once, each needs its own.
struct KtcoreGemm {
  const void *x, *codes, *scale, *offset;
  const float* bias;
  float *out, *partial;
  int* arrived;
  int m, n, k, group, zero, bits, bf16, half_scale, splits;
};

// Returns 0, a driver's error, or -1 for what cannot be.
int ktcore_gemm(const KtcoreGemm* call, void* stream) noexcept {
  using namespace kt;
  const KtcoreGemm& g = *call;
  if (g.m < 1 || g.n < 1 || g.k < 16 || g.k % 16 || g.group < 16 || g.group % 16 || g.k % g.group || g.splits < 1) return -1;
  Problem p{};
  p.x = static_cast<const uint16_t*>(g.x);
  p.codes = static_cast<const uint8_t*>(g.codes);
  p.scale = g.scale;
  p.offset = g.offset;
  p.bias = g.bias;
  p.out = g.out;
  p.partial = g.partial;
  p.arrived = g.arrived;
  p.m = g.m;
  p.n = g.n;
  p.k = g.k;
  p.padded_n = (g.n + kColumns - 1) / kColumns * kColumns;
  p.tiles_a_group = g.group / 16;
  p.zero = g.zero;
  p.splits = g.splits;
  if (g.bits == 4) return g.bf16 ? choose_rows<Bf16, 4>(p, g.half_scale, stream) : choose_rows<Fp16, 4>(p, g.half_scale, stream);
  if (g.bits == 8) return g.bf16 ? choose_rows<Bf16, 8>(p, g.half_scale, stream) : choose_rows<Fp16, 8>(p, g.half_scale, stream);
  return -1;
}

const char* ktcore_error(int code) noexcept { return kt::error_text(code); }

}  // extern "C"

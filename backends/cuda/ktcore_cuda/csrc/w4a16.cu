// y [M, N] = x [M, K] W^T with W in 4- or 8-bit codes: W[n, k] = (code - zero) * scale[k / group, n] + offset[k / group, n].
//
// Made for few rows (up to 32 a block), where reading W is all the work. A block owns 64 columns and a part of K, which
// its warps share out; each warp streams its own tiles through a ring in shared memory with cp.async, so the main loop
// has no barrier. Products of bare codes are summed in float32 and scaled once a group: exact codes, float32 scales.
// Sums over warps, then over blocks of a split, run in a fixed order: results do not depend on timing.
//
// Tile layout ("w4a16.16x64"): for each 16 of K and 64 of N 512 bytes a plane, lane after lane 16 bytes. Lane l holds
// column l / 4 of each of the 8 subtiles of 8 columns, and of K 2 (l % 4) + {0, 1, 8, 9}: what mma.m16n8k16 wants of B
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"). With 4 bits word j holds subtiles 2j, 2j + 1
// with the nibbles of a register's two halves four apart; with 8 bits word j of plane p is subtile 4p + j.
#include "device.h"

namespace kt {
namespace {

constexpr int kWarps = 8, kStages = 4, kColumns = 64, kSubtiles = 8;

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

// One warp asks for tile `kt` of K; every lane copies its own 16 bytes.
template <int kBits, int kRows16, bool kHalfScale, bool kOffset>
KT_DEVICE void fetch(const Problem& p, uint8_t* ring, int kt, int column_tile, int row0, int lane) {
  using S = Stage<kBits, kRows16, kHalfScale, kOffset>;
  const uint8_t* tile = p.codes + (static_cast<size_t>(kt) * (p.padded_n / kColumns) + column_tile) * (128 * kBits);
  for (int plane = 0; plane < kBits / 4; plane++)
    copy_async(ring + S::codes + plane * 512 + lane * 16, tile + plane * 512 + lane * 16, true);
  for (int r16 = 0; r16 < kRows16; r16++) {
    int row = lane / 2, half = lane % 2, at = row0 + r16 * 16 + row;
    // halves of every other four rows change places, so that eight rows of a half lie in eight different banks
    uint8_t* to = ring + S::x + r16 * 512 + row * 32 + ((half ^ (row >> 2 & 1)) * 16);
    bool there = at < p.m;
    copy_async(to, p.x + (there ? static_cast<size_t>(at) * p.k + kt * 16 + half * 8 : 0), there);
  }
  int group = kt / p.tiles_a_group;
  constexpr int kLanes = S::kScaleBytes / 16;
  size_t from = (static_cast<size_t>(group) * p.padded_n + column_tile * kColumns) * (kHalfScale ? 2 : 4) + lane * 16;
  if (lane < kLanes) {
    copy_async(ring + S::scale + lane * 16, static_cast<const uint8_t*>(p.scale) + from, true);
    if (kOffset) copy_async(ring + S::offset + lane * 16, static_cast<const uint8_t*>(p.offset) + from, true);
  }
}

template <class T, int kBits, int kRows16, bool kHalfScale, bool kOffset>
KT_KERNEL void __launch_bounds__(kWarps * 32) gemm(Problem p) {
  using S = Stage<kBits, kRows16, kHalfScale, kOffset>;
  KT_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_tile = blockIdx.x, split = blockIdx.y, row0 = blockIdx.z * 16 * kRows16;
  uint8_t* ring = shared + warp * kStages * S::bytes;

  // whole groups for every warp, so that each sum is scaled once
  const int groups = p.k / 16 / p.tiles_a_group, parts = p.splits * kWarps, part = split * kWarps + warp;
  const bool shared_group = groups < parts;  // few large groups: a group's sum may be scaled in pieces
  const int units = shared_group ? p.k / 16 : groups, unit = shared_group ? 1 : p.tiles_a_group;
  const int first = static_cast<int>(static_cast<int64_t>(units) * part / parts) * unit;
  const int last = static_cast<int>(static_cast<int64_t>(units) * (part + 1) / parts) * unit;

  float total[kRows16][kSubtiles][4] = {}, sum[kRows16][kSubtiles][4] = {}, ones[kRows16][4] = {};
  for (int s = 0; s < kStages - 1; s++) {
    if (first + s < last)
      fetch<kBits, kRows16, kHalfScale, kOffset>(p, ring + s * S::bytes, first + s, column_tile, row0, lane);
    commit_copies();
  }
  for (int kt = first; kt < last; kt++) {
    wait_copies<kStages - 2>();
    sync_warp();
    const uint8_t* now = ring + (kt - first) % kStages * S::bytes;
    uint32_t a[kRows16][4];
#pragma unroll
    for (int r16 = 0; r16 < kRows16; r16++) {
      int row = lane % 16, half = lane / 16;
      load_matrix(a[r16], now + S::x + r16 * 512 + row * 32 + ((half ^ (row >> 2 & 1)) * 16));
    }
#pragma unroll
    for (int j = 0; j < kBits; j++) {
      uint32_t word = reinterpret_cast<const uint32_t*>(now + S::codes + j / 4 * 512 + lane * 16)[j % 4];
      constexpr int kHeld = 8 / kBits;  // subtiles a word
      uint32_t b[kHeld][2];
      if constexpr (kBits == 4) expand4<T>(word, p.zero, b);
      else expand8<T>(word, p.zero, b);
#pragma unroll
      for (int h = 0; h < kHeld; h++)
#pragma unroll
        for (int r16 = 0; r16 < kRows16; r16++) mma<T>(sum[r16][j * kHeld + h], a[r16], b[h]);
    }
    if constexpr (kOffset) {
      uint32_t one[2] = {pair_of_ones<T>(), pair_of_ones<T>()};
      for (int r16 = 0; r16 < kRows16; r16++) mma<T>(ones[r16], a[r16], one);
    }
    if ((kt + 1) % p.tiles_a_group == 0 || kt + 1 == last) {
#pragma unroll
      for (int s = 0; s < kSubtiles; s++)
        for (int c = 0; c < 2; c++) {
          int column = s * 8 + lane % 4 * 2 + c;
          float scale = read_scale<kHalfScale>(now + S::scale, column);
          float offset = kOffset ? read_scale<kHalfScale>(now + S::offset, column) : 0.0f;
          for (int r16 = 0; r16 < kRows16; r16++)
            for (int low = 0; low < 2; low++) {
              int i = low * 2 + c;
              total[r16][s][i] += scale * sum[r16][s][i] + (kOffset ? offset * ones[r16][i] : 0.0f);
              sum[r16][s][i] = 0.0f;
            }
        }
      for (int r16 = 0; r16 < kRows16; r16++)
        for (float& v : ones[r16]) v = 0.0f;
    }
    // the slot read in the turn before is free: every lane has passed the barrier of this one
    int next = kt + kStages - 1;
    if (next < last)
      fetch<kBits, kRows16, kHalfScale, kOffset>(p, ring + (next - first) % kStages * S::bytes, next, column_tile, row0,
                                                 lane);
    commit_copies();
  }
  wait_copies<0>();
  __syncthreads();

  // sums of the warps, in order; the ring's memory holds them now
  float* sums = reinterpret_cast<float*>(shared);
  constexpr int kTile = 16 * kRows16 * kColumns;
  for (int r16 = 0; r16 < kRows16; r16++)
    for (int s = 0; s < kSubtiles; s++)
      for (int i = 0; i < 4; i++) {
        int row = r16 * 16 + lane / 4 + i / 2 * 8, column = s * 8 + lane % 4 * 2 + i % 2;
        sums[warp * kTile + row * kColumns + column] = total[r16][s][i];
      }
  __syncthreads();
  auto finish = [&](int row, int column, float value) {
    if (row < p.m && column < p.n) p.out[static_cast<size_t>(row) * p.n + column] = value + (p.bias ? p.bias[column] : 0.0f);
  };
  auto place = [&](int of, int row, int column) {
    return (static_cast<size_t>(of) * gridDim.z * 16 * kRows16 + row) * p.padded_n + column;
  };
  for (int i = threadIdx.x; i < kTile; i += kWarps * 32) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; w++) value += sums[w * kTile + i];
    int row = row0 + i / kColumns, column = column_tile * kColumns + i % kColumns;
    if (p.splits == 1) finish(row, column, value);
    else p.partial[place(split, row, column)] = value;
  }
  if (p.splits == 1) return;
  if (!last_to_arrive(p.arrived + blockIdx.z * gridDim.x + blockIdx.x, p.splits)) return;
  for (int i = threadIdx.x; i < kTile; i += kWarps * 32) {
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
  return launch(gemm<T, kBits, kRows16, kHalfScale, kOffset>, grid, kWarps * 32, ring > sums ? ring : sums, stream, p);
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

// Arguments as in `Problem`; x is bfloat16 where `bf16`, else float16; scale and offset are float16 where `half_scale`,
// else float32, [K / group, padded_n]; codes, scale and x lie at multiples of 16 bytes. `partial` holds
// splits * ceil(M / rows) * rows * padded_n floats, rows being 16 up to M = 16 and 32 beyond; `arrived` holds a zero for
// each 64 columns and rows, and is left so. Returns 0, a driver's error, or -1 for what cannot be.
int ktcore_gemm(const void* x, const void* codes, const void* scale, const void* offset, const float* bias, float* out,
                float* partial, int* arrived, int m, int n, int k, int group, int zero, int bits, int bf16,
                int half_scale, int splits, void* stream) noexcept {
  using namespace kt;
  if (m < 1 || n < 1 || k < 16 || k % 16 || group < 16 || group % 16 || k % group || splits < 1) return -1;
  Problem p{static_cast<const uint16_t*>(x), static_cast<const uint8_t*>(codes), scale, offset, bias, out, partial,
            arrived, m, n, k, (n + kColumns - 1) / kColumns * kColumns, group / 16, zero, splits};
  if (bits == 4) return bf16 ? choose_rows<Bf16, 4>(p, half_scale, stream) : choose_rows<Fp16, 4>(p, half_scale, stream);
  if (bits == 8) return bf16 ? choose_rows<Bf16, 8>(p, half_scale, stream) : choose_rows<Fp16, 8>(p, half_scale, stream);
  return -1;
}

const char* ktcore_error(int code) noexcept { return kt::error_text(code); }

}  // extern "C"

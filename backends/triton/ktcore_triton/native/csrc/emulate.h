// The host as a device, to check a kernel's indices, pipeline and reductions where there is none: threads of a block are
// fibers, operations of a warp wait for all of its lanes, and asynchronous copies land only when they are waited for;
// until then their destination holds NaNs. Fragment layouts are in fragments.h; ldmatrix.x4 is as in the PTX ISA.
#pragma once
#include <ucontext.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define KT_DEVICE inline
#define KT_KERNEL
#define KT_SHARED(name) uint8_t* name = kt::emulated::block->shared.data()
#define __launch_bounds__(n)

namespace kt {

#if defined(KT_MFMA)
constexpr int kWarp = 64;
#else
constexpr int kWarp = 32;
#endif
inline thread_local Grid threadIdx, blockIdx, gridDim;

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  bool there;
};
struct Operands {
  float* c;
  const uint32_t *a, *b;
  uint32_t* loaded;
  const void* address;
};
struct Warp {
  int arrived = 0, turn = 0;
  Operands lanes[kWarp];
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
struct Block {
  std::vector<uint8_t> shared;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  int arrived = 0, turn = 0;
  bool last = false;
  std::function<void()> kernel;
};

inline thread_local Block* block;
inline thread_local int current;
inline thread_local ucontext_t home;

inline void yield() { swapcontext(&block->fibers[static_cast<size_t>(current)].context, &home); }
inline Warp& warp() { return block->warps[static_cast<size_t>(current) / kWarp]; }
inline Fiber& fiber() { return block->fibers[static_cast<size_t>(current)]; }

// Every lane comes here; the last one does the work for all.
template <class Work>
void together(const Operands& mine, Work work) {
  Warp& w = warp();
  w.lanes[current % kWarp] = mine;
  int turn = w.turn;
  if (++w.arrived == kWarp) {
    work(w);
    w.arrived = 0;
    w.turn++;
  } else {
    while (w.turn == turn) yield();
  }
}

inline void body() {
  block->kernel();
  fiber().done = true;
  yield();
}

}  // namespace emulated

inline void __syncthreads() {
  auto* b = emulated::block;
  int turn = b->turn;
  if (++b->arrived == static_cast<int>(b->fibers.size())) {
    b->arrived = 0;
    b->turn++;
  } else {
    while (b->turn == turn) emulated::yield();
  }
}
inline void sync_warp() {
  emulated::together({}, [](emulated::Warp&) {});
}

#if defined(KT_NV)
struct Held {};
inline void begin_copy(Held&, void* to, const void* from, bool there, bool mine) {
  if (!mine) return;
  memset(to, 0xff, 16);
  emulated::fiber().open.push_back({to, from, there});
}
inline void end_copy(const Held&, void*, bool, bool) {}
#else
struct Held {
  uint8_t value[16];
  Held() { memset(value, 0xff, 16); }
};
inline void begin_copy(Held& held, void* to, const void* from, bool, bool mine) {
  if (mine) memset(to, 0xff, 16);
  memcpy(held.value, from, 16);
}
inline void end_copy(const Held& held, void* to, bool there, bool mine) {
  if (mine) there ? memcpy(to, held.value, 16) : memset(to, 0, 16);
}
#endif
inline void commit_copies() {
  auto& f = emulated::fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int kPending>
void wait_copies() {
  auto& groups = emulated::fiber().groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (auto& c : groups.front()) c.there ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16);
    groups.erase(groups.begin());
  }
}

inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
template <class T>
float to_float(uint16_t bits);
template <>
inline float to_float<Fp16>(uint16_t bits) { return half_to_float(bits); }
template <>
inline float to_float<Bf16>(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
template <class T>
uint32_t from_float(float value);
template <>
inline uint32_t from_float<Fp16>(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
template <>
inline uint32_t from_float<Bf16>(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
template <class T>
uint32_t subtract(uint32_t a, uint32_t b) {
  auto less = [](uint32_t x, uint32_t y) {
    return from_float<T>(to_float<T>(static_cast<uint16_t>(x)) - to_float<T>(static_cast<uint16_t>(y)));
  };
  return less(a, b) | less(a >> 16, b >> 16) << 16;
}

inline void load_matrix(uint32_t (&r)[4], const void* at) {
  emulated::together({nullptr, nullptr, nullptr, r, at}, [](emulated::Warp& w) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        memcpy(&w.lanes[lane].loaded[i], static_cast<const uint8_t*>(w.lanes[i * 8 + lane / 4].address) + lane % 4 * 4, 4);
  });
}

// Blocks run one after the other here.
inline bool last_to_arrive(int* counter, int count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    emulated::block->last = ++*counter == count;
    if (emulated::block->last) *counter = 0;
  }
  __syncthreads();
  return emulated::block->last;
}
inline float read_fresh(const float* at) { return *at; }
inline const char* error_text(int) { return "an error of the emulation"; }

namespace emulated {

inline void prepare(Fiber& f) {
  constexpr size_t kStack = 128 << 10;
  f.stack.reset(new char[kStack]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = &home;
  makecontext(&f.context, body, 0);
}

inline void run_block(int threads, int shared, const std::function<void()>& kernel) {
  Block b;
  b.shared.assign(static_cast<size_t>(shared), 0xff);
  b.warps.resize(static_cast<size_t>(threads) / kWarp);
  b.fibers.resize(static_cast<size_t>(threads));
  b.kernel = kernel;
  block = &b;
  for (auto& f : b.fibers) prepare(f);
  for (bool running = true; running;) {
    running = false;
    for (int t = 0; t < threads; t++) {
      auto& f = b.fibers[static_cast<size_t>(t)];
      if (f.done) continue;
      running = true;
      current = t;
      threadIdx = {t, 0, 0};
      swapcontext(&home, &f.context);
    }
  }
}

}  // namespace emulated

template <class Kernel, class Argument>
int launch(Kernel kernel, Grid grid, int threads, int shared, void*, const Argument& argument) {
  gridDim = {grid.x, grid.y, grid.z};
  for (int i = 0; i < grid.x * grid.y * grid.z; i++) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    emulated::run_block(threads, shared, [&] { kernel(argument); });
  }
  return 0;
}

}  // namespace kt

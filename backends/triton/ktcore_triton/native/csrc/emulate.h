// Host emulation: the threads of a block are fibers on one CPU thread; collective instructions follow the documented
// fragment layouts (PTX ISA, mma.m16n8k16 and ldmatrix; AMD's MFMA and WMMA ISA documents). Asynchronous copies land at
// their wait, not before, so that a missing wait shows.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define KT_DEVICE inline
#define KT_KERNEL
using kt_stream = void*;

namespace kt {
#if defined(KT_MFMA)
constexpr int EMULATED_LANES = 64;
#else
constexpr int EMULATED_LANES = 32;
#endif

struct Copy {
  void* to;
  const void* from;
  bool real;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool done = false;
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp {
  Barrier barrier;
  float a[16][16], b[16][16];
  const void* rows[64];
};
struct Emulator {
  ucontext_t main;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<uint64_t> memory;
  std::function<void()> body;
  int thread = 0, block_x = 0, block_y = 0, blocks_x = 0;
};
inline Emulator*& emulator() {
  static thread_local Emulator* current = nullptr;
  return current;
}
inline void fiber_main() {
  Emulator& e = *emulator();
  int self = e.thread;
  e.body();
  e.fibers[self].done = true;
  swapcontext(&e.fibers[self].context, &e.main);
}
inline void pause() {
  Emulator& e = *emulator();
  swapcontext(&e.fibers[e.thread].context, &e.main);
}
inline void arrive(Barrier& barrier, int count) {
  unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) pause();
}
inline int thread() { return emulator()->thread; }
inline int block_x() { return emulator()->block_x; }
inline int block_y() { return emulator()->block_y; }
inline int blocks_x() { return emulator()->blocks_x; }
inline void sync() { arrive(emulator()->barrier, int(emulator()->fibers.size())); }
inline Warp& warp() { return emulator()->warps[thread() / EMULATED_LANES]; }
inline void sync_warp() { arrive(warp().barrier, EMULATED_LANES); }
inline void fence() {}
inline unsigned add(unsigned* at) { return (*at)++; }
inline char* shared() { return reinterpret_cast<char*>(emulator()->memory.data()); }
inline void copy16(void* to, const void* from, bool real) {
  emulator()->fibers[thread()].open.push_back({to, from, real});
}
inline void commit() {
  Fiber& fiber = emulator()->fibers[thread()];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N>
inline void wait() {
  Fiber& fiber = emulator()->fibers[thread()];
  for (; fiber.groups.size() > size_t(N); fiber.groups.pop_front())
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.real) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
}

// runs the blocks of a grid one after another, the last first where `backwards`
inline void emulate(int blocks_x, int blocks_y, int threads, size_t bytes, bool backwards, std::function<void()> body) {
  for (int index = 0; index < blocks_x * blocks_y; ++index) {
    int block = backwards ? blocks_x * blocks_y - 1 - index : index;
    Emulator e;
    e.body = body;
    e.fibers.resize(threads);
    e.warps.resize(threads / EMULATED_LANES);
    e.memory.assign((bytes + 7) / 8, 0x7fff7fff7fff7fffull);  // NaNs: what is read unwritten shows
    e.block_x = block % blocks_x;
    e.block_y = block / blocks_x;
    e.blocks_x = blocks_x;
    emulator() = &e;
    constexpr size_t STACK = 1 << 16;
    for (Fiber& fiber : e.fibers) {
      fiber.stack.reset(new char[STACK]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (e.thread = 0; e.thread < threads; ++e.thread)
        if (!e.fibers[e.thread].done) {
          busy = true;
          swapcontext(&e.main, &e.fibers[e.thread].context);
        }
    }
    emulator() = nullptr;
  }
}
}  // namespace kt

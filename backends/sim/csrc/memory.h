// Device memory of the simulated accelerator: one file in memory, mapped twice. Tensors carry addresses of the guarded
// mapping, on which the host faults; the device's worker threads translate them to the private one.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

namespace sim {

class Stream;
constexpr int kMaxDevices = 16;
constexpr size_t kPage = 4096;
// In every float type of 8 to 64 bits this is NaN, and as an integer it is far out of any range.
constexpr uint32_t kPoison = 0x7FFFFFFFu;
constexpr unsigned char kCanary = 0xC5;

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One allocation, and after it the slot that the next one of its size may take. Never destroyed.
struct Block {
  char* address = nullptr;  // guarded
  char* alias = nullptr;    // private to the worker threads
  size_t room = 0;
  size_t bytes = 0;
  int device = 0;
  bool poisoned = false;                // its whole room holds the poison pattern
  std::atomic<uint64_t> generation{0};  // goes up when the memory is given back
  std::atomic<int> holders{0};          // the tensor, and a graph that replays into it
  std::shared_ptr<Stream> owner;
  std::vector<std::shared_ptr<Stream>> users;  // guarded by Memory's mutex
};

// What a launch remembers of a block, to notice when it runs that the memory was given back.
struct Use {
  Block* block;
  uint64_t generation;
  void check() const;  // throws std::runtime_error
};

struct MemoryStats {
  size_t live = 0, peak = 0, cap = 0, blocks = 0;
};

class Memory {
 public:
  explicit Memory(int device) : device_(device) {}
  // `owner` is the stream in whose order the memory is reused. Throws OutOfMemory.
  Block* allocate(size_t bytes, std::shared_ptr<Stream> owner);
  void record_user(Block* block, std::shared_ptr<Stream> stream);  // it must have passed before the memory is reused
  std::vector<std::shared_ptr<Stream>> take_users(Block* block);   // the owner too
  // Host side of giving back: figures change at once, the memory itself is retired in stream order.
  void forget(Block* block);
  // Runs when no work uses the block: looks at the bytes behind it, poisons, quarantines. Throws what it finds.
  void retire(Block* block);
  // Looks behind every live block; "" or what was overwritten.
  std::string check();
  void guard_again();  // after counted host touches
  void set_cap(size_t bytes);
  MemoryStats stats();
  void reset_peak();
  // Forgets what late work has written to memory that was given back.
  void poison_again();
  // Where a faulting address lies: 0 nowhere, 1 guarded, 2 private. Safe in a signal handler.
  int classify(const void* address) const;
  bool open_page(const void* address);        // for counted host touches; safe in a signal handler
  std::string describe(const void* address);  // best effort: takes no lock that is held
  char* alias_of(const void* guarded) const;  // nullptr when it is no address of this device

 private:
  void map();
  Block* carve(size_t room);
  void evict(bool all);
  void refresh(Block* block);

  const int device_;
  std::mutex mutex_;
  size_t cap_ = 8ull << 30, live_ = 0, peak_ = 0, span_ = 0, used_ = 0, quarantined_ = 0;
  int file_ = -1;
  char* guarded_ = nullptr;
  char* private_ = nullptr;
  std::atomic<bool> opened_{false};
  std::map<size_t, std::vector<Block*>> free_;
  std::deque<Block*> quarantine_;
  std::unordered_set<Block*> blocks_;      // live ones
  std::map<const char*, Block*> by_place_;  // all, by guarded address
};

}  // namespace sim

#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <cwchar>

#include "device.h"

namespace sim {
namespace {

constexpr size_t kBehind = 64;               // canary bytes that every block has at least
constexpr size_t kCheckedBehind = 4096;      // and at most
constexpr size_t kQuarantineBytes = 32u << 20;
constexpr size_t kQuarantineBlocks = 256;
constexpr size_t kPunch = 1u << 20;          // rooms of this size go back to the system when they leave quarantine
constexpr size_t kGuardedSlots = 24000;      // the kernel allows a process 65530 mappings

size_t room_for(size_t bytes) {
  size_t pages = (bytes + kBehind + kPage - 1) / kPage;
  if (pages > 8) {
    size_t step = 1;
    while (step * 16 <= pages) step *= 2;
    pages = (pages + step - 1) / step * step;
  }
  return pages * kPage;
}

void poison(char* at, size_t bytes) { wmemset(reinterpret_cast<wchar_t*>(at), static_cast<wchar_t>(kPoison), bytes / 4); }

bool still_poison(const char* at, size_t bytes) {
  auto words = reinterpret_cast<const uint32_t*>(at);
  return std::all_of(words, words + bytes / 4, [](uint32_t w) { return w == kPoison; });
}

size_t canaries(const Block& b) { return std::min(b.room - b.bytes, kCheckedBehind); }

// How far behind the block's end the first overwritten byte lies; -1 when none is.
long overwritten(const Block& b, size_t bytes) {
  auto at = reinterpret_cast<const unsigned char*>(b.alias + b.bytes);
  for (size_t i = 0; i < bytes; i++)
    if (at[i] != kCanary) return static_cast<long>(i);
  return -1;
}

std::string overrun(const Block& b, long at) {
  return "sim:" + std::to_string(b.device) + " memory overrun: byte " + std::to_string(at) + " behind an allocation of " +
         std::to_string(b.bytes) + " bytes was overwritten";
}

}  // namespace

void Use::check() const {
  if (block->generation.load(std::memory_order_acquire) != generation)
    throw std::runtime_error("use after free: device memory was given back before this work ran (free it later, or "
                             "record_stream it on the stream that still uses it)");
}

void Memory::map() {
  if (guarded_) return;
  file_ = memfd_create("ktcore_sim", MFD_CLOEXEC);
  // sizes are rounded up and freed memory waits in quarantine, so there is more room than the cap lets live
  size_t span = 4 * std::max<size_t>(cap_, 8ull << 30);
  if (file_ < 0 || ftruncate(file_, static_cast<off_t>(span)) != 0)
    throw std::runtime_error("sim: cannot reserve device memory: " + std::string(strerror(errno)));
  void* guarded = mmap(nullptr, span, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  void* direct = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  if (guarded == MAP_FAILED || direct == MAP_FAILED)
    throw std::runtime_error("sim: cannot map device memory: " + std::string(strerror(errno)));
  guarded_ = static_cast<char*>(guarded);
  private_ = static_cast<char*>(direct);
  span_ = span;
}

Block* Memory::carve(size_t room) {
  size_t whole = room + kPage;
  if (used_ + whole > span_) return nullptr;
  auto b = new Block;
  b->device = device_;
  b->address = guarded_ + used_;
  b->alias = private_ + used_;
  b->room = room;
  // an overrun beyond the room faults in the worker thread itself
  if (by_place_.size() < kGuardedSlots) mprotect(b->alias + room, kPage, PROT_NONE);
  used_ += whole;
  by_place_[b->address] = b;
  return b;
}

void Memory::evict(bool all) {
  while (!quarantine_.empty() && (all || quarantined_ > kQuarantineBytes || quarantine_.size() > kQuarantineBlocks)) {
    Block* b = quarantine_.front();
    quarantine_.pop_front();
    quarantined_ -= b->room;
    if (b->room >= kPunch) {
      fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, b->alias - private_, static_cast<off_t>(b->room));
      b->poisoned = false;
    }
    free_[b->room].push_back(b);
  }
}

// Poison where it is not yet, canaries behind the end. Nobody else uses the block now.
void Memory::refresh(Block* b) {
  if (!b->poisoned) poison(b->alias, b->room);
  else if (!still_poison(b->alias, std::min(b->room, kPunch)))
    device(device_).fail("sim:" + std::to_string(device_) + " write after free: memory that was given back has been written");
  memset(b->alias + b->bytes, kCanary, canaries(*b));
  b->poisoned = false;
}

Block* Memory::allocate(size_t bytes, std::shared_ptr<Stream> owner) {
  Block* b = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    map();
    if (live_ + bytes > cap_)
      throw OutOfMemory("sim:" + std::to_string(device_) + " out of memory: tried to allocate " + std::to_string(bytes) +
                        " bytes, " + std::to_string(live_) + " of " + std::to_string(cap_) + " are in use");
    size_t room = room_for(bytes);
    for (int attempt = 0; attempt < 2 && !b; attempt++) {
      auto& slots = free_[room];
      if (!slots.empty()) {
        b = slots.back();
        slots.pop_back();
      } else if (!(b = carve(room))) {
        evict(true);
      }
    }
    if (!b)
      throw OutOfMemory("sim:" + std::to_string(device_) + " out of memory: " + std::to_string(bytes) +
                        " bytes fit, but no piece that large is left");
    live_ += bytes;
    peak_ = std::max(peak_, live_);
  }
  b->bytes = bytes;
  b->owner = std::move(owner);
  b->users.clear();
  b->holders = 1;
  refresh(b);
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_.insert(b);
  return b;
}

void Memory::record_user(Block* b, std::shared_ptr<Stream> stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stream != b->owner) b->users.push_back(std::move(stream));
}

std::vector<std::shared_ptr<Stream>> Memory::take_users(Block* b) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto users = std::move(b->users);
  users.push_back(b->owner);
  return users;
}

void Memory::forget(Block* b) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_ -= b->bytes;
}

void Memory::retire(Block* b) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.erase(b);
  }
  long at = overwritten(*b, canaries(*b));
  poison(b->alias, b->room);
  b->poisoned = true;
  b->generation.fetch_add(1, std::memory_order_release);
  b->owner.reset();
  b->users.clear();
  std::string found = at < 0 ? "" : overrun(*b, at);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    quarantine_.push_back(b);
    quarantined_ += b->room;
    evict(false);
  }
  if (!found.empty()) throw std::runtime_error(found);
}

std::string Memory::check() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Block* b : blocks_) {
    long at = overwritten(*b, kBehind);
    if (at >= 0) {
      memset(b->alias + b->bytes, kCanary, canaries(*b));  // one report an overrun
      return overrun(*b, at);
    }
  }
  return "";
}

void Memory::guard_again() {
  if (opened_.exchange(false)) mprotect(guarded_, span_, PROT_NONE);
}

void Memory::set_cap(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  cap_ = bytes;
}

MemoryStats Memory::stats() {
  std::lock_guard<std::mutex> lock(mutex_);
  return {live_, peak_, cap_, blocks_.size()};
}

void Memory::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  peak_ = live_;
}

void Memory::poison_again() {
  std::lock_guard<std::mutex> lock(mutex_);
  evict(true);
  for (auto& [room, blocks] : free_)
    for (Block* b : blocks) b->poisoned = false;
}

int Memory::classify(const void* address) const {
  auto at = static_cast<const char*>(address);
  if (guarded_ && at >= guarded_ && at < guarded_ + span_) return 1;
  if (private_ && at >= private_ && at < private_ + span_) return 2;
  return 0;
}

bool Memory::open_page(const void* address) {
  opened_ = true;
  auto page = reinterpret_cast<uintptr_t>(address) / kPage * kPage;
  return mprotect(reinterpret_cast<void*>(page), kPage, PROT_READ | PROT_WRITE) == 0;
}

std::string Memory::describe(const void* address) {
  auto at = static_cast<const char*>(address);
  int kind = classify(at);
  if (kind == 2) at = guarded_ + (at - private_);
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  std::string where = "sim:" + std::to_string(device_);
  if (!lock.owns_lock()) return where;
  auto found = by_place_.upper_bound(at);
  if (found == by_place_.begin()) return where;
  Block* b = std::prev(found)->second;
  bool live = blocks_.count(b) != 0;
  return where + ", byte " + std::to_string(at - b->address) + " of " + (live ? "an" : "a freed") + " allocation of " +
         std::to_string(b->bytes) + " bytes";
}

char* Memory::alias_of(const void* guarded) const {
  return classify(guarded) == 1 ? private_ + (static_cast<const char*>(guarded) - guarded_) : nullptr;
}

}  // namespace sim

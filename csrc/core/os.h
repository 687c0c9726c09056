// What the rest needs from the operating system; the POSIX and Linux calls live in os_linux.cpp alone.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ktcore {

// Zeroed memory, 64-byte aligned, in huge pages where large and offered. Throws std::bad_alloc.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes);
    ~Memory();
    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

  private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0, mapped_ = 0;
};

// Asks the system for huge pages where the range holds whole ones; without them reading a cache misses the TLB.
void prefer_huge_pages(void* data, size_t bytes);

// `root` below stands before /proc and /sys: tests bring files of their own.
std::vector<int> allowed_cpus();
// One CPU of each physical core among the allowed ones.
std::vector<int> physical_cores(const std::string& root = "");
// How quick each of these CPUs is, in a unit that they share; empty: the system does not tell.
std::vector<double> cpu_capacities(const std::vector<int>& cpus, const std::string& root = "");
// CPUs' worth of time that the control groups above this process allow (cpu.max, or the first version's cfs quota);
// 0: no limit.
double cpu_quota(const std::string& root = "");
int process_id();
// Throws std::invalid_argument if this thread may not run there.
void pin_this_thread(int cpu);
void yield_thread();
void wait_while_equal(const std::atomic<uint32_t>& word, uint32_t value);
void wake_all(const std::atomic<uint32_t>& word);
int64_t now_ns();
// Writes back and drops these bytes' lines from all caches; false where the processor has no instruction for it.
bool evict_lines(const void* p, size_t bytes);

}  // namespace ktcore

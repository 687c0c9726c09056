// Linux side of os.h: mmap with huge pages, affinity, futexes.
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <set>
#include <stdexcept>
#include <utility>

#include "core/os.h"

namespace ktcore {
namespace {
[[maybe_unused]] constexpr size_t kHuge = size_t{2} << 20;
}

#if defined(__SANITIZE_ADDRESS__)
// From the sanitizer's heap, to the byte: it sees nothing wrong in reading past the end of mapped pages.
Memory::Memory(size_t bytes) : size_(bytes) {
    void* p = nullptr;
    if (bytes == 0) return;
    if (bytes > SIZE_MAX / 4 || posix_memalign(&p, 4096, bytes) != 0 || p == nullptr) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(std::memset(p, 0, bytes));
}

Memory::~Memory() { free(data_); }
#else
Memory::Memory(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    if (bytes > SIZE_MAX - 2 * kHuge) throw std::bad_alloc();
    const bool large = bytes >= kHuge / 2;
    const size_t unit = large ? kHuge : 4096;
    // Mapped a unit too large, then trimmed, so that large areas start on a huge page.
    const size_t need = (bytes + unit - 1) / unit * unit, ask = large ? need + kHuge : need;
    void* p = mmap(nullptr, ask, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    uint8_t* start = static_cast<uint8_t*>(p);
    const size_t lead = (unit - reinterpret_cast<uintptr_t>(start) % unit) % unit;
    if (lead) munmap(start, lead);
    if (ask - lead > need) munmap(start + lead + need, ask - lead - need);
    data_ = start + lead;
    mapped_ = need;
    if (large) madvise(data_, need, MADV_HUGEPAGE);
}

Memory::~Memory() {
    if (data_) munmap(data_, mapped_);
}
#endif

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 4096;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: nothing is lost without
#else
    (void)data;
    (void)bytes;
#endif
}

Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }

Memory& Memory::operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

std::vector<int> allowed_cpus() {
    // 16 sets of 1024 CPUs: the kernel refuses a mask smaller than its own.
    std::vector<cpu_set_t> sets(16);
    std::vector<int> out;
    if (sched_getaffinity(0, sizeof(cpu_set_t) * sets.size(), sets.data()) != 0) return {0};
    for (int cpu = 0; cpu < static_cast<int>(sets.size()) * CPU_SETSIZE; cpu++)
        if (CPU_ISSET_S(cpu, sizeof(cpu_set_t) * sets.size(), sets.data())) out.push_back(cpu);
    return out;
}

std::vector<int> physical_cores(const std::string& root) {
    std::set<std::string> seen;
    std::vector<int> out;
    for (int cpu : allowed_cpus()) {
        std::ifstream file(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        std::string line;
        if (!std::getline(file, line) || seen.insert(line).second) out.push_back(cpu);
    }
    return out;
}

// Arm's and RISC-V's kernels measure a capacity, x86's firmware grades its cores; the clock's limit is the last resort.
std::vector<double> cpu_capacities(const std::vector<int>& cpus, const std::string& root) {
    for (const char* name : {"/cpu_capacity", "/acpi_cppc/highest_perf", "/cpufreq/cpuinfo_max_freq"}) {
        std::vector<double> found;
        for (int cpu : cpus) {
            double value = 0;
            std::ifstream(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + name) >> value;
            if (value > 0) found.push_back(value);
        }
        if (found.size() == cpus.size()) return found;
    }
    return {};
}

namespace {
// quota / period of one group's file or files; 0: no limit there.
double group_quota(const std::string& group) {
    std::string quota;
    double period = 0;
    if (std::ifstream both(group + "/cpu.max"); both >> quota >> period)
        return quota == "max" || period <= 0 ? 0 : std::strtod(quota.c_str(), nullptr) / period;
    double limit = 0;
    std::ifstream(group + "/cpu.cfs_quota_us") >> limit;  // -1: no limit
    std::ifstream(group + "/cpu.cfs_period_us") >> period;
    return limit > 0 && period > 0 ? limit / period : 0;
}
}  // namespace

double cpu_quota(const std::string& root) {
    double least = 0;
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        // number:controllers:path; the second version has no controllers
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        const bool unified = controllers == ",,";
        if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
        // Inside a container the path may be the host's: what is not there counts as no limit, up to the mount's root.
        for (std::string path = line.substr(second + 1);; path.resize(path.find_last_of('/'))) {
            for (const char* mount : {"", "/unified", "/cpu", "/cpu,cpuacct"}) {
                const double here = group_quota(root + "/sys/fs/cgroup" + mount + path);
                if (here > 0 && (least == 0 || here < least)) least = here;
            }
            if (path.find('/') == std::string::npos) break;
        }
    }
    return least;
}

int process_id() { return static_cast<int>(getpid()); }

void pin_this_thread(int cpu) {
    std::vector<cpu_set_t> sets(16);
    if (cpu < 0 || cpu >= static_cast<int>(sets.size()) * CPU_SETSIZE)
        throw std::invalid_argument("CPU " + std::to_string(cpu) + " does not exist");
    CPU_SET_S(cpu, sizeof(cpu_set_t) * sets.size(), sets.data());
    if (sched_setaffinity(0, sizeof(cpu_set_t) * sets.size(), sets.data()) != 0)
        throw std::invalid_argument("this process may not run on CPU " + std::to_string(cpu));
}

void yield_thread() { sched_yield(); }

void wait_while_equal(const std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(const std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

bool evict_lines(const void* p, size_t bytes) {
#if defined(__x86_64__)
    const char* at = static_cast<const char*>(p);
    for (size_t i = 0; i < bytes; i += 64) __builtin_ia32_clflush(at + i);
    __builtin_ia32_mfence();
    return true;
#else
    static_cast<void>(p), static_cast<void>(bytes);
    return false;
#endif
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

}  // namespace ktcore

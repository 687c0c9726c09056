// mbind and move_pages by system call: libnuma would be one more thing to install for two calls.
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "numa/memory.h"

namespace ktcore {
namespace {
constexpr int kMaxNodes = 1024;  // the kernel's largest MAX_NUMNODES
constexpr size_t kBits = 8 * sizeof(unsigned long);

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

std::runtime_error failed(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }
}  // namespace

void bind_memory(const void* data, size_t bytes, int node) {
    if (node == kAnyNode || bytes == 0) return;
    if (node < 0 || node >= kMaxNodes) throw std::runtime_error("there is no NUMA node " + std::to_string(node));
    unsigned long mask[kMaxNodes / kBits] = {};
    mask[static_cast<size_t>(node) / kBits] = 1ul << static_cast<size_t>(node) % kBits;
    const size_t page = page_size(), length = (bytes + page - 1) / page * page;
    // one more than the mask's bits: the kernel counts the last one out
    if (syscall(SYS_mbind, data, length, MPOL_BIND, mask, kMaxNodes + 1, 0) != 0)
        throw failed("cannot bind memory to NUMA node " + std::to_string(node));
}

std::map<int, int64_t> pages_by_node(const void* data, size_t bytes, size_t samples) {
    const size_t page = page_size(), pages = (bytes + page - 1) / page;
    const size_t wanted = samples == 0 ? pages : std::min(samples, pages);
    std::map<int, int64_t> found;
    constexpr size_t kBatch = 4096;
    std::vector<void*> at(kBatch);
    std::vector<int> status(kBatch);
    for (size_t done = 0; done < wanted; done += kBatch) {
        const size_t n = std::min(kBatch, wanted - done);
        for (size_t i = 0; i < n; i++)
            at[i] = const_cast<uint8_t*>(static_cast<const uint8_t*>(data)) + (done + i) * pages / wanted * page;
        // without target nodes the call moves nothing and reports where each page is
        if (syscall(SYS_move_pages, 0, n, at.data(), nullptr, status.data(), 0) != 0)
            throw failed("cannot ask where pages lie");
        for (size_t i = 0; i < n; i++) found[status[i] >= 0 ? status[i] : kAbsentPage]++;
    }
    return found;
}

}  // namespace ktcore

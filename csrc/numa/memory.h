// Memory bound to NUMA nodes by physical id, and where pages really lie.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>

namespace ktcore {

constexpr int kAnyNode = -1;
constexpr int kAbsentPage = -1;  // in page counts: not backed by memory yet

// Pages of [data, data + bytes) that are not there yet will come from `node` alone; kAnyNode does nothing. `data` starts
// a page. Throws std::runtime_error with the system's reason.
void bind_memory(const void* data, size_t bytes, int node);
// Node -> pages of [data, data + bytes) on it, looking at `samples` of them spread evenly (0: at all). Throws
// std::runtime_error.
std::map<int, int64_t> pages_by_node(const void* data, size_t bytes, size_t samples);

}  // namespace ktcore

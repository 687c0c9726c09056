// How tensors of the simulated device are seen by its worker threads, and how launches on them are made.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <functional>
#include <vector>

#include "device.h"

namespace sim {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

inline bool on_device(const at::Tensor& t) { return t.device().type() == kType; }
Block* block_of(const at::Tensor& t);  // nullptr for a tensor without memory
// A CPU tensor over the private mapping: touched by worker threads only.
at::Tensor alias(const at::Tensor& t, std::vector<Use>& uses);
at::Tensor new_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, at::ScalarType dtype, int device);
inline at::Tensor new_tensor(c10::IntArrayRef sizes, at::ScalarType dtype, int device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return new_tensor(sizes, strides, dtype, device);
}
// Puts a kernel on the current stream of `device`: `run` gets to work when its turn comes, on aliases made beforehand.
void launch(int device, const char* what, std::vector<Use> uses, std::function<void()> run, Kind kind = Kind::Work);
// Waits for the current stream and raises what surfaced.
void block_on(int device, const char* why);
// Whether operators outside of the list run as launches too, where their results' shapes do not depend on data: a device
// whose kernels are torch's own. Off, they go to the host and are counted.
void run_all_on_device(bool on);
bool is_pinned(const void* address);
size_t pinned_bytes();

}  // namespace sim

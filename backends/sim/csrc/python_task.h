// Launches of Python callables.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "stream.h"

namespace sim {

// Calls `function` with CPU tensors over the memory of `tensors` when the stream gets there; called with the lock held.
void launch_python(int index, int64_t stream, pybind11::object function, const std::vector<at::Tensor>& tensors,
                   const std::string& name);
// The same graph, dropped without Python's lock.
std::shared_ptr<Graph> unlocked_graph(std::shared_ptr<Graph> graph);

}  // namespace sim

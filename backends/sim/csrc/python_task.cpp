// Python callables as device kernels: they run on a stream's worker thread, in order, on tensors over the device's own
// mapping. Test stand-ins of a vendor's kernels use it; what is captured runs again at every replay.
#include "python_task.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <set>

#include "tensors.h"

namespace py = pybind11;

namespace sim {
namespace {

// Owned by tasks, which are dropped on worker threads and by destructors that may or may not hold the lock.
struct Call {
  py::object function;
  py::tuple arguments;
};

void drop(Call* call) {
  py::gil_scoped_acquire lock;
  delete call;
}

// Names of tasks outlive them.
const char* kept(const std::string& name) {
  static std::mutex mutex;
  static auto* names = new std::set<std::string>;
  std::lock_guard<std::mutex> lock(mutex);
  return names->insert(name).first->c_str();
}

}  // namespace

void launch_python(int index, int64_t stream, py::object function, const std::vector<at::Tensor>& tensors, const std::string& name) {
  std::vector<Use> uses;
  py::tuple arguments(tensors.size());
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto& t = tensors[i];
    TORCH_CHECK(!on_device(t) || t.device().index() == index, name, ": Expected all tensors to be on the same device, but found sim:",
                index, " and ", t.device());
    TORCH_CHECK(on_device(t) || (t.defined() && (t.dim() == 0 || is_pinned(t.const_data_ptr()))), name,
                ": Pointer argument (at ", i, ") cannot be accessed from the device (", t.device(), " tensor?)");
    arguments[i] = py::cast(on_device(t) ? alias(t, uses) : t);
  }
  std::shared_ptr<Call> call(new Call{std::move(function), std::move(arguments)}, &drop);
  auto& d = device(index);
  d.launches++;
  auto to = d.stream(stream);
  auto what = kept(name);
  py::gil_scoped_release unlocked;
  to->push({Kind::Work, what, [uses = std::move(uses), call = std::move(call)] {
              for (auto& use : uses) use.check();
              disarm_fault_handler();
              py::gil_scoped_acquire lock;
              try {
                call->function(*call->arguments);
              } catch (py::error_already_set& error) {
                throw std::runtime_error(error.what());
              }
            }});
}

std::shared_ptr<Graph> unlocked_graph(std::shared_ptr<Graph> graph) {
  // its helper threads may need the lock to come to their end
  auto raw = graph.get();
  return {raw, [held = std::move(graph)](Graph*) mutable {
            if (!PyGILState_Check()) return held.reset();
            py::gil_scoped_release unlocked;
            held.reset();
          }};
}

}  // namespace sim

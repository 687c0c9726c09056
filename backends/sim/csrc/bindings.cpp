// The Python module: what torch's own surface has no words for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>

#include "native_list.h"
#include "python_task.h"
#include "tensors.h"

namespace py = pybind11;
using namespace sim;
using Free = py::call_guard<py::gil_scoped_release>;

namespace {

std::shared_ptr<Stream> of(int index, int64_t id) { return device(index).stream(id); }

Timing timing(uint64_t seed, double delay_us, double latency_us) { return {seed, delay_us, latency_us}; }

char* reach(int index, uintptr_t address) {
  auto at = reinterpret_cast<char*>(address);
  auto alias = device(index).memory.alias_of(at);
  return alias ? alias : at;
}

// As a driver's copy: bytes by address, nothing checked.
void copy_bytes(int index, int64_t stream, uintptr_t to, uintptr_t from, size_t bytes) {
  auto d = reach(index, to), s = reach(index, from);
  of(index, stream)->push({Kind::Transfer, "copy_bytes", [=] { memcpy(d, s, bytes); }});
}

void fill_bytes(int index, int64_t stream, uintptr_t to, int value, size_t bytes) {
  auto d = reach(index, to);
  of(index, stream)->push({Kind::Work, "fill_bytes", [=] { memset(d, value, bytes); }});
}

void copy_async(const at::Tensor& to, const at::Tensor& from, int index, int64_t stream) {
  const auto& host = on_device(to) ? from : to;
  TORCH_CHECK(on_device(to) || on_device(from), "copy_async: neither tensor is on the device");
  TORCH_CHECK(on_device(host) || host.numel() == 0 || is_pinned(host.const_data_ptr()),
              "copy_async: the host tensor is not pinned; take it from pinned_buffer()");
  TORCH_CHECK(to.sizes() == from.sizes() && to.scalar_type() == from.scalar_type(), "copy_async: ", from.scalar_type(),
              from.sizes(), " does not fit into ", to.scalar_type(), to.sizes());
  TORCH_CHECK(to.is_contiguous() && from.is_contiguous(), "copy_async: both tensors must be contiguous");
  if (to.numel() == 0) return;
  std::vector<Use> uses;
  auto see = [&](const at::Tensor& t) { return on_device(t) ? alias(t, uses) : t.alias(); };
  auto d = see(to), s = see(from);
  of(index, stream)->push({Kind::Transfer, "copy_async", [d, s, uses = std::move(uses)] {
                             for (auto& use : uses) use.check();
                             memcpy(d.mutable_data_ptr(), s.const_data_ptr(), d.nbytes());
                           }});
}

void launch_host(int index, int64_t stream, uintptr_t function, uintptr_t data, bool capturable) {
  if (!capturable) of(index, stream)->refuse_while_capturing("an eager host function");
  auto call = reinterpret_cast<void (*)(void*)>(function);
  device(index).host_calls++;
  of(index, stream)->push({Kind::Transfer, "host function", [=] { call(reinterpret_cast<void*>(data)); }});
}

void sleep_in(int index, int64_t stream, double seconds) {
  of(index, stream)->push({Kind::Bookkeeping, "sleep", [=] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }});
}

void fail_in(int index, int64_t stream, std::string why) {
  of(index, stream)->push({Kind::Work, "injected failure", [why] { throw std::runtime_error(why); }});
}

void sync_stream(int index, int64_t stream) {
  auto s = of(index, stream);
  s->refuse_while_capturing("synchronize");
  auto& d = device(index);
  d.blocked++;
  s->sync();
  auto damage = d.memory.check();
  if (!damage.empty()) d.fail(damage);
  d.memory.guard_again();
  d.raise();
}

py::dict memory_of(int index) {
  auto s = device(index).memory.stats();
  py::dict made;
  made["live"] = s.live;
  made["peak"] = s.peak;
  made["cap"] = s.cap;
  made["blocks"] = s.blocks;
  return made;
}

py::dict counters(int index) {
  auto& d = device(index);
  py::dict made;
  made["launches"] = d.launches.load();
  made["blocked"] = d.blocked.load();
  made["host_calls"] = d.host_calls.load();
  made["graphs"] = d.graphs.load();
  made["streams"] = d.streams().size();
  made["fallbacks"] = d.fallbacks();
  return made;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  install_fault_handler();
  m.def("device_count", &device_count);
  m.def("current_device", &current_device);
  m.def("set_device", [](int index) {
    device(index);
    set_current_device(index);
  });
  m.def("synchronize", [](int index) { device(index).synchronize(); }, Free());
  m.def("sync_stream", &sync_stream, Free());
  m.def("idle", [](int index, int64_t stream) { return of(index, stream)->idle(); });
  m.def("new_stream", [](int index, uint64_t seed, double delay, double latency) {
    return device(index).new_stream(timing(seed, delay, latency))->id;
  });
  m.def("destroy_stream", [](int index, int64_t stream) { device(index).destroy_stream(stream); }, Free());
  m.def("set_timing", [](int index, int64_t stream, uint64_t seed, double delay, double latency) {
    of(index, stream)->set_timing(timing(seed, delay, latency));
  });
  m.def("drawn_us", [](int index, int64_t stream) { return of(index, stream)->drawn_us(); });
  m.def("current_stream", &current_stream_id);
  m.def("set_stream", [](int index, int64_t stream) {
    of(index, stream);
    set_current_stream(index, stream);
  });
  m.def("copy_async", &copy_async, Free());
  m.def("copy_bytes", &copy_bytes, Free());
  m.def("fill_bytes", &fill_bytes, Free());
  m.def("launch_host", &launch_host, Free());
  m.def("launch_python", &launch_python);
  m.def("alias_address", [](int index, uintptr_t at) { return reinterpret_cast<uintptr_t>(device(index).memory.alias_of(reinterpret_cast<char*>(at))); });
  m.def("run_all_on_device", &run_all_on_device);
  m.def("sleep", &sleep_in, Free());
  m.def("fail", &fail_in, Free());
  m.def("errors", [](int index) { return device(index).errors(); });
  m.def("memory", &memory_of);
  m.def("set_cap", [](int index, size_t bytes) { device(index).memory.set_cap(bytes); });
  m.def("poison_again", [](int index) { device(index).memory.poison_again(); });
  m.def("reset_peak", [](int index) { device(index).memory.reset_peak(); });
  m.def("counters", &counters);
  m.def("pinned_bytes", &pinned_bytes);
  m.def("host_touches", &host_touches);
  m.def("count_host_touches", [](bool on) { set_host_touch(on ? HostTouch::Count : HostTouch::Abort); });
  m.def("native_operators", [] {
    std::vector<std::string> names;
    for (const auto& group : native_operators()) names.insert(names.end(), group.names.begin(), group.names.end());
    return names;
  });
  m.def("close_all", &close_all, Free());

  py::class_<Event, std::shared_ptr<Event>>(m, "Event")
      .def(py::init<>())
      .def("record", [](Event& e, int index, int64_t stream) { e.record(*of(index, stream)); }, Free())
      .def("make_wait", [](Event& e, int index, int64_t stream) { e.make_wait(*of(index, stream)); }, Free())
      .def("query", &Event::query, Free())
      .def("synchronize", &Event::synchronize, Free());

  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def(py::init([](int index, int64_t stream) { return unlocked_graph(begin_capture(*of(index, stream))); }), Free())
      .def("end", [](const std::shared_ptr<Graph>& g, bool keep) { end_capture(g, keep); }, Free())
      .def("replay", [](Graph& g, int index, int64_t stream) { g.replay(of(index, stream)); }, Free())
      .def_property_readonly("launches", [](Graph& g) {
        long n = 0;
        for (auto& node : g.nodes) n += node.type == Node::Launch;
        return n;
      });
}

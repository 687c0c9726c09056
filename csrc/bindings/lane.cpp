// Binds the lane. Python callables run on its thread with the GIL held; native work runs without it.
#include "core/lane.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "bindings/lane.h"
#include "numa/sharded_experts.h"

namespace py = pybind11;

namespace ktcore {
namespace {

using NoGil = py::gil_scoped_release;

// For what may wait for a thread that wants the GIL; called by threads that hold it and by others.
template <class Work>
void without_gil(Work work) {
    std::optional<NoGil> released;
    if (PyGILState_Check()) released.emplace();
    work();
}

// A job with the lane that it needs; the lane outlives it. A job that is dropped while it is queued ends first.
struct OwnedJob {
    std::shared_ptr<Lane> lane;
    Job job;
    ~OwnedJob() {
        if (job.done.load() == 0) without_gil([this] { Lane::wait(job); });
    }
};

uintptr_t address(void (*function)(void*) noexcept) { return reinterpret_cast<uintptr_t>(function); }

// The Python object is dropped with the GIL held, whichever thread lets the job go.
template <class T>
std::shared_ptr<T> keep(T object) {
    return {new T(std::move(object)), [](T* held) {
                py::gil_scoped_acquire gil;
                delete held;
            }};
}

std::shared_ptr<OwnedJob> make_job(std::shared_ptr<Lane> lane, std::function<void()> work) {
    auto owned = std::make_shared<OwnedJob>();
    owned->job.lane = lane.get();
    owned->lane = std::move(lane);
    owned->job.work = std::move(work);
    return owned;
}

}  // namespace

void bind_lane(py::module_& m) {
    py::class_<OwnedJob, std::shared_ptr<OwnedJob>>(m, "Job")
        .def_property_readonly("address", [](OwnedJob& j) { return reinterpret_cast<uintptr_t>(&j.job); })
        .def_property_readonly("done", [](OwnedJob& j) { return j.job.done.load() != 0; })
        .def_property_readonly("error", [](OwnedJob& j) { return j.job.done.load() != 0 ? j.job.error : std::string(); })
        .def("start", [](OwnedJob& j) { j.lane->start(j.job); }, py::call_guard<NoGil>())
        .def("wait", [](OwnedJob& j) { Lane::wait(j.job); }, py::call_guard<NoGil>());

    py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
        .def(py::init([] {
            return std::shared_ptr<Lane>(new Lane, [](Lane* lane) { without_gil([lane] { delete lane; }); });
        }))
        .def_property_readonly_static("start_address", [](const py::object&) { return address(Lane::start_callback); })
        .def_property_readonly_static("wait_address", [](const py::object&) { return address(Lane::wait_callback); })
        .def("close", &Lane::close, py::call_guard<NoGil>())
        .def("job",
             [](std::shared_ptr<Lane> lane, py::function work) {
                 return make_job(std::move(lane), [held = keep(std::move(work))] {
                     py::gil_scoped_acquire gil;
                     try {
                         (*held)();
                     } catch (py::error_already_set& e) {
                         // the Python exception must not leave with the GIL released; its text does
                         throw std::runtime_error(e.what());
                     }
                 });
             })
        .def(
            "experts_job",
            [](std::shared_ptr<Lane> lane, py::object experts, uintptr_t x, uintptr_t ids, uintptr_t weights, uintptr_t out,
               int64_t tokens, int64_t top_k, py::object owners) {
                check(x && ids && weights && out && tokens >= 0 && top_k > 0, "experts_job needs four addresses and a shape");
                // the job reads and writes their memory whenever it runs: it keeps them as long as it lives
                auto held = keep(std::make_pair(std::move(experts), std::move(owners)));
                const auto job = [&](auto* block) {
                    return make_job(std::move(lane), [=, held = held] {
                        block->forward(reinterpret_cast<const float*>(x), reinterpret_cast<const int64_t*>(ids),
                                       reinterpret_cast<const float*>(weights), reinterpret_cast<float*>(out), tokens, top_k);
                    });
                };
                const py::object& block = held->first;
                if (py::isinstance<ShardedExpertsBlock>(block)) return job(block.cast<ShardedExpertsBlock*>());
                return job(block.cast<ExpertsBlock*>());
            },
            py::arg("experts"), py::arg("x_ptr"), py::arg("ids_ptr"), py::arg("weights_ptr"), py::arg("out_ptr"),
            py::arg("tokens"), py::arg("top_k"), py::kw_only(), py::arg("owners").none(false));
}

}  // namespace ktcore

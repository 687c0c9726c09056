// The C interface between Python and a SYCL runtime: queues, kernels compiled from source, launches, host calls.
// Built by an ordinary C++ compiler: device code comes as text and is compiled by the runtime's own just-in-time compiler.
#include <sycl/sycl.hpp>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ex = sycl::ext::oneapi::experimental;

namespace {

struct Bundle {
    sycl::kernel_bundle<sycl::bundle_state::executable> held;
    std::map<std::string, std::unique_ptr<sycl::kernel>> kernels;
};

// one argument of a kernel, as Python lays it out
struct Argument {
    std::int64_t kind;  // 0 pointer, 1 int32, 2 float
    union {
        void *pointer;
        std::int32_t integer;
        float real;
    };
};

void put(char *out, std::size_t room, const std::string &text) noexcept {
    if (room == 0) return;
    const std::size_t n = text.size() < room - 1 ? text.size() : room - 1;
    std::memcpy(out, text.data(), n);
    out[n] = 0;
}

// runs `work`; an exception becomes text and a 1
template <class Work>
int guarded(char *out, std::size_t room, Work work) noexcept {
    try {
        work();
        return 0;
    } catch (const std::exception &error) {
        put(out, room, error.what());
    } catch (...) {
        put(out, room, "an unknown exception");
    }
    return 1;
}

bool has_dpas(const sycl::device &device) {
    if (!device.has(sycl::aspect::ext_intel_matrix)) return false;
    using type = ex::matrix::matrix_type;
    for (const auto &found : device.get_info<ex::info::device::matrix_combinations>()) {
        const bool any_m = found.max_msize >= 8 || found.msize == 8;
        if (any_m && found.nsize == 16 && found.ksize == 16 && found.atype == type::bf16) return true;
    }
    return false;
}

}  // namespace

extern "C" {

// A queue of its own, in order, on the first device of a kind: "cpu" or "gpu".
int kt_sycl_queue_new(const char *kind, void **queue, char *error, std::size_t room) {
    return guarded(error, room, [&] {
        const bool cpu = std::strcmp(kind, "cpu") == 0;
        const sycl::device device = cpu ? sycl::device{sycl::cpu_selector_v} : sycl::device{sycl::gpu_selector_v};
        *queue = new sycl::queue{device, sycl::property::queue::in_order{}};
    });
}

// Facts of the queue's device, a line each: name, kind, widths, local memory, fp16, dpas, in_order.
int kt_sycl_describe(void *queue, char *out, std::size_t room) {
    return guarded(out, room, [&] {
        const auto &q = *static_cast<sycl::queue *>(queue);
        const sycl::device device = q.get_device();
        std::string widths;
        for (const auto width : device.get_info<sycl::info::device::sub_group_sizes>()) {
            widths += (widths.empty() ? "" : ",") + std::to_string(width);
        }
        put(out, room, "name=" + device.get_info<sycl::info::device::name>() +
                           "\nkind=" + (device.is_cpu() ? "cpu" : device.is_gpu() ? "gpu" : "other") +
                           "\nwidths=" + widths +
                           "\nlocal=" + std::to_string(device.get_info<sycl::info::device::local_mem_size>()) +
                           "\nunits=" + std::to_string(device.get_info<sycl::info::device::max_compute_units>()) +
                           "\nf16=" + (device.has(sycl::aspect::fp16) ? "1" : "0") +
                           "\ndpas=" + (has_dpas(device) ? "1" : "0") + "\nin_order=" + (q.is_in_order() ? "1" : "0"));
    });
}

// Compiles source for the queue's context; `log` gets the compiler's words, or the error. `only_front`: to SPIR-V alone.
int kt_sycl_compile(void *queue, const char *source, const char *option, int only_front, void **bundle, char *log,
                    std::size_t room) {
    std::string words;
    const int failed = guarded(log, room, [&] {
        const auto &q = *static_cast<sycl::queue *>(queue);
        auto from = ex::create_kernel_bundle_from_source(q.get_context(), ex::source_language::sycl,
                                                               std::string(source));
        std::vector<std::string> options;
        if (*option) options.emplace_back(option);
        const std::vector<sycl::device> devices{q.get_device()};
        const ex::properties properties{ex::build_options{options}, ex::save_log{&words}};
        if (only_front) {
            ex::compile(from, devices, properties);
            return;
        }
        *bundle = new Bundle{ex::build(from, devices, properties), {}};
    });
    if (failed && !words.empty()) put(log, room, words);
    return failed;
}

// A kernel of a bundle by its name; it lives as long as the bundle.
int kt_sycl_kernel(void *bundle, const char *name, void **kernel, char *error, std::size_t room) {
    return guarded(error, room, [&] {
        auto &from = *static_cast<Bundle *>(bundle);
        auto &found = from.kernels[name];
        if (!found) found = std::make_unique<sycl::kernel>(from.held.ext_oneapi_get_kernel(name));
        *kernel = found.get();
    });
}

// Launches over `groups` work-groups (3, slowest first) of `width` work-items along the last dimension.
int kt_sycl_launch(void *queue, void *kernel, const std::int64_t *groups, std::int64_t width, const Argument *arguments,
                   std::int32_t count, char *error, std::size_t room) {
    return guarded(error, room, [&] {
        auto &q = *static_cast<sycl::queue *>(queue);
        const sycl::range<3> local{1, 1, static_cast<std::size_t>(width)};
        const sycl::range<3> blocks{static_cast<std::size_t>(groups[0]), static_cast<std::size_t>(groups[1]),
                                    static_cast<std::size_t>(groups[2])};
        q.submit([&](sycl::handler &handler) {
            for (std::int32_t i = 0; i < count; ++i) {
                const Argument &a = arguments[i];
                if (a.kind == 0) handler.set_arg(i, a.pointer);
                if (a.kind == 1) handler.set_arg(i, a.integer);
                if (a.kind == 2) handler.set_arg(i, a.real);
            }
            handler.parallel_for(sycl::nd_range<3>{blocks * local, local}, *static_cast<sycl::kernel *>(kernel));
        });
    });
}

// Calls `function(data)` on a thread of the runtime, in the queue's order; work after it waits until it returned.
int kt_sycl_host(void *queue, void (*function)(void *), void *data, char *error, std::size_t room) {
    return guarded(error, room, [&] {
        static_cast<sycl::queue *>(queue)->submit(
            [&](sycl::handler &handler) { handler.host_task([=] { function(data); }); });
    });
}

int kt_sycl_wait(void *queue, char *error, std::size_t room) {
    return guarded(error, room, [&] { static_cast<sycl::queue *>(queue)->wait_and_throw(); });
}

}  // extern "C"

// Binds what the machine can do at most: arithmetic without memory, for judging kernels by.
#include <atomic>

#include "bindings/common.h"
#include "core/os.h"

namespace {

Arithmetic parse_arithmetic(const std::string& kind) {
    if (kind == "int8") return Arithmetic::Int8;
    if (kind == "bf16") return Arithmetic::Bf16;
    check(kind == "f32", "unknown arithmetic '" + kind + "'; known: int8, bf16, f32");
    return Arithmetic::F32;
}

double peak_rate(Engine& e, const std::string& kind, double seconds) {
    const Arithmetic arithmetic = parse_arithmetic(kind);
    check(seconds > 0 && seconds <= 60, "seconds must be above 0, at most 60");
    NoGil nogil;
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    // A thread that is late, or shares its core, leaves its items to the others: passes differ, the best one counts.
    const int items = 4 * e.pool.threads();
    int64_t rounds = 64;
    double best = 0;
    const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
    do {
        std::atomic<int64_t> operations{0};
        const int64_t start = now_ns();
        e.pool.run(items, [&](int, int) { operations += e.kernels.peak(arithmetic, rounds); });
        const int64_t took = now_ns() - start;
        if (operations == 0) return 0;
        if (took < 1000000)
            rounds *= 2;
        else
            best = std::max(best, static_cast<double>(operations.load()) / (static_cast<double>(took) * 1e-9));
    } while (now_ns() < end || best == 0);
    return best;
}

}  // namespace

void bind_limits(py::module_& m) {
    m.def("peak_rate", &peak_rate, py::arg("pool"), py::arg("kind"), py::arg("seconds") = 0.3);
}

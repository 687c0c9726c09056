// Binds what the machine can do at most: arithmetic without memory, for judging kernels by.
#include "bindings/common.h"
#include "blocks/limits.h"

namespace {

Arithmetic parse_arithmetic(const std::string& kind) {
    if (kind == "int8") return Arithmetic::Int8;
    if (kind == "bf16") return Arithmetic::Bf16;
    check(kind == "f32", "unknown arithmetic '" + kind + "'; known: int8, bf16, f32");
    return Arithmetic::F32;
}

double peak_of(Engine& e, const std::string& kind, double seconds) {
    const Arithmetic arithmetic = parse_arithmetic(kind);
    check(seconds > 0 && seconds <= 60, "seconds must be above 0, at most 60");
    NoGil nogil;
    return peak_rate(e, arithmetic, seconds);
}

}  // namespace

void bind_limits(py::module_& m) {
    m.def("peak_rate", &peak_of, py::arg("pool"), py::arg("kind"), py::arg("seconds") = 0.3);
}

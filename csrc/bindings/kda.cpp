// Binding of Kimi delta attention.
#include "blocks/kda.h"

#include "bindings/fields.h"

namespace {
KimiDeltaBlock::Config kda_config(Fields f) {
    KimiDeltaBlock::Config c{};
    c.heads = f.need<int>("heads");
    c.dim = f.need<int>("dim");
    c.width = f.need<int>("width");
    c.conv = f.flat("conv");
    c.rates = f.flat("rates");
    c.dt_bias = f.flat("dt_bias");
    c.bound = f.take("bound", 0.f);
    c.out_norm = f.flat("out_norm");
    c.out_eps = f.need<float>("out_eps");
    c.norm = f.vector("norm");
    c.norm_eps = f.take("norm_eps", 0.f);
    c.residual = f.take("residual", true);
    c.exact = f.take("exact", false);
    f.end();
    return c;
}
}  // namespace

void bind_kda(py::module_& m) {
    using Shared = std::shared_ptr<PackedMatrix>;
    py::class_<KimiDeltaBlock>(m, "KimiDeltaBlock")
        .def(py::init([](EnginePtr pool, Shared q, Shared k, Shared v, Shared f_a, Shared f_b, Shared b, Shared g_a,
                         Shared g_b, Shared o, const py::kwargs& fields) {
                 return std::make_unique<KimiDeltaBlock>(pool, KimiDeltaBlock::Weights{q, k, v, f_a, f_b, b, g_a, g_b, o},
                                                         kda_config({"KimiDeltaBlock", fields}));
             }),
             py::arg("pool").none(false), py::arg("q").none(false), py::arg("k").none(false), py::arg("v").none(false),
             py::arg("f_a").none(false), py::arg("f_b").none(false), py::arg("b").none(false), py::arg("g_a").none(false),
             py::arg("g_b").none(false), py::arg("o").none(false))
        .def(
            "forward",
            [](KimiDeltaBlock& self, uintptr_t x, uintptr_t out, const Step& step, const std::vector<int32_t>& slots,
               uintptr_t conv, uintptr_t state, int64_t num_slots, const std::vector<std::pair<int32_t, int32_t>>& kept) {
                check(kept.empty(), "states behind some of a step's tokens are not kept");
                if (check_tokens(step.tokens()) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                const DeltaStates states{pointer(conv, "conv_ptr"), pointer(state, "state_ptr"), num_slots};
                NoGil nogil;
                self.forward(in, o, step, slots, states);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("slots"), py::arg("conv_ptr"),
            py::arg("state_ptr"), py::arg("num_slots"), py::arg("kept") = std::vector<std::pair<int32_t, int32_t>>());
}

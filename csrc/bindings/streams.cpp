// Bindings of residual streams.
#include "blocks/streams.h"

#include "bindings/fields.h"
#include "blocks/gated_streams.h"

namespace {
HyperBlock::Config hyper_config(Fields f) {
    HyperBlock::Config c{};
    c.hidden = f.need<int>("hidden");
    c.streams = f.need<int>("streams");
    c.rounds = f.need<int>("rounds");
    c.eps = f.need<float>("eps");
    c.rms_eps = f.need<float>("rms_eps");
    c.leaves = f.need<bool>("leaves");
    c.base = f.flat("base");
    c.scale = f.flat("scale");
    f.end();
    return c;
}

GatedStreamsBlock::Config gated_config(Fields f) {
    GatedStreamsBlock::Config c{};
    c.hidden = f.need<int>("hidden");
    c.streams = f.need<int>("streams");
    c.norm = f.flat("norm");
    c.eps = f.need<float>("eps");
    c.exact = f.take("exact", false);
    f.end();
    return c;
}

// `enter` and `leave` of both kinds.
template <class Block>
void bind_block(py::class_<Block>& block) {
    block.def_property_readonly("carry", &Block::carry)
        .def(
            "enter",
            [](Block& self, uintptr_t x, uintptr_t out, uintptr_t carry, int64_t tokens) {
                const int n = check_tokens(tokens);
                if (n == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                float* c = self.carry() ? pointer(carry, "carry_ptr") : nullptr;
                NoGil nogil;
                self.enter(in, o, c, n);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("carry_ptr"), py::arg("tokens"))
        .def(
            "leave",
            [](Block& self, uintptr_t x, uintptr_t y, uintptr_t carry, uintptr_t out, int64_t tokens) {
                const int n = check_tokens(tokens);
                if (n == 0) return;
                const float *in = pointer(x, "x_ptr"), *branch = pointer(y, "y_ptr"), *c = pointer(carry, "carry_ptr");
                float* o = pointer(out, "out_ptr");
                NoGil nogil;
                self.leave(in, branch, c, o, n);
            },
            py::arg("x_ptr"), py::arg("y_ptr"), py::arg("carry_ptr"), py::arg("out_ptr"), py::arg("tokens"));
}
}  // namespace

void bind_streams(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    py::class_<HyperBlock> hyper(m, "HyperBlock");
    hyper.def(py::init([](EnginePtr pool, const Floats& fn, const py::kwargs& fields) {
                  return std::make_unique<HyperBlock>(pool, Vector(fn.data(), fn.data() + fn.size()),
                                                      hyper_config({"HyperBlock", fields}));
              }),
              py::arg("pool").none(false), py::arg("fn"));
    bind_block(hyper);
    py::class_<GatedStreamsBlock> gated(m, "GatedStreamsBlock");
    gated.def(py::init([](EnginePtr pool, SharedMatrix down, SharedMatrix up, SharedMatrix inject, const py::kwargs& fields) {
                  return std::make_unique<GatedStreamsBlock>(pool, down, up, inject,
                                                             gated_config({"GatedStreamsBlock", fields}));
              }),
              py::arg("pool").none(false), py::arg("down").none(false), py::arg("up").none(false), py::arg("inject").none(true));
    bind_block(gated);
}

// Bindings of the gated delta net: the block, and the recurrence alone.
#include "blocks/delta.h"

#include "bindings/fields.h"

namespace {
DeltaBlock::Config delta_config(Fields f) {
    DeltaBlock::Config c{};
    c.key_heads = f.need<int>("key_heads");
    c.value_heads = f.need<int>("value_heads");
    c.key_dim = f.need<int>("key_dim");
    c.value_dim = f.need<int>("value_dim");
    c.width = f.need<int>("width");
    c.conv = f.flat("conv");
    c.decay = f.flat("decay");
    c.dt_bias = f.flat("dt_bias");
    c.out_norm = f.flat("out_norm");
    c.out_eps = f.need<float>("out_eps");
    c.norm = f.vector("norm");
    c.norm_eps = f.take("norm_eps", 0.f);
    c.residual = f.take("residual", true);
    c.exact = f.take("exact", false);
    c.tiled = f.take("tiled", false);
    c.sigmoid_gate = f.take("sigmoid_gate", false);
    f.end();
    return c;
}

py::array_t<float> rule_alone(Engine& e, const Floats& q, const Floats& k, const Floats& v, const Floats& g,
                              const Floats& beta, py::array_t<float, py::array::c_style> state) {
    check(q.ndim() == 3 && k.ndim() == 3 && v.ndim() == 3 && g.ndim() == 2 && beta.ndim() == 2 && state.ndim() == 3,
          "q, k, v must be [tokens, heads, width], g and beta [tokens, heads], state [heads, key_dim, value_dim]");
    const py::ssize_t tokens = q.shape(0), heads = q.shape(1), dk = q.shape(2), dv = v.shape(2);
    check(k.shape(0) == tokens && k.shape(1) == heads && k.shape(2) == dk && v.shape(0) == tokens && v.shape(1) == heads &&
              g.shape(0) == tokens && g.shape(1) == heads && beta.shape(0) == tokens && beta.shape(1) == heads &&
              state.shape(0) == heads && state.shape(1) == dk && state.shape(2) == dv,
          "shapes of q, k, v, g, beta and state do not fit together");
    check(dk % 16 == 0 && dv % 16 == 0 && dk > 0 && dv > 0 && dk <= 1024 && dv <= 1024 && tokens < 1 << 24,
          "widths must be multiples of 16, at most 1024");
    py::array_t<float> out({tokens, heads, dv});
    float *o = out.mutable_data(), *s = state.mutable_data();
    const float *pq = q.data(), *pk = k.data(), *pv = v.data(), *pg = g.data(), *pb = beta.data();
    if (tokens == 0) return out;
    NoGil nogil;
    delta_rule(e, {pq, pk, pv, pg, pb}, s, o, static_cast<int>(tokens), static_cast<int>(heads), static_cast<int>(dk),
               static_cast<int>(dv));
    return out;
}
}  // namespace

void bind_delta(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    m.def("delta_rule", &rule_alone, py::arg("pool").none(false), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("g"),
          py::arg("beta"), py::arg("state").noconvert());
    py::class_<DeltaBlock>(m, "DeltaBlock")
        .def(py::init([](EnginePtr pool, SharedMatrix qkv, SharedMatrix z, SharedMatrix b, SharedMatrix a, SharedMatrix o,
                         const py::kwargs& fields) {
                 return std::make_unique<DeltaBlock>(pool, qkv, z, b, a, o, delta_config({"DeltaBlock", fields}));
             }),
             py::arg("pool").none(false), py::arg("qkv").none(false), py::arg("z").none(false), py::arg("b").none(false),
             py::arg("a").none(false), py::arg("o").none(false))
        .def(
            "forward",
            [](DeltaBlock& self, uintptr_t x, uintptr_t out, const Step& step, const std::vector<int32_t>& slots,
               uintptr_t conv, uintptr_t state, int64_t num_slots, const std::vector<std::pair<int32_t, int32_t>>& kept) {
                if (check_tokens(step.tokens()) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                const DeltaStates states{pointer(conv, "conv_ptr"), pointer(state, "state_ptr"), num_slots};
                std::vector<KeptState> keep;
                for (const auto& [slot, tokens] : kept) keep.push_back({slot, tokens});
                NoGil nogil;
                self.forward(in, o, step, slots, states, keep);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("slots"), py::arg("conv_ptr"),
            py::arg("state_ptr"), py::arg("num_slots"), py::arg("kept") = std::vector<std::pair<int32_t, int32_t>>());
}

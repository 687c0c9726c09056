// Bindings of the gated delta net: the block, and the recurrence alone.
#include "blocks/delta.h"

#include "bindings/common.h"

namespace {
Vector flat(const Floats& a) { return Vector(a.data(), a.data() + a.size()); }

py::array_t<float> delta_rule(Engine& e, const Floats& q, const Floats& k, const Floats& v, const Floats& g,
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
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    e.pool.reserve_local(delta_scratch(static_cast<int>(dk), static_cast<int>(dv)));
    const size_t qk_row = static_cast<size_t>(heads * dk), v_row = static_cast<size_t>(heads * dv);
    e.pool.run(static_cast<int>(heads), [&](int h, int thread) {
        const DeltaItem item{pq + h * dk, pk + h * dk, pv + h * dv, qk_row, v_row, pg + h, pb + h, static_cast<size_t>(heads),
                             s + h * dk * dv, o + h * dv, v_row,
                             static_cast<int>(tokens), static_cast<int>(dk), static_cast<int>(dv)};
        e.kernels.delta(item, e.pool.local(thread));
    });
    return out;
}
}  // namespace

void bind_delta(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    m.def("delta_rule", &delta_rule, py::arg("pool").none(false), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("g"),
          py::arg("beta"), py::arg("state").noconvert());
    py::class_<DeltaBlock>(m, "DeltaBlock")
        .def(py::init([](EnginePtr pool, SharedMatrix qkv, SharedMatrix z, SharedMatrix b, SharedMatrix a, SharedMatrix o,
                         int key_heads, int value_heads, int key_dim, int value_dim, int width, const Floats& conv,
                         const Floats& decay, const Floats& dt_bias, const Floats& out_norm, float out_eps,
                         const std::optional<Floats>& norm, float norm_eps, bool residual, bool exact) {
                 DeltaBlock::Config c{key_heads,  value_heads,   key_dim,        value_dim, width,
                                      flat(conv), flat(decay),   flat(dt_bias),  flat(out_norm), out_eps,
                                      to_vector(norm), norm_eps, residual,       exact};
                 return std::make_unique<DeltaBlock>(pool, qkv, z, b, a, o, std::move(c));
             }),
             py::arg("pool").none(false), py::arg("qkv").none(false), py::arg("z").none(false), py::arg("b").none(false),
             py::arg("a").none(false), py::arg("o").none(false), py::kw_only(), py::arg("key_heads"),
             py::arg("value_heads"), py::arg("key_dim"), py::arg("value_dim"), py::arg("width"), py::arg("conv"),
             py::arg("decay"), py::arg("dt_bias"), py::arg("out_norm"), py::arg("out_eps"),
             py::arg("norm") = py::none(), py::arg("norm_eps") = 0.0f, py::arg("residual") = true,
             py::arg("exact") = false)
        .def(
            "forward",
            [](DeltaBlock& self, uintptr_t x, uintptr_t out, const Step& step, const std::vector<int32_t>& slots,
               uintptr_t conv, uintptr_t state, int64_t num_slots) {
                if (check_tokens(step.tokens()) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                const DeltaStates states{pointer(conv, "conv_ptr"), pointer(state, "state_ptr"), num_slots};
                NoGil nogil;
                self.forward(in, o, step, slots, states);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("slots"), py::arg("conv_ptr"),
            py::arg("state_ptr"), py::arg("num_slots"));
}

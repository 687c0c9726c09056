// Binding of the latent attention block.
#include "blocks/mla.h"

#include "bindings/common.h"

void bind_mla(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    py::class_<MLABlock>(m, "MLABlock")
        .def(py::init([](EnginePtr pool, SharedMatrix q_a, SharedMatrix q, SharedMatrix kv_a, SharedMatrix k_absorb,
                         SharedMatrix k_expand, SharedMatrix v, SharedMatrix o, int heads, int nope, int rope, int value,
                         int latent, float softmax_scale, const std::string& pairing, const Floats& inv_freq,
                         float rope_scale, const std::optional<Floats>& norm, float norm_eps,
                         const std::optional<Floats>& q_norm, float q_eps, const Floats& kv_norm, float kv_eps,
                         bool residual, bool exact) {
                 MLABlock::Config c{heads,
                                    nope,
                                    rope,
                                    value,
                                    latent,
                                    softmax_scale,
                                    is_interleaved(pairing),
                                    to_vector(inv_freq),
                                    rope_scale,
                                    to_vector(norm),
                                    to_vector(q_norm),
                                    to_vector(kv_norm),
                                    norm_eps,
                                    q_eps,
                                    kv_eps,
                                    residual,
                                    exact};
                 return std::make_unique<MLABlock>(pool, MLABlock::Weights{q_a, q, kv_a, k_absorb, k_expand, v, o},
                                                   std::move(c));
             }),
             py::arg("pool").none(false), py::arg("q_a"), py::arg("q").none(false), py::arg("kv_a").none(false),
             py::arg("k_absorb").none(false), py::arg("k_expand").none(false), py::arg("v").none(false),
             py::arg("o").none(false), py::kw_only(), py::arg("heads"), py::arg("nope"), py::arg("rope"),
             py::arg("value"), py::arg("latent"), py::arg("softmax_scale"), py::arg("rope_pairing"), py::arg("inv_freq"),
             py::arg("rope_scale") = 1.0f, py::arg("norm") = py::none(), py::arg("norm_eps") = 0.0f,
             py::arg("q_norm") = py::none(), py::arg("q_eps") = 0.0f, py::arg("kv_norm"), py::arg("kv_eps"),
             py::arg("residual") = true, py::arg("exact") = false)
        .def(
            "forward",
            [](MLABlock& self, uintptr_t x, uintptr_t out, Step& step, uintptr_t pages, int64_t num_pages, int page_size,
               const std::string& kv_dtype) {
                const Cache cache = to_cache(pages, pages, num_pages, page_size, kv_dtype);
                if (check_tokens(step.tokens()) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                NoGil nogil;
                self.forward(in, o, step, cache);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("pages_ptr"), py::arg("num_pages"),
            py::arg("page_size"), py::arg("kv_dtype"));
}

// Binding of the latent attention block.
#include "blocks/mla.h"

#include "bindings/fields.h"
#include "bindings/temperature.h"

namespace {
MLABlock::Config mla_config(Fields f) {
    MLABlock::Config c{};
    c.heads = f.need<int>("heads");
    c.nope = f.need<int>("nope");
    c.rope = f.need<int>("rope");
    c.value = f.need<int>("value");
    c.latent = f.need<int>("latent");
    c.scale = f.need<float>("softmax_scale");
    c.interleaved = is_interleaved(f.need<std::string>("rope_pairing"));
    c.inv_freq = f.vector("inv_freq");
    c.rope_scale = f.take("rope_scale", 1.f);
    c.norm = f.vector("norm");
    c.norm_eps = f.take("norm_eps", 0.f);
    c.q_norm = f.vector("q_norm");
    c.q_eps = f.take("q_eps", 0.f);
    c.kv_norm = to_vector(f.need<Floats>("kv_norm"));
    c.kv_eps = f.need<float>("kv_eps");
    c.residual = f.take("residual", true);
    c.exact = f.take("exact", false);
    c.temperature = to_temperature(f);
    f.end();
    return c;
}

TokenIndexer::Config indexer_config(Fields f) {
    TokenIndexer::Config c{};
    c.heads = f.need<int>("heads");
    c.dim = f.need<int>("dim");
    c.rope = f.need<int>("rope");
    c.top_k = f.need<int>("top_k");
    c.pool = f.take("pool_tokens", 0);
    c.interleaved = is_interleaved(f.need<std::string>("rope_pairing"));
    c.inv_freq = f.vector("inv_freq");
    c.rope_scale = f.take("rope_scale", 1.f);
    c.k_norm = to_vector(f.need<Floats>("k_norm"));
    c.k_bias = to_vector(f.need<Floats>("k_bias"));
    c.eps = f.need<float>("eps");
    c.exact = f.take("exact", false);
    if (c.pool) c.ape = f.flat("ape");
    f.end();
    return c;
}
}  // namespace

void bind_mla(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    m.def(
        "choose_highest",
        [](const Floats& scores, int top_k) {
            check(scores.ndim() == 1 && scores.size() < 1 << 30 && top_k > 0, "scores must be a vector, top_k positive");
            py::array_t<int32_t> out(top_k);
            choose_highest(scores.data(), static_cast<int>(scores.size()), top_k, out.mutable_data());
            return out;
        },
        py::arg("scores"), py::arg("top_k"));
    py::class_<TokenIndexer>(m, "TokenIndexer")
        .def(py::init([](EnginePtr pool, SharedMatrix q, SharedMatrix k, SharedMatrix weights, SharedMatrix gate,
                         const py::kwargs& fields) {
                 return std::make_unique<TokenIndexer>(pool, q, k, weights, indexer_config({"TokenIndexer", fields}), gate);
             }),
             py::arg("pool").none(false), py::arg("q").none(false), py::arg("k").none(false), py::arg("weights").none(false),
             py::arg("gate") = nullptr);
    py::class_<MLABlock>(m, "MLABlock")
        .def(py::init([](EnginePtr pool, SharedMatrix q_a, SharedMatrix q, SharedMatrix kv_a, SharedMatrix k_absorb,
                         SharedMatrix k_expand, SharedMatrix v, SharedMatrix o, const py::kwargs& fields) {
                 return std::make_unique<MLABlock>(pool, MLABlock::Weights{q_a, q, kv_a, k_absorb, k_expand, v, o},
                                                   mla_config({"MLABlock", fields}));
             }),
             py::arg("pool").none(false), py::arg("q_a"), py::arg("q").none(false), py::arg("kv_a").none(false),
             py::arg("k_absorb").none(false), py::arg("k_expand").none(false), py::arg("v").none(false),
             py::arg("o").none(false))
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
            py::arg("page_size"), py::arg("kv_dtype"))
        .def(
            "forward_sparse",
            [](MLABlock& self, uintptr_t x, uintptr_t out, Step& step, uintptr_t pages, int64_t num_pages, int page_size,
               const std::string& kv_dtype, TokenIndexer* indexer, uintptr_t index_pages, uintptr_t chosen, int top_k,
               uintptr_t index_rows) {
                const Cache cache = to_cache(pages, pages, num_pages, page_size, kv_dtype);
                if (check_tokens(step.tokens()) == 0) return;
                check(top_k > 0 && (!indexer || indexer->width() == top_k), "top_k must be the indexer's width");
                const uintptr_t rows = index_rows ? index_rows : index_pages;
                check(!indexer || !indexer->config().pool || index_rows, "pooled keys need rows of tokens, too");
                const Cache keys = indexer ? to_cache(index_pages, rows, num_pages, page_size, kv_dtype) : Cache{};
                const MLABlock::Sparse sparse{indexer, keys, reinterpret_cast<int32_t*>(pointer(chosen, "chosen_ptr")), top_k};
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                NoGil nogil;
                self.forward(in, o, step, cache, &sparse);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("pages_ptr"), py::arg("num_pages"),
            py::arg("page_size"), py::arg("kv_dtype"), py::arg("indexer"), py::arg("index_pages_ptr"), py::arg("chosen_ptr"),
            py::arg("top_k"), py::arg("index_rows_ptr") = uintptr_t{0});
}

// Bindings of attention over a window and compressed entries.
#include "blocks/entries.h"

#include "bindings/fields.h"

namespace {
EntryRows to_rows(uintptr_t base, int64_t slots, int64_t pages, int page_size, const std::string& type) {
    check(slots > 0 && slots < 1 << 20 && pages >= 0 && pages < int64_t{1} << 31, "slots or pages are out of range");
    check(page_size > 0 && page_size <= 65536, "page_size must be 1 to 65536");
    return {pointer(base, "base_ptr"), parse_cache_type(type), slots, pages, page_size};
}
}  // namespace

void bind_entries(py::module_& m) {
    m.attr("STAGED_ROWS") = EntryAttention::kStaged;
    py::class_<EntryAttention>(m, "EntryAttention")
        .def(py::init([](EnginePtr pool, int heads, int dim, int window, int ratio, float scale, const Floats& sinks) {
                 return std::make_unique<EntryAttention>(pool,
                                                         EntryAttention::Config{heads, dim, window, ratio, scale, to_vector(sinks)});
             }),
             py::arg("pool").none(false), py::kw_only(), py::arg("heads"), py::arg("dim"), py::arg("window"), py::arg("ratio"),
             py::arg("scale"), py::arg("sinks"))
        .def(
            "forward",
            [](EntryAttention& self, Step& step, const std::vector<int32_t>& slots, uintptr_t q, uintptr_t k, uintptr_t out,
               uintptr_t base, int64_t num_slots, int64_t num_pages, int page_size, const std::string& kv_dtype,
               uintptr_t chosen, int top_k) {
                if (check_tokens(step.tokens()) == 0) return;
                const EntryRows rows = to_rows(base, num_slots, num_pages, page_size, kv_dtype);
                check(top_k >= 0 && (chosen != 0) == (top_k > 0), "chosen goes with top_k");
                const float *in = pointer(q, "q_ptr"), *keys = pointer(k, "k_ptr");
                float* o = pointer(out, "out_ptr");
                const int32_t* named = chosen ? reinterpret_cast<const int32_t*>(pointer(chosen, "chosen_ptr")) : nullptr;
                NoGil nogil;
                self.forward(step, slots, in, keys, o, rows, named, top_k);
            },
            py::arg("step"), py::arg("slots"), py::arg("q_ptr"), py::arg("k_ptr"), py::arg("out_ptr"), py::arg("base_ptr"),
            py::arg("num_slots"), py::arg("num_pages"), py::arg("page_size"), py::arg("kv_dtype"), py::arg("chosen_ptr"),
            py::arg("top_k"));
    m.def(
        "store_rows",
        [](Engine& e, uintptr_t values, int count, int dim, const std::vector<int64_t>& rows, uintptr_t base, int64_t num_rows,
           const std::string& kv_dtype) {
            check(count >= 0 && static_cast<size_t>(count) == rows.size() && dim > 0 && dim <= 1024, "rows do not fit the values");
            for (int64_t row : rows) check(row >= 0 && row < num_rows, "a row was not allocated");
            if (!count) return;
            const float* in = pointer(values, "values_ptr");
            void* to = pointer(base, "base_ptr");
            const CacheType type = parse_cache_type(kv_dtype);
            NoGil nogil;
            store_rows(e, in, count, dim, rows, to, type);
        },
        py::arg("pool").none(false), py::arg("values_ptr"), py::arg("count"), py::arg("dim"), py::arg("rows"),
        py::arg("base_ptr"), py::arg("num_rows"), py::arg("kv_dtype"));
    m.def(
        "choose_entries",
        [](Engine& e, Step& step, uintptr_t q, uintptr_t weights, uintptr_t out, int heads, int dim, int ratio, int top_k,
           uintptr_t pages, int64_t num_pages, int page_size, const std::string& kv_dtype) {
            check(heads > 0 && heads <= 1024 && dim > 0 && dim <= 1024 && top_k > 0, "heads, dim or top_k are out of range");
            check(ratio > 0 && page_size > 0 && page_size % ratio == 0, "pages must hold whole windows");
            if (check_tokens(step.tokens()) == 0) return;
            step.check_pages(num_pages, page_size);
            const Cache keys = to_cache(pages, pages, num_pages, page_size / ratio, kv_dtype);
            const EntryChoice c{heads, dim, ratio, top_k, pointer(q, "q_ptr"), pointer(weights, "weights_ptr")};
            int32_t* o = reinterpret_cast<int32_t*>(pointer(out, "out_ptr"));
            NoGil nogil;
            static thread_local Memory scores;
            choose_entries(e, c, step, keys, o, scores);
        },
        py::arg("pool").none(false), py::arg("step"), py::arg("q_ptr"), py::arg("weights_ptr"), py::arg("out_ptr"),
        py::arg("heads"), py::arg("dim"), py::arg("ratio"), py::arg("top_k"), py::arg("pages_ptr"), py::arg("num_pages"),
        py::arg("page_size"), py::arg("kv_dtype"));
}

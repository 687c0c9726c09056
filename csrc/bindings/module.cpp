// The Python module ktcore_cpu._native. Buffers of activations and cache pages cross as addresses; every shape is
// checked here or in the blocks before any kernel runs, and the GIL is released while one does.
#include "bindings/clamp.h"
#include "bindings/common.h"
#include "bindings/fields.h"
#include "bindings/lane.h"
#include "bindings/numa.h"
#include "bindings/temperature.h"
#include "blocks/attention.h"
#include "blocks/limits.h"
#include "blocks/mlp.h"
#include "blocks/switch.h"
#include "core/raw_blocks.h"

namespace {

void bind_weights(py::module_& m) {
    py::class_<Engine, EnginePtr>(m, "Pool")
        .def(py::init([](int threads, const std::optional<std::vector<int>>& cpus) {
                 return std::make_shared<Engine>(threads, cpus.value_or(std::vector<int>{}));
             }),
             py::arg("threads") = 0, py::arg("cpus") = py::none())
        .def_property_readonly("threads", [](const Engine& e) { return e.pool.threads(); })
        .def_property_readonly("shares",
                               [](Engine& e) {
                                   py::gil_scoped_release release;
                                   std::lock_guard<std::mutex> hold(e.pool.mutex());
                                   return e.pool.shares();
                               })
        .def_property_readonly("few",
                               [](const Engine& e) {
                                   py::dict few;
                                   for (int f = 0; f < kFormatCount; f++) few[kFormats[f].name] = e.few[f].load();
                                   return few;
                               })
        .def("set_few", &set_few, py::arg("format"), py::arg("tokens"))
        .def_property_readonly("ahead",
                               [](const Engine& e) {
                                   py::dict ahead;
                                   for (int f = 0; f < kFormatCount; f++) ahead[kFormats[f].name] = e.ahead[f].load();
                                   return ahead;
                               })
        .def("set_ahead", &set_ahead, py::arg("format"), py::arg("bytes"))
        .def(
            "measure_ahead",
            [](Engine& e, const std::string& format) {
                const Format f = parse_format(format);
                NoGil nogil;
                return measure_ahead(e, f);
            },
            py::arg("format"))
        .def(
            "measure_few",
            [](Engine& e, const std::string& format) {
                const Format f = parse_format(format);
                NoGil nogil;
                return measure_few(e, f);
            },
            py::arg("format"));

    py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(m, "PackedMatrix")
        .def_static(
            "pack",
            [](Engine& e, const std::string& format, int64_t rows, int64_t cols, const py::buffer& raw) {
                const py::buffer_info b = contiguous_bytes(raw);
                NoGil nogil;
                std::lock_guard<std::mutex> hold(e.pool.mutex());
                return std::const_pointer_cast<PackedMatrix>(PackedMatrix::pack(
                    e.pool, format, rows, cols, static_cast<const uint8_t*>(b.ptr), static_cast<size_t>(b.size)));
            },
            py::arg("pool"), py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("raw"))
        .def_static(
            "borrow",
            [](const std::string& format, int64_t rows, int64_t cols, const py::buffer& packed) {
                const py::buffer_info b = contiguous_bytes(packed);
                return std::const_pointer_cast<PackedMatrix>(
                    PackedMatrix::borrow(format, rows, cols, static_cast<const uint8_t*>(b.ptr),
                                         static_cast<size_t>(b.size), keep_alive(packed)));
            },
            py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("packed"))
        .def_static("packed_bytes", &PackedMatrix::packed_bytes, py::arg("format"), py::arg("rows"), py::arg("cols"))
        .def_property_readonly("packed",
                               [](const py::object& self) {
                                   const auto& w = self.cast<const PackedMatrix&>();
                                   return as_array(w.view().data, w.nbytes(), self);
                               })
        .def_property_readonly("format", [](const PackedMatrix& w) { return info(w.view().format).name; })
        .def_property_readonly("rows", [](const PackedMatrix& w) { return w.view().rows; })
        .def_property_readonly("cols", [](const PackedMatrix& w) { return w.view().cols; })
        .def_property_readonly("nbytes", &PackedMatrix::nbytes)
        .def("dequantize", [](const PackedMatrix& w) {
            py::array_t<float> out({py::ssize_t{w.view().rows}, py::ssize_t{w.view().cols}});
            float* p = out.mutable_data();
            {
                NoGil nogil;
                w.dequantize(select_kernels(), p);
            }
            return out;
        });
}

AttentionBlock::Config attention_config(Fields f) {
    AttentionBlock::Config c{};
    c.shape.heads = f.need<int>("heads");
    c.shape.kv_heads = f.need<int>("kv_heads");
    c.shape.head_dim = f.need<int>("head_dim");
    c.shape.scale = f.need<float>("softmax_scale");
    c.shape.window = f.take("window", 0);
    c.shape.chunk = f.take("chunk", 0);
    c.interleaved = is_interleaved(f.need<std::string>("rope_pairing"));
    if (const auto freq = f.need<Floats>("inv_freq"); freq.size()) c.inv_freq = to_vector(freq);
    c.rope_scale = f.take("rope_scale", 1.f);
    c.norm = f.vector("norm");
    c.norm_eps = f.take("norm_eps", 0.f);
    c.q_norm = f.vector("q_norm");
    c.k_norm = f.vector("k_norm");
    c.qk_eps = f.take("qk_eps", 0.f);
    c.norm_after_rope = f.take("norm_after_rope", false);
    c.q_bias = f.vector("q_bias");
    c.k_bias = f.vector("k_bias");
    c.v_bias = f.vector("v_bias");
    c.o_bias = f.vector("o_bias");
    c.sinks = f.vector("sinks");
    c.temperature = to_temperature(f);
    c.norm_whole = f.take("norm_whole", false);
    c.gate = f.take<std::shared_ptr<PackedMatrix>>("gate", nullptr);
    c.shape.value_dim = f.take("value_dim", 0);
    c.v_norm = f.vector("v_norm");
    c.v_eps = f.take("v_eps", 0.f);
    c.value_scale = f.take("value_scale", 1.f);
    c.residual = f.take("residual", true);
    c.exact = f.take("exact", false);
    f.end();
    return c;
}

void bind_blocks(py::module_& m) {
    using SharedMatrix = std::shared_ptr<PackedMatrix>;
    py::class_<Step>(m, "Step")
        .def(py::init([](const Ints& positions, const Ints& q_start, const Ints& context_lens, const Ints& block_table) {
                 check(block_table.ndim() == 2 && block_table.shape(0) == context_lens.size(),
                       "block_table must be [sequences, max_blocks]");
                 return std::make_unique<Step>(to_ints(positions, 1, "positions"), to_ints(q_start, 1, "q_start"),
                                               to_ints(context_lens, 1, "context_lens"),
                                               to_ints(block_table, 2, "block_table"), block_table.shape(1));
             }),
             py::arg("positions"), py::arg("q_start"), py::arg("context_lens"), py::arg("block_table"))
        .def_property_readonly("tokens", &Step::tokens)
        .def_property_readonly("sequences", &Step::sequences);

    py::class_<AttentionBlock>(m, "AttentionBlock")
        .def(py::init([](EnginePtr pool, SharedMatrix q, SharedMatrix k, SharedMatrix v, SharedMatrix o,
                         const py::kwargs& fields) {
                 return std::make_unique<AttentionBlock>(pool, q, k, v, o, attention_config({"AttentionBlock", fields}));
             }),
             py::arg("pool").none(false), py::arg("q").none(false), py::arg("k").none(false), py::arg("v").none(false),
             py::arg("o").none(false))
        .def(
            "forward",
            [](AttentionBlock& self, uintptr_t x, uintptr_t out, Step& step, uintptr_t k, uintptr_t v,
               int64_t num_pages, int page_size, const std::string& kv_dtype) {
                const Cache cache = to_cache(k, v, num_pages, page_size, kv_dtype);
                if (check_tokens(step.tokens()) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                NoGil nogil;
                self.forward(in, o, step, cache);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("k_pages_ptr"), py::arg("v_pages_ptr"),
            py::arg("num_pages"), py::arg("page_size"), py::arg("kv_dtype"));

    py::class_<MLPBlock>(m, "MLPBlock")
        .def(py::init([](EnginePtr pool, SharedMatrix gate, SharedMatrix up, SharedMatrix down,
                         const std::optional<Floats>& norm, float norm_eps, const std::string& activation,
                         bool residual, bool exact, const ClampArgs& clamp) {
                 return std::make_unique<MLPBlock>(pool, gate, up, down, to_vector(norm), norm_eps, activation,
                                                   residual, exact, to_clamp(clamp));
             }),
             py::arg("pool").none(false), py::arg("gate").none(false), py::arg("up").none(false),
             py::arg("down").none(false), py::arg("norm") = py::none(), py::arg("norm_eps") = 0.0f,
             py::arg("activation") = "silu", py::arg("residual") = true, py::arg("exact") = false,
             py::arg("clamp") = py::none())
        .def(
            "forward",
            [](MLPBlock& self, uintptr_t x, uintptr_t out, int64_t tokens) {
                if (check_tokens(tokens) == 0) return;
                const float* in = pointer(x, "x_ptr");
                float* o = pointer(out, "out_ptr");
                NoGil nogil;
                self.forward(in, o, tokens);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("tokens"));
}

void bind_functions(py::module_& m) {
    m.def("linear",
          [](Engine& e, const PackedMatrix& w, uintptr_t x, uintptr_t out, int64_t tokens, uintptr_t bias, bool exact) {
              if (check_tokens(tokens) == 0) return;
              const float* in = pointer(x, "x_ptr");
              float* o = pointer(out, "out_ptr");
              const float* b = bias ? pointer(bias, "bias_ptr") : nullptr;
              NoGil nogil;
              linear(e, w, in, o, tokens, b, exact);
          },
          py::arg("pool"), py::arg("w"), py::arg("x_ptr"), py::arg("out_ptr"), py::arg("tokens"),
          py::arg("bias_ptr") = 0, py::arg("exact") = false);

    m.def("rms_norm",
          [](Engine& e, uintptr_t x, const Floats& weight, float eps, uintptr_t out, int64_t tokens) {
              const int n = check_tokens(tokens);
              if (n == 0) return;
              const Vector w = to_vector(weight);
              const float* in = pointer(x, "x_ptr");
              float* o = pointer(out, "out_ptr");
              NoGil nogil;
              rms_norm(e, in, w, eps, o, n);
          },
          py::arg("pool"), py::arg("x_ptr"), py::arg("weight"), py::arg("eps"), py::arg("out_ptr"), py::arg("tokens"));

    m.def("dequantize_rows",
          [](const std::string& format, uintptr_t raw, int64_t row_bytes, int64_t num_rows, int64_t cols,
             const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& ids, uintptr_t out) {
              const Format f = parse_format(format);
              const FormatInfo& t = info(f);
              check(cols > 0 && cols % t.block == 0 && cols < 1 << 30 && row_bytes == cols / t.block * t.block_bytes,
                    format + ": row_bytes " + std::to_string(row_bytes) + " do not hold " + std::to_string(cols) + " columns");
              check(raw != 0, "raw_ptr must not be null");
              if (ids.size() == 0) return;
              float* o = pointer(out, "out_ptr");
              NoGil nogil;
              raw_dequantize_rows(f, reinterpret_cast<const uint8_t*>(raw), num_rows, static_cast<int>(cols), ids.data(),
                                  ids.size(), o);
          },
          py::arg("format"), py::arg("raw_ptr"), py::arg("row_bytes"), py::arg("num_rows"), py::arg("cols"),
          py::arg("ids"), py::arg("out_ptr"));

    m.def("read_bandwidth",
          [](Engine& e, double seconds) {
              check(seconds > 0 && seconds <= 60, "seconds must be above 0, at most 60");
              NoGil nogil;
              return read_bandwidth(e, seconds);
          },
          py::arg("pool"), py::arg("seconds") = 0.3);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels for quantised linear layers, attention and feed-forward blocks.";
    m.def("isa_supported", &isa_supported);
    m.def("isa_emulated", &isa_emulated);
    m.def("isa_selected", [] { return std::string(select_kernels().name); });
    m.def("cpu_flags", &cpu_flags);
    m.def("cpu_quota", &cpu_quota, py::arg("root") = "");
    m.def("default_threads", &default_threads, py::arg("root") = "");
    m.def("formats", [] {
        py::dict d;
        for (const FormatInfo& f : kFormats) d[f.name] = py::make_tuple(f.block, f.block_bytes);
        return d;
    });
    m.def("packed_growth", [](const std::string& format) {
        const FormatInfo& f = info(parse_format(format));
        return packed_block_bytes(f) / (static_cast<double>(kPanelRows) * f.packed_k / f.block * f.block_bytes);
    }, py::arg("format"));
    m.def("prefer_huge_pages", [](uintptr_t data, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(data), bytes); },
          py::arg("ptr"), py::arg("bytes"));
    m.def("cache_row_bytes", [](const std::string& kv_dtype, int width) {
        check(width > 0 && width <= 1 << 20, "width must be positive");
        return cache_row_bytes(parse_cache_type(kv_dtype), width);
    });
    m.attr("MOST_FEW") = kMostFew;
    m.attr("MOST_AHEAD") = kMostAhead;
    bind_weights(m);
    bind_blocks(m);
    bind_delta(m);
    bind_entries(m);
    bind_kda(m);
    bind_streams(m);
    bind_experts(m);
    bind_limits(m);
    bind_mla(m);
    bind_functions(m);
    bind_lane(m);
    bind_numa(m);
}

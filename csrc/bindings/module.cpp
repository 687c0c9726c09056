// The Python module ktcore_cpu._native. Buffers of activations and cache pages cross as addresses; every shape is
// checked here or in the blocks before any kernel runs, and the GIL is released while one does.
#include "bindings/common.h"
#include "bindings/lane.h"
#include "bindings/numa.h"
#include "blocks/attention.h"
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
        .def_property_readonly("few",
                               [](const Engine& e) {
                                   py::dict few;
                                   for (int f = 0; f < kFormatCount; f++) few[kFormats[f].name] = e.few[f].load();
                                   return few;
                               })
        .def("set_few", &set_few, py::arg("format"), py::arg("tokens"))
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
        .def(py::init([](EnginePtr pool, SharedMatrix q, SharedMatrix k, SharedMatrix v, SharedMatrix o, int heads,
                         int kv_heads, int head_dim, const std::string& pairing, const Floats& inv_freq,
                         float rope_scale, float softmax_scale, const std::optional<Floats>& norm, float norm_eps,
                         const std::optional<Floats>& q_norm, const std::optional<Floats>& k_norm, float qk_eps,
                         const std::optional<Floats>& q_bias, const std::optional<Floats>& k_bias,
                         const std::optional<Floats>& v_bias, const std::optional<Floats>& o_bias, int window,
                         bool residual, bool exact, int chunk, const std::optional<Floats>& sinks,
                         float temperature_scale, float temperature_span, bool norm_after_rope, SharedMatrix gate) {
                 AttentionBlock::Config c{{heads, kv_heads, head_dim, softmax_scale, window, 0, 0, 0, chunk, nullptr},
                                          is_interleaved(pairing),
                                          inv_freq.size() ? to_vector(inv_freq) : Vector{},
                                          rope_scale,
                                          to_vector(norm),
                                          to_vector(q_norm),
                                          to_vector(k_norm),
                                          norm_eps,
                                          qk_eps,
                                          to_vector(q_bias),
                                          to_vector(k_bias),
                                          to_vector(v_bias),
                                          to_vector(o_bias),
                                          residual,
                                          exact,
                                          norm_after_rope,
                                          to_vector(sinks),
                                          temperature_scale,
                                          temperature_span,
                                          gate};
                 return std::make_unique<AttentionBlock>(pool, q, k, v, o, std::move(c));
             }),
             py::arg("pool").none(false), py::arg("q").none(false), py::arg("k").none(false), py::arg("v").none(false),
             py::arg("o").none(false), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("rope_pairing"), py::arg("inv_freq"), py::arg("rope_scale") = 1.0f, py::arg("softmax_scale"),
             py::arg("norm") = py::none(), py::arg("norm_eps") = 0.0f, py::arg("q_norm") = py::none(),
             py::arg("k_norm") = py::none(), py::arg("qk_eps") = 0.0f, py::arg("q_bias") = py::none(),
             py::arg("k_bias") = py::none(), py::arg("v_bias") = py::none(), py::arg("o_bias") = py::none(),
             py::arg("window") = 0, py::arg("residual") = true, py::arg("exact") = false, py::arg("chunk") = 0,
             py::arg("sinks") = py::none(), py::arg("temperature_scale") = 0.0f, py::arg("temperature_span") = 0.0f,
             py::arg("norm_after_rope") = false, py::arg("gate") = py::none())
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
                         bool residual, bool exact) {
                 return std::make_unique<MLPBlock>(pool, gate, up, down, to_vector(norm), norm_eps, activation,
                                                   residual, exact);
             }),
             py::arg("pool").none(false), py::arg("gate").none(false), py::arg("up").none(false),
             py::arg("down").none(false), py::arg("norm") = py::none(), py::arg("norm_eps") = 0.0f,
             py::arg("activation") = "silu", py::arg("residual") = true, py::arg("exact") = false)
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
              std::lock_guard<std::mutex> hold(e.pool.mutex());
              const int cols = static_cast<int>(w.size());
              e.pool.run(n, [&](int t, int) {
                  const size_t at = static_cast<size_t>(t) * cols;
                  e.kernels.rms_norm(in + at, cols, w.data(), eps, o + at, cols);
              });
          },
          py::arg("pool"), py::arg("x_ptr"), py::arg("weight"), py::arg("eps"), py::arg("out_ptr"), py::arg("tokens"));

    m.def("rope",
          [](Engine& e, uintptr_t x, Step& step, int heads, int head_dim, const std::string& pairing,
             const Floats& inv_freq, float scale) {
              const bool interleaved = is_interleaved(pairing);
              const Vector f = to_vector(inv_freq);
              check(heads > 0 && head_dim > 0 && 2 * f.size() <= static_cast<size_t>(head_dim),
                    "inv_freq is longer than half of head_dim");
              if (step.tokens() == 0) return;
              float* p = pointer(x, "x_ptr");
              NoGil nogil;
              std::lock_guard<std::mutex> hold(e.pool.mutex());
              const float* turns = step.rotations(f, scale);
              e.pool.run(step.tokens(), [&](int t, int) {
                  const float* turn = turns + static_cast<size_t>(t) * 2 * f.size();
                  for (int h = 0; h < heads; h++)
                      e.kernels.rope(p + (static_cast<size_t>(t) * heads + h) * head_dim, static_cast<int>(2 * f.size()),
                                     turn, turn + f.size(), interleaved);
              });
          },
          py::arg("pool"), py::arg("x_ptr"), py::arg("step"), py::arg("heads"), py::arg("head_dim"),
          py::arg("rope_pairing"), py::arg("inv_freq"), py::arg("rope_scale") = 1.0f);

    m.def("attend",
          [](Engine& e, uintptr_t q, uintptr_t out, Step& step, int heads, int kv_heads, int head_dim, float scale,
             uintptr_t k, uintptr_t v, int64_t num_pages, int page_size, const std::string& kv_dtype, int window) {
              check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && head_dim > 0 && head_dim <= 1024 && window >= 0,
                    "heads must be a multiple of kv_heads, head_dim 1 to 1024, window not negative");
              const Cache cache = to_cache(k, v, num_pages, page_size, kv_dtype);
              if (step.tokens() == 0) return;
              const float* in = pointer(q, "q_ptr");
              float* o = pointer(out, "out_ptr");
              NoGil nogil;
              std::lock_guard<std::mutex> hold(e.pool.mutex());
              step.check_pages(num_pages, page_size);
              AttendPlan plan;
              attend(e, {heads, kv_heads, head_dim, scale, window}, step, cache, in, o, plan);
          },
          py::arg("pool"), py::arg("q_ptr"), py::arg("out_ptr"), py::arg("step"), py::arg("heads"), py::arg("kv_heads"),
          py::arg("head_dim"), py::arg("softmax_scale"), py::arg("k_pages_ptr"), py::arg("v_pages_ptr"),
          py::arg("num_pages"), py::arg("page_size"), py::arg("kv_dtype"), py::arg("window") = 0);

    m.def("dequantize_rows",
          [](const std::string& format, uintptr_t raw, int64_t row_bytes, int64_t num_rows, int64_t cols,
             const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& ids, uintptr_t out) {
              const Format f = parse_format(format);
              const FormatInfo& t = info(f);
              check(cols > 0 && cols % t.block == 0 && cols < 1 << 30 && row_bytes == cols / t.block * t.block_bytes,
                    format + ": row_bytes " + std::to_string(row_bytes) + " do not hold " + std::to_string(cols) + " columns");
              check(raw != 0, "raw_ptr must not be null");
              const int64_t* id = ids.data();
              const int64_t n = ids.size();
              for (int64_t i = 0; i < n; i++)
                  check(id[i] >= 0 && id[i] < num_rows, "row " + std::to_string(id[i]) + " is not one of " +
                                                            std::to_string(num_rows));
              if (n == 0) return;
              float* o = pointer(out, "out_ptr");
              NoGil nogil;
              for (int64_t i = 0; i < n; i++)
                  raw_dequantize(f, reinterpret_cast<const uint8_t*>(raw) + id[i] * row_bytes, static_cast<int>(cols),
                                 o + i * cols);
          },
          py::arg("format"), py::arg("raw_ptr"), py::arg("row_bytes"), py::arg("num_rows"), py::arg("cols"),
          py::arg("ids"), py::arg("out_ptr"));

    m.def("read_bandwidth",
          [](Engine& e, double seconds) {
              check(seconds > 0 && seconds <= 60, "seconds must be above 0, at most 60");
              NoGil nogil;
              std::lock_guard<std::mutex> hold(e.pool.mutex());
              constexpr size_t kPiece = size_t{1} << 20, kPieces = 512;
              Memory buffer(kPiece * kPieces);
              std::atomic<uint64_t> sink{0};
              e.pool.run(kPieces, [&](int i, int) {
                  uint8_t* p = buffer.data() + static_cast<size_t>(i) * kPiece;
                  for (size_t k = 0; k < kPiece; k += 4096) p[k] = 1;  // really mapped, not the zero page
              });
              double best = 0;
              const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
              do {
                  const int64_t start = now_ns();
                  e.pool.run(kPieces, [&](int i, int) {
                      sink += e.kernels.read_sum(buffer.data() + static_cast<size_t>(i) * kPiece, kPiece);
                  });
                  const double took = static_cast<double>(now_ns() - start) * 1e-9;
                  best = std::max(best, static_cast<double>(kPiece * kPieces) / took);
              } while (now_ns() < end);
              return best;
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
    m.def("formats", [] {
        py::dict d;
        for (const FormatInfo& f : kFormats) d[f.name] = py::make_tuple(f.block, f.block_bytes);
        return d;
    });
    m.def("packed_growth", [](const std::string& format) {
        const FormatInfo& f = info(parse_format(format));
        return packed_block_bytes(f) / (static_cast<double>(kPanelRows) * f.packed_k / f.block * f.block_bytes);
    }, py::arg("format"));
    m.def("cache_row_bytes", [](const std::string& kv_dtype, int width) {
        check(width > 0 && width <= 1 << 20, "width must be positive");
        return cache_row_bytes(parse_cache_type(kv_dtype), width);
    });
    m.attr("MOST_FEW") = kMostFew;
    bind_weights(m);
    bind_blocks(m);
    bind_delta(m);
    bind_experts(m);
    bind_limits(m);
    bind_mla(m);
    bind_functions(m);
    bind_lane(m);
    bind_numa(m);
}

// Bindings of the mixture-of-experts blocks.
#include "bindings/clamp.h"
#include "bindings/fields.h"
#include "blocks/moe.h"

namespace {

using SharedMatrix = std::shared_ptr<PackedMatrix>;

const int64_t* ids_pointer(uintptr_t address) {
    check(address != 0 && address % 8 == 0, "ids_ptr must be a non-null address aligned to 8 bytes");
    return reinterpret_cast<const int64_t*>(address);
}

void check_top_k(int64_t tokens, int64_t top_k) {
    check(top_k > 0 && tokens * top_k < int64_t{1} << 31, "top_k must be positive, tokens * top_k below 2^31");
}

// Any number of dimensions, flat; empty where there is none.
Vector to_flat(const std::optional<Floats>& a) {
    return a ? Vector(a->data(), a->data() + a->size()) : Vector{};
}

RouterConfig router_config(const py::dict& d) {
    const std::string score = py::cast<std::string>(d["score"]), group_score = py::cast<std::string>(d["group_score"]);
    check(score == "softmax" || score == "sigmoid", "unknown score '" + score + "'; known: softmax, sigmoid");
    check(group_score == "max" || group_score == "top2_sum", "unknown group_score '" + group_score + "'; known: max, top2_sum");
    return {py::cast<int>(d["experts"]),
            py::cast<int>(d["top_k"]),
            score == "sigmoid",
            to_vector(py::cast<std::optional<Floats>>(d["bias"])),
            py::cast<int>(d["groups"]),
            py::cast<int>(d["groups_kept"]),
            group_score == "top2_sum",
            py::cast<bool>(d["renormalise"]),
            py::cast<float>(d["renorm_eps"]),
            py::cast<float>(d["scale"]),
            d.contains("logit_bias") ? to_vector(py::cast<std::optional<Floats>>(d["logit_bias"])) : Vector{},
            d.contains("on_logits") && py::cast<bool>(d["on_logits"]),
            d.contains("root_softplus") && py::cast<bool>(d["root_softplus"])};
}

void bind_bank(py::module_& m) {
    py::class_<ExpertBank, Bank>(m, "ExpertBank")
        .def(py::init<int64_t, int64_t, int64_t, const std::string&, const std::string&, const std::string&>(),
             py::arg("experts"), py::arg("hidden"), py::arg("intermediate"), py::arg("gate_format"), py::arg("up_format"),
             py::arg("down_format"))
        .def(
            "pack",
            [](ExpertBank& bank, Engine& e, int64_t expert, const py::buffer& gate, const py::buffer& up,
               const py::buffer& down) {
                const py::buffer_info b[3] = {contiguous_bytes(gate), contiguous_bytes(up), contiguous_bytes(down)};
                ExpertBank::Raw raw[3];
                for (int i = 0; i < 3; i++) raw[i] = {static_cast<const uint8_t*>(b[i].ptr), static_cast<size_t>(b[i].size)};
                NoGil nogil;
                std::lock_guard<std::mutex> hold(e.pool.mutex());
                bank.pack(e.pool, expert, raw[0], raw[1], raw[2]);
            },
            py::arg("pool"), py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
        .def_static(
            "borrow",
            [](int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
               const std::string& down, const py::buffer& packed) {
                const py::buffer_info b = contiguous_bytes(packed);
                return std::make_shared<ExpertBank>(experts, hidden, ffn, gate, up, down,
                                                    static_cast<const uint8_t*>(b.ptr), static_cast<size_t>(b.size),
                                                    keep_alive(packed));
            },
            py::arg("experts"), py::arg("hidden"), py::arg("intermediate"), py::arg("gate_format"), py::arg("up_format"),
            py::arg("down_format"), py::arg("packed"))
        .def_static("expert_bytes", &ExpertBank::expert_bytes, py::arg("hidden"), py::arg("intermediate"),
                    py::arg("gate_format"), py::arg("up_format"), py::arg("down_format"))
        .def_property_readonly("contents",
                               [](const py::object& self) {
                                   const auto& bank = self.cast<const ExpertBank&>();
                                   return as_array(bank.expert(0).gate.data, bank.nbytes(), self);
                               })
        .def(
            "set_biases",
            [](ExpertBank& bank, const std::optional<Floats>& gate, const std::optional<Floats>& up,
               const std::optional<Floats>& down) { bank.set_biases(to_flat(gate), to_flat(up), to_flat(down)); },
            py::arg("gate"), py::arg("up"), py::arg("down"))
        .def_property_readonly("experts", &ExpertBank::experts)
        .def_property_readonly("load",
                               [](const ExpertBank& bank) {
                                   py::array_t<int64_t> out(bank.experts());
                                   for (int e = 0; e < bank.experts(); e++)
                                       out.mutable_at(e) = static_cast<int64_t>(bank.noted(e));
                                   return out;
                               })
        .def_property_readonly("packed", &ExpertBank::packed)
        .def_property_readonly("nbytes", &ExpertBank::nbytes);
}

void bind_routed(py::module_& m) {
    py::class_<RouterBlock>(m, "RouterBlock")
        .def(py::init([](EnginePtr pool, SharedMatrix weight, const py::dict& config) {
                 return std::make_unique<RouterBlock>(pool, weight, router_config(config));
             }),
             py::arg("pool").none(false), py::arg("weight").none(false), py::arg("config"))
        .def(
            "forward",
            [](RouterBlock& self, uintptr_t x, uintptr_t ids, uintptr_t weights, int64_t tokens) {
                if (check_tokens(tokens) == 0) return;
                const float* in = pointer(x, "x_ptr");
                int64_t* i = const_cast<int64_t*>(ids_pointer(ids));
                float* w = pointer(weights, "weights_ptr");
                NoGil nogil;
                self.forward(in, i, w, tokens);
            },
            py::arg("x_ptr"), py::arg("ids_ptr"), py::arg("weights_ptr"), py::arg("tokens"));

    py::class_<ExpertsBlock>(m, "ExpertsBlock")
        .def(py::init([](EnginePtr pool, Bank bank, const std::string& activation, bool weight_on_input, bool exact,
                         const ClampArgs& clamp) {
                 return std::make_unique<ExpertsBlock>(pool, bank, activation, weight_on_input, exact, to_clamp(clamp));
             }),
             py::arg("pool").none(false), py::arg("bank").none(false), py::arg("activation") = "silu",
             py::arg("weight_on_input") = false, py::arg("exact") = false, py::arg("clamp") = py::none())
        .def(
            "forward",
            [](ExpertsBlock& self, uintptr_t x, uintptr_t ids, uintptr_t weights, uintptr_t out, int64_t tokens,
               int64_t top_k) {
                if (check_tokens(tokens) == 0) return;
                check_top_k(tokens, top_k);
                const float *in = pointer(x, "x_ptr"), *w = pointer(weights, "weights_ptr");
                const int64_t* i = ids_pointer(ids);
                float* o = pointer(out, "out_ptr");
                check(o != in, "out must not be x");
                NoGil nogil;
                self.forward(in, i, w, o, tokens, top_k);
            },
            py::arg("x_ptr"), py::arg("ids_ptr"), py::arg("weights_ptr"), py::arg("out_ptr"), py::arg("tokens"),
            py::arg("top_k"));
}

void bind_moe(py::module_& m) {
    py::class_<MoEBlock>(m, "MoEBlock")
        .def(py::init([](EnginePtr pool, Bank bank, SharedMatrix router, const py::dict& config, const py::kwargs& fields) {
                 Fields f("MoEBlock", fields);
                 const auto shared = [&f](const char* name) { return f.take<SharedMatrix>(name, nullptr); };
                 const SharedMatrix gate_proj = shared("shared_gate_proj"), up = shared("shared_up"),
                                    down = shared("shared_down"), gate = shared("shared_gate");
                 MoEBlock::Config c{};
                 c.router = router_config(config);
                 c.norm = f.vector("norm");
                 c.norm_eps = f.take("norm_eps", 0.f);
                 c.activation = f.take<std::string>("activation", "silu");
                 c.weight_on_input = f.take("weight_on_input", false);
                 c.residual = f.take("residual", true);
                 c.exact = f.take("exact", false);
                 c.clamp = to_clamp(f.take<ClampArgs>("clamp", std::nullopt));
                 c.shared_clamp = to_clamp(f.take<ClampArgs>("shared_clamp", std::nullopt));
                 f.end();
                 return std::make_unique<MoEBlock>(pool, bank, router, gate_proj, up, down, gate, std::move(c));
             }),
             py::arg("pool").none(false), py::arg("bank").none(false), py::arg("router").none(false), py::arg("config"))
        .def(
            "forward",
            [](MoEBlock& self, uintptr_t x, uintptr_t out, int64_t tokens, uintptr_t before) {
                if (check_tokens(tokens) == 0) return;
                const float *in = pointer(x, "x_ptr"), *b = before ? pointer(before, "before_ptr") : nullptr;
                float* o = pointer(out, "out_ptr");
                check(o != b, "out must not be before");
                NoGil nogil;
                self.forward(in, o, tokens, b);
            },
            py::arg("x_ptr"), py::arg("out_ptr"), py::arg("tokens"), py::arg("before_ptr") = 0);
}

}  // namespace

void bind_experts(py::module_& m) {
    bind_bank(m);
    bind_routed(m);
    bind_moe(m);
}

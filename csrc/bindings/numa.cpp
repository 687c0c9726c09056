// Bindings of node teams, of experts that are spread over them, and of the check where a bank's pages lie.
#include "bindings/numa.h"

#include "blocks/switch.h"

#include "bindings/common.h"
#include "numa/sharded_experts.h"

namespace {

struct RawExpert {
    Bank bank;
    int64_t expert;
    ExpertBank::Raw raw[3];
};

// The bank's memory is one area, which starts with expert 0's gate.
const uint8_t* bank_memory(const ExpertBank& bank) { return bank.expert(0).gate.data; }

void pack(NodeTeam& team, const py::list& parts) {
    check(static_cast<int>(parts.size()) == team.nodes(), "expected (bank, expert, gate, up, down) or None for each node");
    std::vector<std::optional<RawExpert>> work(parts.size());
    std::vector<py::buffer_info> held;
    for (size_t i = 0; i < parts.size(); i++) {
        if (parts[i].is_none()) continue;
        const py::tuple part = py::cast<py::tuple>(parts[i]);
        check(part.size() == 5, "expected (bank, expert, gate, up, down)");
        RawExpert to{py::cast<Bank>(part[0]), py::cast<int64_t>(part[1]), {}};
        for (size_t k = 0; k < 3; k++) {
            held.push_back(contiguous_bytes(py::cast<py::buffer>(part[2 + k])));
            to.raw[k] = {static_cast<const uint8_t*>(held.back().ptr), static_cast<size_t>(held.back().size)};
        }
        work[i] = std::move(to);
    }
    std::string refused;
    std::mutex guard;
    {
        NoGil nogil;
        std::lock_guard<std::mutex> hold(team.mutex());
        team.run([&](int node) {
            auto& w = work[static_cast<size_t>(node)];
            if (!w) return;
            Pool& pool = team.engine(node)->pool;
            std::lock_guard<std::mutex> own(pool.mutex());
            try {
                w->bank->pack(pool, w->expert, w->raw[0], w->raw[1], w->raw[2]);
            } catch (const std::invalid_argument& e) {
                std::lock_guard<std::mutex> one(guard);
                if (refused.empty()) refused = e.what();
            }
        });
    }
    check(refused.empty(), refused);
}

}  // namespace

void bind_numa(py::module_& m) {
    py::class_<NodeTeam, TeamPtr>(m, "NodeTeam")
        .def(py::init([](const std::vector<std::vector<int>>& cpus, const std::vector<int>& memory) {
                 check(cpus.size() == memory.size(), "cpus and memory must have an entry for each node");
                 std::vector<NodeTeam::Place> places;
                 for (size_t i = 0; i < cpus.size(); i++) places.push_back({cpus[i], memory[i]});
                 NoGil nogil;
                 return std::make_shared<NodeTeam>(places);
             }),
             py::arg("cpus"), py::arg("memory"))
        .def_property_readonly("nodes", &NodeTeam::nodes)
        .def(
            "set_few",
            [](const NodeTeam& team, const std::string& format, int tokens) {
                for (int n = 0; n < team.nodes(); n++) set_few(*team.engine(n), format, tokens);
            },
            py::arg("format"), py::arg("tokens"))
        .def(
            "set_ahead",
            [](const NodeTeam& team, const std::string& format, int bytes) {
                for (int n = 0; n < team.nodes(); n++) set_ahead(*team.engine(n), format, bytes);
            },
            py::arg("format"), py::arg("bytes"))
        .def(
            "bind",
            [](const NodeTeam& team, int node, const ExpertBank& bank) {
                check(node >= 0 && node < team.nodes(), "the team has no such node");
                bind_memory(bank_memory(bank), bank.nbytes(), team.memory(node));
            },
            py::arg("node"), py::arg("bank"))
        .def("pack", &pack, py::arg("parts"));

    m.def(
        "bank_pages",
        [](const ExpertBank& bank, size_t samples) { return pages_by_node(bank_memory(bank), bank.nbytes(), samples); },
        py::arg("bank"), py::arg("samples") = 0);

    py::class_<ShardedExpertsBlock>(m, "ShardedExpertsBlock")
        .def(py::init([](TeamPtr team, const std::vector<Bank>& banks, const std::vector<int64_t>& first, int64_t experts,
                         const std::vector<int>& slots, const std::string& activation, bool weight_on_input, bool exact) {
                 check(banks.size() == first.size(), "banks and first must have an entry for each node");
                 std::vector<ShardedExpertsBlock::Share> shares;
                 for (size_t i = 0; i < banks.size(); i++) {
                     check(banks[i] != nullptr, "each node needs a bank");
                     shares.push_back({banks[i], first[i]});
                 }
                 return std::make_unique<ShardedExpertsBlock>(
                     std::move(team), std::move(shares),
                     ShardedExpertsBlock::Config{experts, slots, activation, weight_on_input, exact});
             }),
             py::arg("team").none(false), py::arg("banks"), py::arg("first"), py::arg("experts"),
             py::arg("slots") = std::vector<int>{}, py::arg("activation") = "silu", py::arg("weight_on_input") = false,
             py::arg("exact") = false)
        .def(
            "forward",
            [](ShardedExpertsBlock& self, uintptr_t x, uintptr_t ids, uintptr_t weights, uintptr_t out, int64_t tokens,
               int64_t top_k) {
                if (check_tokens(tokens) == 0) return;
                check(top_k > 0 && tokens * top_k < int64_t{1} << 31, "top_k must be positive, tokens * top_k below 2^31");
                const float *in = pointer(x, "x_ptr"), *w = pointer(weights, "weights_ptr");
                check(ids != 0 && ids % 8 == 0, "ids_ptr must be a non-null address aligned to 8 bytes");
                float* o = pointer(out, "out_ptr");
                check(o != in, "out must not be x");
                NoGil nogil;
                self.forward(in, reinterpret_cast<const int64_t*>(ids), w, o, tokens, top_k);
            },
            py::arg("x_ptr"), py::arg("ids_ptr"), py::arg("weights_ptr"), py::arg("out_ptr"), py::arg("tokens"),
            py::arg("top_k"));
}

// Memory of a layer's experts: gate and up panels alternate, since one work item reads both; then down's.
#include "core/expert_bank.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <utility>

namespace ktcore {

ExpertBank::ExpertBank(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                       const std::string& down) {
    lay_out(experts, hidden, ffn, gate, up, down);
    memory_ = Memory(nbytes());
    data_ = memory_.data();
}

ExpertBank::ExpertBank(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                       const std::string& down, const uint8_t* data, size_t bytes, Keep keep) {
    lay_out(experts, hidden, ffn, gate, up, down);
    check_borrowed(data, bytes, nbytes());
    data_ = data;
    keep_ = std::move(keep);
    packed_.assign(packed_.size(), true);
    count_ = static_cast<int>(packed_.size());
}

void ExpertBank::lay_out(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                         const std::string& down) {
    if (experts <= 0 || experts > 1 << 20) throw std::invalid_argument("experts must be 1 to 2^20");
    shape_ = {packed_shape(parse_format(gate), ffn, hidden), packed_shape(parse_format(up), ffn, hidden),
              packed_shape(parse_format(down), hidden, ffn)};
    up_at_ = shape_.gate.panel_bytes;
    const size_t pair = shape_.gate.panel_bytes + shape_.up.panel_bytes;
    shape_.gate.panel_bytes = shape_.up.panel_bytes = pair;
    down_at_ = pair * static_cast<size_t>(shape_.gate.panels);
    stride_ = down_at_ + shape_.down.panel_bytes * static_cast<size_t>(shape_.down.panels);
    if (stride_ > SIZE_MAX / 2 / static_cast<size_t>(experts)) throw std::bad_alloc();
    packed_.resize(static_cast<size_t>(experts));
    load_ = std::make_unique<std::vector<std::atomic<uint64_t>>>(static_cast<size_t>(experts));
}

size_t ExpertBank::expert_bytes(int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                                const std::string& down) {
    ExpertBank one;
    one.lay_out(1, hidden, ffn, gate, up, down);
    return one.stride_;
}

ExpertViews ExpertBank::expert(int e) const {
    ExpertViews v = shape_;
    const uint8_t* base = data_ + stride_ * static_cast<size_t>(e);
    v.gate.data = base;
    v.up.data = base + up_at_;
    v.down.data = base + down_at_;
    const auto bias = [e](const std::vector<float>& b, const PackedView& w) {
        return b.empty() ? nullptr : b.data() + static_cast<size_t>(e) * static_cast<size_t>(w.panels * kPanelRows);
    };
    v.gate_bias = bias(biases_[0], v.gate);
    v.up_bias = bias(biases_[1], v.up);
    v.down_bias = bias(biases_[2], v.down);
    return v;
}

void ExpertBank::pack(Pool& pool, int64_t e, const Raw& gate, const Raw& up, const Raw& down) {
    if (e < 0 || e >= experts()) throw std::invalid_argument("there is no expert " + std::to_string(e));
    const ExpertViews v = expert(static_cast<int>(e));
    const PackJob jobs[3] = {{v.gate, gate.data}, {v.up, up.data}, {v.down, down.data}};
    const Raw* raws[3] = {&gate, &up, &down};
    for (int i = 0; i < 3; i++) packed_shape(jobs[i].to.format, jobs[i].to.rows, jobs[i].to.cols, raws[i]->bytes);
    {
        std::lock_guard<std::mutex> hold(claims_);
        if (packed_[static_cast<size_t>(e)])
            throw std::invalid_argument("expert " + std::to_string(e) + " is packed already");
        packed_[static_cast<size_t>(e)] = true;
    }
    pack_panels(pool, jobs, 3);
    count_++;
}

void ExpertBank::set_biases(const std::vector<float>& gate, const std::vector<float>& up,
                            const std::vector<float>& down) {
    const std::vector<float>* from[3] = {&gate, &up, &down};
    const PackedView* to[3] = {&shape_.gate, &shape_.up, &shape_.down};
    const char* names[3] = {"gate_bias", "up_bias", "down_bias"};
    const size_t count = packed_.size();
    for (int i = 0; i < 3; i++) {
        const size_t rows = static_cast<size_t>(to[i]->rows), padded = static_cast<size_t>(to[i]->panels * kPanelRows);
        if (!from[i]->empty() && from[i]->size() != count * rows)
            throw std::invalid_argument(std::string(names[i]) + " must hold " + std::to_string(count) + " x " +
                                        std::to_string(rows) + " values, not " + std::to_string(from[i]->size()));
        biases_[i].assign(from[i]->empty() ? 0 : count * padded, 0.f);
        for (size_t e = 0; e < count && !from[i]->empty(); e++)
            std::copy_n(from[i]->begin() + static_cast<ptrdiff_t>(e * rows), rows,
                        biases_[i].begin() + static_cast<ptrdiff_t>(e * padded));
    }
}

}  // namespace ktcore

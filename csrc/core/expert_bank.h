// All routed experts of a layer in one area of memory, an expert's three matrices side by side.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>

#include "core/packed.h"

namespace ktcore {

// One gated feed-forward network as the kernels see it.
struct ExpertViews {
    PackedView gate, up, down;
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // whole panels long; null: none
};

class ExpertBank {
  public:
    // Reserves the memory; the system backs it as experts are packed. Throws std::invalid_argument.
    ExpertBank(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
               const std::string& down);

    // Experts that were packed before and lie one after another in memory that `keep` keeps; read only, all of them
    // packed. Throws std::invalid_argument when `bytes` are not theirs.
    ExpertBank(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
               const std::string& down, const uint8_t* data, size_t bytes, Keep keep);

    static size_t expert_bytes(int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                               const std::string& down);

    // Raw GGUF rows of one matrix.
    struct Raw {
        const uint8_t* data;
        size_t bytes;
    };
    // Packs expert `e`, each once; threads with pools of their own may pack different ones at a time. Throws
    // std::invalid_argument.
    void pack(Pool& pool, int64_t e, const Raw& gate, const Raw& up, const Raw& down);

    // Added to the products: gate, up [experts][ffn], down [experts][hidden]; empty: none. Throws std::invalid_argument.
    void set_biases(const std::vector<float>& gate, const std::vector<float>& up, const std::vector<float>& down);

    int experts() const { return static_cast<int>(packed_.size()); }
    int packed() const { return count_; }
    int hidden() const { return shape_.gate.cols; }
    int ffn() const { return shape_.gate.rows; }
    const ExpertViews& shape() const { return shape_; }
    ExpertViews expert(int e) const;
    size_t nbytes() const { return stride_ * packed_.size(); }
    // Tokens that expert `e` has been given so far. One thread at a time notes them, any may read.
    void note(int e, int tokens) const {
        auto& at = (*load_)[static_cast<size_t>(e)];
        at.store(at.load(std::memory_order_relaxed) + static_cast<uint64_t>(tokens), std::memory_order_relaxed);
    }
    uint64_t noted(int e) const { return (*load_)[static_cast<size_t>(e)].load(std::memory_order_relaxed); }

  private:
    ExpertViews shape_{};
    size_t stride_ = 0, down_at_ = 0, up_at_ = 0;
    std::mutex claims_;
    std::vector<bool> packed_;  // or being packed
    std::atomic<int> count_{0};
    std::unique_ptr<std::vector<std::atomic<uint64_t>>> load_;
    ExpertBank() = default;
    const uint8_t* data_ = nullptr;
    Memory memory_;
    Keep keep_;
    std::vector<float> biases_[3];  // of gate, up and down: an expert's rows padded to whole panels

    void lay_out(int64_t experts, int64_t hidden, int64_t ffn, const std::string& gate, const std::string& up,
                 const std::string& down);
};

}  // namespace ktcore

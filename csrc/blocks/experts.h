// Routed experts: tokens are sorted by expert, then two parallel regions (gate and up, down) over all of them.
#pragma once
#include "blocks/clamp.h"
#include "blocks/engine.h"
#include "core/expert_bank.h"

namespace ktcore {

using Bank = std::shared_ptr<ExpertBank>;

// One call's tokens sorted by expert, and the work cut from them. Kept between calls: no allocation once warm.
struct ExpertPlan {
    // Rows [start, start + count) of the sorted list go through one feed-forward network.
    struct Group {
        ExpertViews w;
        int start, count;
        size_t mid_at;  // byte offset of its first hidden row
        size_t mid_stride;
        int mid_k;
        Clamp clamp;
    };
    struct Item {
        int group, row0, row1, panel0, panel1;
    };
    std::vector<Group> groups;
    std::vector<Item> items;
    std::vector<int32_t> token;  // of each sorted row
    std::vector<float> weight;
    std::vector<int> cursor;
    std::vector<int64_t> gathered;  // what each thread's copy of the input rows holds
    size_t mid_bytes = 0;

    void clear();
    // Sorts (token, choice) pairs by expert, stable; negative ids are skipped.
    void assign(const ExpertBank& bank, const int64_t* ids, const float* weights, int tokens, int top_k, bool exact,
                const Clamp& clamp = {});
    // All tokens through one network more: shared experts. weights null: 1.
    void add_all(const ExpertViews& w, const float* weights, int tokens, bool exact, const Clamp& clamp = {});

  private:
    void add_group(const ExpertViews& w, int start, int count, bool exact, const Clamp& clamp);
};

// What run_experts computes: out = (residual +) sum over a token's rows, in the groups' order, of
// weight * (down(act(gate x) * up x) + bias), where gate x and up x have their biases too. So a token's result depends
// neither on the batch nor on the threads.
struct ExpertRun {
    Rows in;  // in the forms that `needs` asked for
    int tokens, hidden;
    uint8_t* mid;  // plan.mid_bytes
    float* out;
    const float* residual;  // null: none; may equal out
    Activation activation;
    bool weight_on_input, exact;
};
void run_experts(Engine& e, ExpertPlan& plan, const ExpertRun& run);

constexpr int kExpertTokens = 2048;  // tokens of one pass, which bounds the scratch memory
// Bytes of scratch in each thread, before run_experts; ffn: the widest of its networks.
size_t expert_scratch(int hidden, int ffn);

class ExpertsBlock {
  public:
    ExpertsBlock(EnginePtr engine, Bank bank, const std::string& activation, bool weight_on_input, bool exact,
                 Clamp clamp = {});
    // x, out [tokens][hidden], apart; ids, weights [tokens][top_k]. Throws std::invalid_argument on an unknown id.
    void forward(const float* x, const int64_t* ids, const float* weights, float* out, int64_t tokens, int64_t top_k);

  private:
    EnginePtr engine_;
    Bank bank_;
    Activation activation_;
    bool weight_on_input_, exact_;
    Clamp clamp_;
    ExpertPlan plan_;
};

}  // namespace ktcore

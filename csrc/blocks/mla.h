// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): absorbed for few new tokens, expanded for many.
#pragma once
#include "blocks/indexer.h"

namespace ktcore {

// One matrix a head, its rows padded to whole panels: head h owns panels [h * panels_per_head, ...).
struct HeadMatrix {
    Weight w;  // null: absent
    int heads = 0, rows = 0;

    int panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
};

class MLABlock {
  public:
    struct Config {
        int heads, nope, rope, value, latent;
        float scale;
        bool interleaved;
        Vector inv_freq;  // empty: nothing rotates
        float rope_scale;
        Vector norm, q_norm, kv_norm;
        float norm_eps, q_eps, kv_eps;
        bool residual, exact;
        Temperature temperature;
    };
    struct Weights {
        Weight q_a;                 // null: q applies to the normed input
        Weight q;                   // [heads * (nope + rope), hidden or rank]
        Weight kv_a;                // [latent + rope, hidden]
        Weight k_absorb, k_expand;  // a head: [latent, nope] and [nope, latent]
        Weight v;                   // a head: [value, latent]
        Weight o;                   // [hidden, heads * value]
    };
    // Attention over the tokens that were chosen: by `indexer`, which writes to `chosen`, or before, where it is null.
    struct Sparse {
        TokenIndexer* indexer;
        Cache keys;
        int32_t* chosen;  // [tokens][top_k]: the indexer's width
        int top_k;
    };
    MLABlock(EnginePtr engine, Weights weights, Config config);
    // x, out [step.tokens()][hidden]; out may be x. Pages [num_pages][page_size][latent + rope], in cache.k and cache.v.
    void forward(const float* x, float* out, Step& step, const Cache& cache, const Sparse* sparse = nullptr);

  private:
    struct Buffers;
    void project(const float* x, Step& step, Buffers& b);
    void append(Step& step, const Cache& cache, const Buffers& b);
    void attend_absorbed(const std::vector<AttendSpan>& spans, const Cache& cache, Buffers& b, int first = 0);
    void attend_chosen(const Step& step, const Cache& cache, const Sparse& sparse, Buffers& b);
    void attend_expanded(const AttendSpan& span, const Cache& cache, Buffers& b);
    int expanded_heads(int context, CacheType type) const;

    EnginePtr engine_;
    Weights w_;
    Config c_;
    HeadMatrix absorb_, expand_, v_;
    AttendPlan plan_;
    std::vector<AttendSpan> few_, many_, each_;
    std::vector<int> sparse_;  // tokens that attend to a choice
    std::vector<int32_t> slots_;
};

}  // namespace ktcore

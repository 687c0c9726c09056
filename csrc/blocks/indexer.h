// Token indexer of sparse attention (DeepSeek-V3.2's report, 2025): scores of all cached index keys, and the best of them.
#pragma once
#include "blocks/attention.h"

namespace ktcore {

class TokenIndexer {
  public:
    struct Config {
        int heads, dim, rope, top_k;
        bool interleaved;
        Vector inv_freq;
        float rope_scale;
        Vector k_norm, k_bias;  // of the LayerNorm
        float eps;
        bool exact;
    };
    // q [heads * dim, rank], k [dim, hidden], weights [heads, hidden].
    TokenIndexer(EnginePtr engine, Weight q, Weight k, Weight weights, Config config);
    int top_k() const { return c_.top_k; }
    const Config& config() const { return c_; }
    int rank() const { return q_->view().cols; }
    int hidden() const { return k_->view().cols; }

    // Writes the step's index keys into `keys` and chosen [T][top_k]: positions, rising, then -1. `in` are the normed inputs,
    // `low` the normed low-rank queries, both ready for products; the caller holds the pool.
    void choose(const Rows& in, const Rows& low, Step& step, const Cache& keys, int32_t* chosen);

  private:
    void append(Step& step, const Cache& keys);
    void score(const Step& step, int sequence, int from, int count, const Cache& keys);

    EnginePtr engine_;
    Weight q_, k_, weights_;
    Config c_;
    Memory buffer_, scores_;
    float *queries_ = nullptr, *keys_ = nullptr, *gains_ = nullptr;
};

// The `top_k` highest of scores [count], rising, then -1; the earlier where scores are equal. All where there are no more.
void choose_highest(const float* scores, int count, int top_k, int32_t* out);

}  // namespace ktcore

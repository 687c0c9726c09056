// Token indexer of sparse attention (DeepSeek-V3.2's report, 2025): scores of all cached index keys, and the best of them.
#pragma once
#include "blocks/attention.h"

namespace ktcore {

class TokenIndexer {
  public:
    struct Config {
        int heads, dim, rope, top_k;
        int pool;  // tokens of a pool, whose keys are one; 0: each token has its own
        bool interleaved;
        Vector inv_freq;  // empty: nothing rotates
        float rope_scale;
        Vector k_norm, k_bias;  // of the LayerNorm
        float eps;
        bool exact;
        Vector ape;  // [pool * dim], added to gates by the place in the pool
    };
    // q [heads * dim, rank], k [dim, hidden], weights [heads, hidden]; gate [dim, hidden] where keys are pooled, or null.
    TokenIndexer(EnginePtr engine, Weight q, Weight k, Weight weights, Config config, Weight gate = nullptr);
    // Most tokens of a choice; up to so many of a sequence, all are chosen.
    int width() const { return c_.top_k + group() - 1; }
    const Config& config() const { return c_; }
    int rank() const { return q_->view().cols; }
    int hidden() const { return k_->view().cols; }

    // Writes the step's index keys into `keys` and chosen [T][width]: positions, rising, then -1. `in` are the normed inputs,
    // `low` the normed low-rank queries, both ready for products; the caller holds the pool. Where keys are pooled, keys.k has
    // rows of pools [num_pages][page_size / pool][dim], and keys.v those of tokens, key and gates [num_pages][page_size][2 * dim].
    void choose(const Rows& in, const Rows& low, Step& step, const Cache& keys, int32_t* chosen);

  private:
    int group() const { return c_.pool ? c_.pool : 1; }
    void append(Step& step, const Cache& keys);
    void pool_keys(const Step& step, const Cache& keys);
    void list(const float* scores, int seen, int32_t* out) const;
    void score(const Step& step, int sequence, int from, int count, const Cache& keys);

    EnginePtr engine_;
    Weight q_, k_, weights_, gate_;
    Config c_;
    Memory buffer_, scores_;
    float *queries_ = nullptr, *keys_ = nullptr, *gains_ = nullptr;  // keys_ with gates behind each, where keys are pooled
};

// The `top_k` highest of scores [count], rising, then -1; the earlier where scores are equal. All where there are no more.
void choose_highest(const float* scores, int count, int top_k, int32_t* out);

}  // namespace ktcore

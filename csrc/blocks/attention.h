// Causal grouped-query attention over a caller-owned paged cache, alone and as a fused layer half.
#pragma once
#include "blocks/step.h"

namespace ktcore {

// Pages [num_pages][kv_heads][page_size][head_dim], keys and values apart.
struct Cache {
    void* k;
    void* v;
    int64_t num_pages;
    int page_size;
    CacheType type;
};
CacheType parse_cache_type(const std::string& name);

struct AttendShape {
    int heads, kv_heads, head_dim;
    float scale;
    int window;
};

// Work lists and partial results of attend(), kept between calls.
struct AttendPlan {
    struct Merge {
        int first_part, parts, token, kv_head, rows;
    };
    std::vector<AttendItem> items;
    std::vector<Merge> merges;
    Memory partial;
};

// out [T][heads * head_dim] from q (same shape) and a cache that already holds this step's keys. The caller holds
// the pool.
void attend(Engine& e, const AttendShape& shape, const Step& step, const Cache& cache, const float* q, float* out,
            AttendPlan& plan);

class AttentionBlock {
  public:
    struct Config {
        AttendShape shape;
        bool interleaved;
        Vector inv_freq;
        float rope_scale;
        Vector norm, q_norm, k_norm;
        float norm_eps, qk_eps;
        Vector q_bias, k_bias, v_bias, o_bias;
        bool residual, exact;
    };
    AttentionBlock(EnginePtr engine, Weight q, Weight k, Weight v, Weight o, Config config);
    // x, out [step.tokens()][hidden]; out may be x. Appends this step's keys and values to the cache.
    void forward(const float* x, float* out, Step& step, const Cache& cache);

  private:
    EnginePtr engine_;
    Weight q_, k_, v_, o_;
    Config c_;
    AttendPlan plan_;
};

}  // namespace ktcore

// Causal grouped-query attention over a caller-owned paged cache, alone and as a fused layer half.
#pragma once
#include "blocks/step.h"

namespace ktcore {

// Pages [num_pages][kv_heads][page_size] of rows of a key's and a value's width (cache_row_bytes each), apart.
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
    // 0: as head_dim. Widths of a value and of the cached rows that keys and values are the beginning of.
    int value_dim = 0, k_row = 0, v_row = 0;
    int chunk = 0;                 // 0: none; else a query sees its own chunk of so many positions
    const float* sinks = nullptr;  // null, or a logit a query head that only takes part in the softmax
    bool whole = false;            // contexts are not cut into items

    int value_width() const { return value_dim ? value_dim : head_dim; }
};

// New tokens of one sequence: rows `token` and on of q and out, the last of `context` keys in pages `blocks`.
struct AttendSpan {
    int token, queries, context;
    const int32_t* blocks;
};

// Work lists and partial results of an attention step, kept between calls.
struct AttendPlan {
    struct Merge {
        size_t first_row;
        int parts, token, kv_head, rows;
    };
    std::vector<AttendItem> items;
    std::vector<Merge> merges;
    std::vector<size_t> shared;  // the first items of those that share their queries
    Memory partial, ready;
    int max_rows = 0;
    size_t partial_rows = 0;

    void clear();
    // q [T] rows q_stride apart, holding the shape's heads from their first value on; out likewise.
    void add(const AttendShape& s, const AttendSpan& span, const Cache& cache, const float* q, size_t q_stride, float* out,
             size_t out_stride);
    // Runs what was added with one shape.
    void run(Engine& e, const AttendShape& s, float* out, size_t out_stride);

  private:
    void ready_queries(Engine& e, int width);
};

// out [T][heads * head_dim] from q (same shape) and a cache that already holds this step's keys. The caller holds
// the pool.
void attend(Engine& e, const AttendShape& shape, const Step& step, const Cache& cache, const float* q, float* out,
            AttendPlan& plan);

// Queries at position p grow by 1 + scale * ln(1 + floor((p + offset) / span)); span 0: they do not.
struct Temperature {
    float scale = 0.f, span = 0.f, offset = 1.f;

    void apply(float* q, size_t values, int position) const;
};

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
        bool norm_after_rope = false;
        bool norm_whole = false;  // q_norm [heads * head_dim] over all heads of q together, k_norm likewise, before RoPE
        Vector sinks;  // as AttendShape's, kept here
        Temperature temperature;
        Weight gate = nullptr;  // null, or [heads * value width, hidden], or one row a head: its sigmoid multiplies what o gets
        Vector v_norm;  // of every value head; empty for none
        float v_eps = 0.f;
        float value_scale = 1.f;  // multiplies the values
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

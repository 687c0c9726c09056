// Attention over a window of keys and compressed entries (DeepSeek-V4's report, 2026): rows of one memory, named token by token.
#pragma once
#include "blocks/attention.h"

namespace ktcore {

// Rows of one width, keys and values at once: first kStaged for a step's own keys, then a ring of `window` a slot, then the
// entries' pages.
struct EntryRows {
    void* base;
    CacheType type;
    int64_t slots, pages;
    int page_size;  // tokens a page
};

class EntryAttention {
  public:
    static constexpr int kStaged = 64;
    struct Config {
        int heads, dim, window;
        int ratio;  // tokens an entry; 0: there are none
        float scale;
        Vector sinks;
    };
    EntryAttention(EnginePtr engine, Config config);
    const Config& config() const { return c_; }
    int page_entries(int page_size) const { return c_.ratio ? std::max(1, page_size / c_.ratio) : 0; }

    // q, out [T][heads * dim], k [T][dim], rotated. `chosen` [T][top_k]: entries that each token sees, then -1; null: all that
    // have closed. Afterwards the rings hold the sequences' last keys. Throws std::invalid_argument.
    void forward(Step& step, const std::vector<int32_t>& slots, const float* q, const float* k, float* out,
                 const EntryRows& rows, const int32_t* chosen, int top_k);

    // Row of a sequence's entry.
    int64_t entry_row(const Step& step, int sequence, int entry, const EntryRows& rows) const;

  private:
    void name_rows(const Step& step, const std::vector<int32_t>& slots, int from, int token, const EntryRows& rows,
                   const int32_t* chosen, int top_k);

    EnginePtr engine_;
    Config c_;
    AttendPlan plan_;
    std::vector<int32_t> names_, ends_;
};

// Writes values [count][dim] to `rows` of a memory of such rows; the caller has checked them.
void store_rows(Engine& e, const float* values, int count, int dim, const std::vector<int64_t>& rows, void* base, CacheType type);

// The best of the entries that each token sees, by scores of q [T][heads * dim] and weights [T][heads]: out [T][top_k],
// rising, then -1. keys: pages of whole entries.
struct EntryChoice {
    int heads, dim, ratio, top_k;
    const float *q, *weights;
};
void choose_entries(Engine& e, const EntryChoice& c, const Step& step, const Cache& keys, int32_t* out, Memory& scores);

}  // namespace ktcore

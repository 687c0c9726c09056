// What the blocks share: the pool, the chosen kernels, the rows that feed a matrix product, and its epilogue.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "core/cpuid.h"
#include "core/packed.h"

namespace ktcore {

// A pool with the kernels that its blocks use: the engine's native side.
struct Engine {
    Engine(int threads, const std::vector<int>& cpus) : kernels(select_kernels()), pool(threads, cpus) {
        for (int f = 0; f < kFormatCount; f++) few[f] = kernels.few(static_cast<Format>(f)), ahead[f] = kReadAhead;
    }
    const Kernels& kernels;
    Pool pool;
    // Of each format, for kernels.panel; results do not depend on them.
    std::atomic<int> few[kFormatCount], ahead[kFormatCount];
    Reading reading(Format f) const {
        const int i = static_cast<int>(f);
        return {few[i].load(std::memory_order_relaxed), ahead[i].load(std::memory_order_relaxed)};
    }
};
using EnginePtr = std::shared_ptr<Engine>;

// A float vector (norm weight, bias) kept by a block; empty: absent.
using Vector = std::vector<float>;
inline const float* data_or_null(const Vector& v) { return v.empty() ? nullptr : v.data(); }
void check_length(const Vector& v, int64_t expected, const char* what);  // empty passes
void check(bool ok, const std::string& message);                         // throws std::invalid_argument

// Input rows of matrix products, in the forms their formats need.
struct Rows {
    const float* x = nullptr;
    size_t ldx = 0;
    ActView act{};
    const uint16_t* rounded = nullptr;  // x as bfloat16, for formats that take it so
    size_t ld_rounded = 0;
};
bool needs_float(const PackedView& w, bool exact);
// Whether products with w round their inputs to bfloat16, so that rounding them once serves all its panels.
bool takes_rounded(const Engine& e, const PackedView& w, bool exact);

// Where one product goes: out[t][r] = sum (+ bias) (+ residual).
struct Product {
    const PackedView* w;
    float* out;
    size_t ldo;
    const float* bias;
    const float* residual;
    size_t ldr;
};

// Splits one arena request into aligned pieces: call sizes first, then take them in the same order.
class Carver {
  public:
    template <class T>
    void want(T** where, size_t count) {
        pieces_.push_back({reinterpret_cast<uint8_t**>(where), total_});
        total_ += (count * sizeof(T) + 63) / 64 * 64;
    }
    void carve(Pool& pool) {
        uint8_t* base = pool.arena(total_ + 64);
        for (auto& p : pieces_) *p.where = base + p.at;
    }

  private:
    struct Piece {
        uint8_t** where;
        size_t at;
    };
    std::vector<Piece> pieces_;
    size_t total_ = 0;
};

int padded_k(int cols);
// Calls fn(token) for all tokens, each alone: on this thread while they are few, and in one region when they are more.
template <class F>
void each_token(Engine& e, int tokens, const F& fn) {
    constexpr int kSerial = 4;  // up to here the caller is done before the others are on their way
    if (tokens <= kSerial) {
        for (int t = 0; t < tokens; t++) fn(t);
        return;
    }
    const int most = tokens / (4 * e.pool.threads()), step = most < 1 ? 1 : most > 8 ? 8 : most;
    e.pool.run((tokens + step - 1) / step, [&](int item, int) {
        for (int t = item * step; t < tokens && t < (item + 1) * step; t++) fn(t);
    });
}
// Quantises (and normalises) `tokens` rows of n values into act, and / or writes normalised floats to `normed`.
void prepare_rows(Engine& e, const float* x, size_t ldx, int tokens, int n, const Vector& norm, float eps, ActView* act,
                  float* normed);
// Reserves what run_products needs in each thread.
void reserve_products(Engine& e, size_t extra = 0);
// All products of the same rows as one parallel region.
void run_products(Engine& e, const Rows& rows, int tokens, bool exact, const Product* products, int count);
// acc [t1-t0][32] of one panel, by the integer or the float kernel.
void run_panel(const Engine& e, const PackedView& w, int panel, const Rows& rows, bool exact, int t0, int t1, float* acc,
               uint8_t* scratch);

// out [T][n] = x [T][n], each row by the inverse of its root mean square and by weight [n].
void rms_norm(Engine& e, const float* x, const Vector& weight, float eps, float* out, int tokens);
// out [T][rows] = x [T][cols] w^T (+ bias).
void linear(Engine& e, const PackedMatrix& w, const float* x, float* out, int64_t tokens, const float* bias, bool exact);

}  // namespace ktcore

// Measures the machine's limits by running what does nothing else.
#include "blocks/limits.h"

#include <algorithm>
#include <atomic>

#include "core/os.h"

namespace ktcore {

double peak_rate(Engine& e, Arithmetic arithmetic, double seconds) {
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    // A thread that is late, or shares its core, leaves its items to the others: passes differ, the best one counts.
    const int items = 4 * e.pool.threads();
    int64_t rounds = 64;
    double best = 0;
    const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
    do {
        std::atomic<int64_t> operations{0};
        const int64_t start = now_ns();
        e.pool.run(items, [&](int, int) { operations += e.kernels.peak(arithmetic, rounds); });
        const int64_t took = now_ns() - start;
        if (operations == 0) return 0;
        if (took < 1000000)
            rounds *= 2;
        else
            best = std::max(best, static_cast<double>(operations.load()) / (static_cast<double>(took) * 1e-9));
    } while (now_ns() < end || best == 0);
    return best;
}

double read_bandwidth(Engine& e, double seconds) {
    std::lock_guard<std::mutex> hold(e.pool.mutex());
    constexpr size_t kPiece = size_t{1} << 20, kPieces = 512;
    Memory buffer(kPiece * kPieces);
    std::atomic<uint64_t> sink{0};
    e.pool.run(kPieces, [&](int i, int) {
        uint8_t* p = buffer.data() + static_cast<size_t>(i) * kPiece;
        for (size_t k = 0; k < kPiece; k += 4096) p[k] = 1;  // really mapped, not the zero page
    });
    double best = 0;
    const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
    do {
        const int64_t start = now_ns();
        e.pool.run(kPieces, [&](int i, int) {
            sink += e.kernels.read_sum(buffer.data() + static_cast<size_t>(i) * kPiece, kPiece);
        });
        const double took = static_cast<double>(now_ns() - start) * 1e-9;
        best = std::max(best, static_cast<double>(kPiece * kPieces) / took);
    } while (now_ns() < end);
    return best;
}

}  // namespace ktcore

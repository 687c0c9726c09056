// A pool of threads, one an engine: runs numbered items, contiguous ranges first, stealing after. Ranges are as long as
// their threads have lately been quick: cores of two kinds, and a core that something else uses too, need no other care.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/os.h"

namespace ktcore {

class Pool {
  public:
    // threads 0: default_threads() (or one for each of cpus). cpus: worker i is pinned to cpus[i]; the calling thread,
    // number 0, is left where it is. Throws std::invalid_argument.
    Pool(int threads, const std::vector<int>& cpus);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(slots_.size()); }
    // How quick each thread has lately been, as its share of the items: about 1 in all. For the thread that runs regions.
    std::vector<float> shares() const;

    // Calls fn(item, thread) for every item in [0, items); returns when all have ended. fn must not throw.
    template <class F>
    void run(int items, const F& fn) {
        run_items(items, [](const void* f, int item, int thread) { (*static_cast<const F*>(f))(item, thread); }, &fn);
    }

    // Held by a caller from its first scratch request to its last run: one user at a time. Throws std::runtime_error
    // in a forked child, where the threads are not and the mutex may never be free.
    std::mutex& mutex();
    // Grow-only memory: `arena` for one call's shared buffers, `local` for each thread. Contents are undefined.
    uint8_t* arena(size_t bytes);
    void reserve_local(size_t bytes);
    uint8_t* local(int thread) const { return slots_[static_cast<size_t>(thread)]->scratch.data(); }

  private:
    using Call = void (*)(const void*, int, int);
    struct alignas(64) Slot {
        std::atomic<uint64_t> range{0};  // epoch << 40 | begin << 20 | end
        std::atomic<float> share{1.f};   // of the items; the threads' are about 1 in all
        int ended = 0;                   // items of this region, by its own thread
        Memory scratch;
    };
    void run_items(int items, Call call, const void* fn);
    void run_slice(int items, Call call, const void* fn);
    void hand_out(int items, uint32_t epoch);
    void learn(int items);
    static bool moves_on(const std::atomic<uint64_t>& range, uint64_t& seen);
    void work(int self, uint32_t epoch);
    void worker(int self);

    std::vector<std::unique_ptr<Slot>> slots_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int> left_{0};
    Call call_ = nullptr;
    const void* fn_ = nullptr;
    int base_ = 0;
    Memory arena_;
    std::mutex mutex_;
    const int process_ = process_id();
};

// One for each physical core that this process may use and that is not much slower than the quickest (cores that save
// power would be waited for), at most the control group's quota. `root` as in os.h.
int default_threads(const std::string& root = "");

}  // namespace ktcore

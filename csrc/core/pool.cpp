// The pool's threads. A region ends when its items have ended, not when its threads have arrived: a worker that
// the system has put aside delays nobody, the others take its items.
#include "core/pool.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#define KT_RELAX() __builtin_ia32_pause()
#else
#define KT_RELAX() std::atomic_signal_fence(std::memory_order_seq_cst)
#endif

namespace ktcore {
namespace {
constexpr int64_t kSpinNs = 40000;  // longer than the gap between two native calls of a decode step
constexpr int kMaxItems = (1 << 20) - 1;
constexpr size_t kThreadsPerCpu = 16;  // tests and odd machines share CPUs; a hundred on each is a mistake
constexpr uint64_t kMask = (1 << 20) - 1;

uint64_t pack(uint32_t epoch, uint64_t begin, uint64_t end) {
    return static_cast<uint64_t>(epoch & 0xffffff) << 40 | begin << 20 | end;
}

constexpr float kMemory = 1.f / 16;      // of shares, in regions: a step of decode has dozens
constexpr int kTellingItems = 4;         // a thread, or a region says nothing of how quick they are
constexpr float kLeastShare = 1.f / 16;  // of an even one: who has it still steals, and shows that it is back
constexpr float kSlower = 1.5f;
constexpr int64_t kPatienceNs = 20000;
constexpr double kLeastCapacity = 1. / 3;
}  // namespace

int default_threads(const std::string& root) {
    const double quota = cpu_quota(root);
    const std::vector<int> all = physical_cores(root);
    const std::vector<double> capacities = cpu_capacities(all, root);
    size_t cores = std::max<size_t>(1, all.size());
    if (!capacities.empty()) {
        const double least = *std::max_element(capacities.begin(), capacities.end()) * kLeastCapacity;
        cores = static_cast<size_t>(std::count_if(capacities.begin(), capacities.end(), [=](double c) { return c >= least; }));
    }
    return static_cast<int>(quota > 0 ? std::min(cores, static_cast<size_t>(std::ceil(quota))) : cores);
}

Pool::Pool(int threads, const std::vector<int>& cpus) {
    const std::vector<int> allowed = allowed_cpus();
    const size_t most = kThreadsPerCpu * allowed.size();
    if (threads < 0 || static_cast<size_t>(threads) > most)
        throw std::invalid_argument("threads must be 0 (automatic) to " + std::to_string(most) + ", not " +
                                    std::to_string(threads) + ": this process may use " + std::to_string(allowed.size()) +
                                    " CPU(s), and more threads than CPUs make it slower");
    const size_t wanted = threads > 0    ? static_cast<size_t>(threads)
                          : cpus.empty() ? static_cast<size_t>(default_threads())
                                         : cpus.size();
    if (!cpus.empty() && cpus.size() != wanted) throw std::invalid_argument("cpus must name one CPU for each thread");
    for (int cpu : cpus)
        if (std::find(allowed.begin(), allowed.end(), cpu) == allowed.end())
            throw std::invalid_argument("CPU " + std::to_string(cpu) + " is not one this process may use");
    for (size_t i = 0; i < wanted; i++) {
        slots_.push_back(std::make_unique<Slot>());
        slots_[i]->share = 1.f / static_cast<float>(wanted);
    }
    try {
        for (size_t i = 1; i < wanted; i++)
            workers_.emplace_back([this, i, cpu = cpus.empty() ? -1 : cpus[i]] {
                try {
                    if (cpu >= 0) pin_this_thread(cpu);
                } catch (...) {  // checked above; a mask changed since then only costs speed
                }
                worker(static_cast<int>(i));
            });
    } catch (...) {
        stop_ = true;
        epoch_.fetch_add(1);
        wake_all(epoch_);
        for (auto& t : workers_) t.join();
        throw;
    }
}

Pool::~Pool() {
    if (process_id() != process_) {  // a forked child has handles of threads that it cannot join
        new std::vector<std::thread>(std::move(workers_));
        return;
    }
    stop_ = true;
    epoch_.fetch_add(1);
    wake_all(epoch_);
    for (auto& t : workers_) t.join();
}

std::mutex& Pool::mutex() {
    if (!workers_.empty() && process_id() != process_)
        throw std::runtime_error(
            "this pool's threads stayed in the process that made it: load the model after the fork, or start processes "
            "with 'spawn'");
    return mutex_;
}

uint8_t* Pool::arena(size_t bytes) {
    if (arena_.size() < bytes) {
        arena_ = Memory();
        arena_ = Memory(bytes + bytes / 4);
    }
    return arena_.data();
}

void Pool::reserve_local(size_t bytes) {
    for (auto& s : slots_)
        if (s->scratch.size() < bytes) s->scratch = Memory(bytes);
}

void Pool::run_items(int items, Call call, const void* fn) {
    base_ = 0;
    for (; items - base_ > kMaxItems; base_ += kMaxItems) run_slice(kMaxItems, call, fn);
    if (items > base_) run_slice(items - base_, call, fn);
}

void Pool::run_slice(int items, Call call, const void* fn) {
    const int n = threads();
    if (n == 1 || items == 1) {
        for (int i = 0; i < items; i++) call(fn, base_ + i, 0);
        return;
    }
    call_ = call;
    fn_ = fn;
    left_.store(items, std::memory_order_relaxed);
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    hand_out(items, epoch);
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(epoch_);
    work(0, epoch);
    // Others still hold an item each: short, unless the system runs something else in their place.
    int64_t until = 0;
    for (int i = 1; left_.load(std::memory_order_acquire) != 0; i++) {
        KT_RELAX();
        if (i % 64 == 0) {
            const int64_t now = now_ns();
            if (until == 0) until = now + kSpinNs;
            if (now > until) yield_thread();
        }
    }
    if (items >= kTellingItems * n) learn(items);
}

std::vector<float> Pool::shares() const {
    std::vector<float> out;
    for (const auto& s : slots_) out.push_back(s->share.load(std::memory_order_relaxed));
    return out;
}

void Pool::hand_out(int items, uint32_t epoch) {
    const uint64_t all = static_cast<uint64_t>(items);
    float total = 0, sum = 0;
    for (const auto& s : slots_) total += s->share.load(std::memory_order_relaxed);
    uint64_t begin = 0;
    for (const auto& s : slots_) {
        sum += s->share.load(std::memory_order_relaxed);
        const auto part = static_cast<uint64_t>(static_cast<float>(items) * (sum / total) + 0.5f);
        const uint64_t end = s == slots_.back() ? all : std::min(all, std::max(begin, part));
        s->ended = 0;
        s->range.store(pack(epoch, begin, end), std::memory_order_release);
        begin = end;
    }
}

void Pool::learn(int items) {
    const float least = kLeastShare / static_cast<float>(slots_.size());
    for (const auto& s : slots_) {
        const float seen = static_cast<float>(s->ended) / static_cast<float>(items);
        const float before = s->share.load(std::memory_order_relaxed);
        s->share.store(std::max(least, before + kMemory * (seen - before)), std::memory_order_relaxed);
    }
}

// Whether the range's thread takes an item soon: the system may have put it aside. Reads the range again into `seen`.
bool Pool::moves_on(const std::atomic<uint64_t>& range, uint64_t& seen) {
    const uint64_t before = seen;
    const int64_t until = now_ns() + kPatienceNs;
    do {
        KT_RELAX();
        seen = range.load(std::memory_order_acquire);
    } while (seen == before && now_ns() < until);
    return seen != before;
}

// Takes items until none is left in any range: its own from the front, others' from the back; but the last ones of a
// thread so much quicker that it will have ended them before this one had ended its first are left to it.
void Pool::work(int self, uint32_t epoch) {
    const int n = threads();
    Slot& own = *slots_[static_cast<size_t>(self)];
    const float pace = kSlower * own.share.load(std::memory_order_relaxed);
    for (int k = 0; k < n; k++) {
        Slot& other = *slots_[static_cast<size_t>((self + k) % n)];
        std::atomic<uint64_t>& range = other.range;
        uint64_t seen = range.load(std::memory_order_acquire);
        while (seen >> 40 == (epoch & 0xffffff)) {
            const uint64_t begin = seen >> 20 & kMask, end = seen & kMask;
            if (begin >= end) break;
            if (k > 0 && static_cast<float>(end - begin) * pace < other.share.load(std::memory_order_relaxed) &&
                moves_on(range, seen))
                continue;
            const uint64_t next = k == 0 ? pack(epoch, begin + 1, end) : pack(epoch, begin, end - 1);
            if (!range.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            call_(fn_, base_ + static_cast<int>(k == 0 ? begin : end - 1), self);
            own.ended++;
            left_.fetch_sub(1, std::memory_order_acq_rel);
            seen = range.load(std::memory_order_acquire);
        }
    }
}

void Pool::worker(int self) {
    uint32_t done = 0;
    for (;;) {
        uint32_t epoch = epoch_.load(std::memory_order_acquire);
        int64_t until = 0;
        for (int i = 1; epoch == done; i++) {
            KT_RELAX();
            epoch = epoch_.load(std::memory_order_acquire);
            if (epoch != done || i % 64 != 0) continue;
            const int64_t now = now_ns();
            if (until == 0) until = now + kSpinNs;
            if (now <= until) continue;
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            while ((epoch = epoch_.load(std::memory_order_seq_cst)) == done) wait_while_equal(epoch_, done);
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
        if (stop_.load()) return;
        work(self, epoch);
        done = epoch;
    }
}

}  // namespace ktcore

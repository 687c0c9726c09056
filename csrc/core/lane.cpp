// The lane's thread: takes jobs in order, spins for a moment when there is none, then sleeps.
#include "core/lane.h"

#include <cxxabi.h>

#include <exception>
#include <stdexcept>

#include "core/os.h"

namespace ktcore {
namespace {
constexpr int64_t kSpinNs = 40000;  // a layer's attention on a quick device takes about so long

// Spins, then sleeps, until `word` differs from `value`.
void await_change(const std::atomic<uint32_t>& word, uint32_t value) {
    int64_t until = 0;
    for (int i = 1; word.load(std::memory_order_acquire) == value; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
        if (i % 64 != 0) continue;
        const int64_t now = now_ns();
        if (until == 0) until = now + kSpinNs;
        if (now > until) wait_while_equal(word, value);
    }
}
}  // namespace

Lane::Lane() : process_(process_id()), thread_([this] { loop(); }) {}

Lane::~Lane() { close(); }

bool Lane::forked() const { return process_id() != process_; }

void Lane::close() {
    if (!thread_.joinable()) return;
    if (forked()) {  // the handle of a thread that is not in this process
        new std::thread(std::move(thread_));
        return;
    }
    {
        std::lock_guard<std::mutex> hold(mutex_);
        stop_ = true;
    }
    epoch_.fetch_add(1);
    wake_all(epoch_);
    thread_.join();
}

void Lane::start(Job& job) {
    if (forked()) throw std::runtime_error("this lane's thread stayed in the process that made it");
    {
        std::lock_guard<std::mutex> hold(mutex_);
        if (stop_) throw std::runtime_error("the lane is closed");
        queue_.push_back(&job);
        job.done.store(0, std::memory_order_relaxed);
    }
    epoch_.fetch_add(1);
    wake_all(epoch_);
}

void Lane::wait(Job& job) {
    if (!job.lane->forked()) await_change(job.done, 0);
}

void Lane::start_callback(void* job) noexcept {
    Job& j = *static_cast<Job*>(job);
    try {
        j.lane->start(j);
    } catch (const std::exception& e) {  // no memory for the queue, or no lane any more
        j.error = e.what();
        j.done.store(1);
    }
}

void Lane::wait_callback(void* job) noexcept { wait(*static_cast<Job*>(job)); }

// The thread ends inside this job: nobody waits for it or for what is queued behind it.
void Lane::abandon(Job& job) {
    std::lock_guard<std::mutex> hold(mutex_);
    stop_ = true;
    queue_.push_front(&job);
    for (Job* j : queue_) {
        j->error = "the program ended during the job";
        j->done.store(1, std::memory_order_release);
        wake_all(j->done);
    }
    queue_.clear();
}

void Lane::loop() {
    for (;;) {
        Job* job = nullptr;
        const uint32_t seen = epoch_.load();
        {
            std::lock_guard<std::mutex> hold(mutex_);
            if (!queue_.empty()) {
                job = queue_.front();
                queue_.pop_front();
            } else if (stop_) {
                return;
            }
        }
        if (job == nullptr) {
            await_change(epoch_, seen);
            continue;
        }
        job->error.clear();
        try {
            job->work();
        } catch (const std::exception& e) {
            job->error = *e.what() ? e.what() : "the job failed";
#if defined(__GLIBCXX__)
        } catch (abi::__forced_unwind&) {  // an interpreter that ends stops threads that ask for its lock
            abandon(*job);
            throw;
#endif
        } catch (...) {
            job->error = "the job failed";
        }
        job->done.store(1, std::memory_order_release);
        wake_all(job->done);
    }
}

}  // namespace ktcore

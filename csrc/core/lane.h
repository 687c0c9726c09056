// A lane: one thread that runs jobs in order, started and awaited through C callbacks that a device stream can call.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace ktcore {

class Lane;

// One piece of host work. It stays valid for as long as a stream may call it, and can run any number of times.
struct Job {
    std::function<void()> work;
    Lane* lane = nullptr;
    std::atomic<uint32_t> done{1};
    std::string error;  // of the last run; empty when it went well. Read after `done`.
};

class Lane {
  public:
    Lane();
    ~Lane();
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    // Finishes what is queued and ends the thread; the destructor does so too.
    void close();
    // Queues the job; never blocks for long. Throws std::runtime_error on a closed lane and in a forked child.
    void start(Job& job);
    // Blocks until the job has ended: spins briefly, then sleeps.
    static void wait(Job& job);

    // `void (*)(void *)` with a Job; errors stay in the job, nothing is thrown into the caller.
    static void start_callback(void* job) noexcept;
    static void wait_callback(void* job) noexcept;

  private:
    void loop();
    void abandon(Job& job);
    bool forked() const;

    std::mutex mutex_;
    std::deque<Job*> queue_;
    std::atomic<uint32_t> epoch_{0};
    bool stop_ = false;
    int process_;
    std::thread thread_;
};

}  // namespace ktcore

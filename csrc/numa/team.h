// A pool on each NUMA node, each led by a thread of its own that sleeps when there is nothing to do.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "blocks/engine.h"
#include "core/lane.h"
#include "numa/memory.h"

namespace ktcore {

class NodeTeam {
  public:
    struct Place {
        std::vector<int> cpus;  // one a thread; the leader runs on the first
        int memory;             // physical node of its memory, or kAnyNode
    };
    // Several places may name one node: virtual nodes. Throws std::invalid_argument.
    explicit NodeTeam(const std::vector<Place>& places);
    ~NodeTeam();

    int nodes() const { return static_cast<int>(members_.size()); }
    const EnginePtr& engine(int node) const { return members_[static_cast<size_t>(node)]->engine; }
    int memory(int node) const { return members_[static_cast<size_t>(node)]->memory; }

    // Held by one caller from its first run to its last.
    std::mutex& mutex() { return mutex_; }
    // work(node) on every node's leader at once; returns when all have ended. Throws std::runtime_error with the text
    // of the first node's error.
    void run(const std::function<void(int)>& work);
    // Grow-only memory of a node, bound to it; by its leader's threads touched first. Contents are undefined.
    uint8_t* buffer(int node, size_t bytes);

  private:
    struct Member {
        EnginePtr engine;
        int memory;
        Memory buffer;
        Job job;
        std::unique_ptr<Lane> leader;  // last: its thread ends before the rest goes
    };
    std::vector<std::unique_ptr<Member>> members_;
    const std::function<void(int)>* work_ = nullptr;
    std::mutex mutex_;
};

using TeamPtr = std::shared_ptr<NodeTeam>;

}  // namespace ktcore

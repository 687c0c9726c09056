// Leaders are lanes, so that waiting spins briefly and then sleeps as everywhere else.
#include "numa/team.h"

#include <stdexcept>

namespace ktcore {

NodeTeam::NodeTeam(const std::vector<Place>& places) {
    check(!places.empty(), "a team needs a node");
    for (const Place& place : places) {
        check(!place.cpus.empty(), "each node of a team needs a CPU");
        check(place.memory >= kAnyNode, "a NUMA node's id is not negative");
        auto member = std::make_unique<Member>();
        member->engine = std::make_shared<Engine>(static_cast<int>(place.cpus.size()), place.cpus);
        member->memory = place.memory;
        member->leader = std::make_unique<Lane>();
        member->job.lane = member->leader.get();
        members_.push_back(std::move(member));
    }
    const std::function<void(int)> pin = [&](int node) { pin_this_thread(places[static_cast<size_t>(node)].cpus[0]); };
    for (int i = 0; i < nodes(); i++) members_[static_cast<size_t>(i)]->job.work = [this, i] { (*work_)(i); };
    run(pin);
}

NodeTeam::~NodeTeam() = default;

void NodeTeam::run(const std::function<void(int)>& work) {
    work_ = &work;
    for (auto& m : members_) Lane::start_callback(&m->job);  // throws nothing: those already started use `work`
    for (auto& m : members_) Lane::wait(m->job);
    for (int i = 0; i < nodes(); i++) {
        const std::string& error = members_[static_cast<size_t>(i)]->job.error;
        if (!error.empty()) throw std::runtime_error("node " + std::to_string(i) + " of the team: " + error);
    }
}

uint8_t* NodeTeam::buffer(int node, size_t bytes) {
    Member& m = *members_[static_cast<size_t>(node)];
    if (m.buffer.size() < bytes) {
        m.buffer = Memory();
        m.buffer = Memory(bytes + bytes / 4);
        bind_memory(m.buffer.data(), m.buffer.size(), m.memory);
    }
    return m.buffer.data();
}

}  // namespace ktcore

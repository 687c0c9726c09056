// Everything that threads share, in a program of its own that `make sanitize` builds with ThreadSanitizer: pools from
// birth to death, regions that steal, several engines and users at once, the lane, an experts block, a team of nodes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "blocks/experts.h"
#include "blocks/mlp.h"
#include "blocks/step.h"
#include "core/lane.h"
#include "numa/sharded_experts.h"

using namespace ktcore;

namespace {

void expect(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// Every item once, on a thread of the pool, and its writes visible when run() returns: plain memory on purpose.
void regions(Pool& pool, int rounds, int items) {
    std::vector<int> seen(static_cast<size_t>(items)), thread(static_cast<size_t>(items));
    for (int r = 1; r <= rounds; r++) {
        pool.run(items, [&](int i, int t) {
            seen[static_cast<size_t>(i)]++;
            thread[static_cast<size_t>(i)] = t;
            if (i % 7 == 0)
                for (volatile int spin = 0; spin < 200 * (i % 3); spin = spin + 1) {
                }
        });
        for (int i = 0; i < items; i++) {
            expect(seen[static_cast<size_t>(i)] == r, "an item was lost or ran twice");
            expect(thread[static_cast<size_t>(i)] < pool.threads(), "a thread that the pool does not have");
        }
    }
}

void birth_and_death() {
    for (int i = 0; i < 60; i++) {
        Pool pool(1 + i % 6, {});
        if (i % 3) regions(pool, 3, 1 + i);
        if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // its workers have gone to sleep
    }
}

void many_regions() {
    Pool pool(4, {});
    for (int items : {1, 2, 3, 5, 64, 1000}) regions(pool, 150, items);
    for (int i = 0; i < 20; i++) {  // between spinning and sleeping
        std::this_thread::sleep_for(std::chrono::microseconds(20 + 5 * i));
        regions(pool, 2, 40);
    }
}

// A thread an eighth as quick gets fewer items, does not begin one that the other ends sooner, and is found again. Sleeps
// stand for work, as long as the machine wakes threads in time: what it disturbs is tried again, a fault fails every try.
void uneven_threads() {
    Pool pool(2, {});
    std::atomic<int> slow{4000};
    int late = 0, rounds = 0;
    const auto region = [&] {
        int begun = 0;
        std::atomic<int> left{40};
        pool.run(40, [&](int, int t) {
            if (t == 1 && left.load() <= 2) begun++;
            std::this_thread::sleep_for(std::chrono::microseconds(t == 1 ? slow.load() : 500));
            left--;
        });
        late += begun, rounds++;
    };
    constexpr int kTries = 8;
    const auto once_of = [&](const auto& holds) {
        for (int i = 0; i < kTries; i++)
            if (holds()) return true;
        return false;
    };
    const auto slow_has_less = [&] {
        for (int i = 0; i < 60; i++) region();
        return pool.shares()[1] < 0.3f;
    };
    expect(once_of(slow_has_less), "a slow thread keeps an even share");
    const auto slow_waits = [&] {
        late = rounds = 0;
        for (int i = 0; i < 20; i++) region();
        return late <= rounds / 2;
    };
    expect(once_of(slow_waits), "a slow thread begins what is waited for");
    slow = 500;
    const auto even_again = [&] {
        for (int i = 0; i < 60; i++) region();
        return pool.shares()[1] > 0.35f && pool.shares()[1] < 0.65f;
    };
    expect(once_of(even_again), "a thread that is quick again stays without work");
}

void shared_pool() {
    Pool pool(3, {});
    std::vector<std::thread> users;
    for (int u = 0; u < 4; u++)
        users.emplace_back([&] {
            for (int i = 0; i < 30; i++) {
                std::lock_guard<std::mutex> hold(pool.mutex());
                uint8_t* shared = pool.arena(size_t{1000} * static_cast<size_t>(i + 1));
                pool.reserve_local(size_t{64} * static_cast<size_t>(i + 1));
                pool.run(25, [&](int item, int t) {
                    shared[item] = static_cast<uint8_t>(item);
                    pool.local(t)[0]++;
                });
            }
        });
    for (auto& u : users) u.join();
}

void refusals() {
    int refused = 0;
    for (const auto& make : {+[] { Pool(-1, {}); }, +[] { Pool(1 << 20, {}); }, +[] { Pool(1, {1 << 20}); }}) {
        try {
            make();
        } catch (const std::invalid_argument&) {
            refused++;
        }
    }
    expect(refused == 3, "a pool that cannot be was made");
    Pool pool(2, {});
    try {
        pool.arena(SIZE_MAX / 2);
        expect(false, "half of all memory was given");
    } catch (const std::bad_alloc&) {
    }
    regions(pool, 2, 10);
}

constexpr int kExperts = 4, kHidden = 64, kFfn = 96, kTokens = 24, kTopK = 2;

Bank bank_of(Engine& e) {
    auto bank = std::make_shared<ExpertBank>(kExperts, kHidden, kFfn, "Q8_0", "Q4_0", "F32");
    std::vector<uint8_t> gate(raw_bytes(Format::Q8_0, kFfn, kHidden)), up(raw_bytes(Format::Q4_0, kFfn, kHidden)),
        down(raw_bytes(Format::F32, kHidden, kFfn));
    for (int i = 0; i < kExperts; i++) {
        for (size_t b = 0; b < gate.size(); b++) gate[b] = b % 34 == 1 ? 0x1c : static_cast<uint8_t>(b * 7 + i);
        for (size_t b = 0; b < up.size(); b++) up[b] = b % 18 == 1 ? 0x1c : static_cast<uint8_t>(b * 5 + i);
        for (size_t b = 0; b < down.size(); b += 4) {
            const float v = std::sin(static_cast<float>(b + static_cast<size_t>(i)));
            std::memcpy(down.data() + b, &v, 4);
        }
        bank->pack(e.pool, i, {gate.data(), gate.size()}, {up.data(), up.size()}, {down.data(), down.size()});
    }
    return bank;
}

struct Call {
    std::vector<float> x = std::vector<float>(kTokens * kHidden), weights = std::vector<float>(kTokens * kTopK, 0.5f);
    std::vector<float> out = std::vector<float>(kTokens * kHidden);
    std::vector<int64_t> ids = std::vector<int64_t>(kTokens * kTopK);
    Call() {
        for (size_t i = 0; i < x.size(); i++) x[i] = std::cos(static_cast<float>(i));
        for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int64_t>(i * i % kExperts);
    }
    void run(ExpertsBlock& block) { block.forward(x.data(), ids.data(), weights.data(), out.data(), kTokens, kTopK); }
};

// Several engines at once, and their users one after the other; results depend on none of it.
void experts() {
    auto one = std::make_shared<Engine>(1, std::vector<int>{});
    ExpertsBlock alone(one, bank_of(*one), "silu", false, false);
    Call want;
    want.run(alone);
    std::vector<std::thread> engines;
    for (int threads = 2; threads <= 4; threads++)
        engines.emplace_back([&want, threads] {
            auto e = std::make_shared<Engine>(threads, std::vector<int>{});
            ExpertsBlock block(e, bank_of(*e), "silu", false, false);
            std::vector<std::thread> users;
            for (int u = 0; u < 2; u++)
                users.emplace_back([&] {
                    for (int i = 0; i < 3; i++) {
                        Call call;
                        call.run(block);
                        expect(call.out == want.out, "threads changed a result");
                    }
                });
            for (auto& u : users) u.join();
        });
    for (auto& e : engines) e.join();
}

// A lane that runs an experts block while its caller computes on another engine.
void lane() {
    auto e = std::make_shared<Engine>(2, std::vector<int>{});
    ExpertsBlock block(e, bank_of(*e), "silu", false, false);
    Call plain, beside;
    plain.run(block);
    Lane lane;
    Job work, failing;
    work.lane = failing.lane = &lane;
    work.work = [&] { beside.run(block); };
    failing.work = [] { throw std::runtime_error("on purpose"); };
    Pool own(2, {});
    for (int i = 0; i < 12; i++) {
        Lane::start_callback(&work);
        Lane::start_callback(&failing);
        regions(own, 2, 30);
        Lane::wait_callback(&work);
        expect(beside.out == plain.out && work.error.empty(), "the lane changed a result");
        Lane::wait_callback(&failing);
        expect(failing.error == "on purpose", "an error was lost");
        if (i % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::vector<Job> queued(50);
    std::vector<int> ran;
    for (size_t i = 0; i < queued.size(); i++) {
        queued[i].lane = &lane;
        queued[i].work = [&ran, i] { ran.push_back(static_cast<int>(i)); };
        lane.start(queued[i]);
    }
    lane.close();
    expect(ran.size() == queued.size(), "closing dropped a job");
    Lane::start_callback(&work);
    expect(work.error == "the lane is closed" && work.done.load() == 1, "a closed lane took a job");
}

// A team of two nodes with two users at once: leaders, their pools, and sums added by one thread or by all nodes.
void node_team() {
    auto team = std::make_shared<NodeTeam>(std::vector<NodeTeam::Place>{{{allowed_cpus()[0], allowed_cpus()[0]}, kAnyNode},
                                                                        {{allowed_cpus()[0]}, kAnyNode}});
    const Bank bank = bank_of(*team->engine(0));
    ShardedExpertsBlock block(team, {{bank, 0}, {bank, 0}}, {kExperts, {2, 1}, "silu", false, false});
    constexpr int kCopies = 40;  // of Call's tokens: more values than one thread adds
    const auto run = [&](int copies) {
        Call one;
        std::vector<float> x, weights, out(one.out.size() * static_cast<size_t>(copies));
        std::vector<int64_t> ids;
        for (int i = 0; i < copies; i++) {
            x.insert(x.end(), one.x.begin(), one.x.end());
            weights.insert(weights.end(), one.weights.begin(), one.weights.end());
            ids.insert(ids.end(), one.ids.begin(), one.ids.end());
        }
        block.forward(x.data(), ids.data(), weights.data(), out.data(), kTokens * copies, kTopK);
        return out;
    };
    const std::vector<float> want = run(1);
    std::vector<std::thread> users;
    for (int u = 0; u < 2; u++)
        users.emplace_back([&] {
            for (int copies : {1, kCopies, 2}) {
                const std::vector<float> got = run(copies);
                for (size_t i = 0; i < got.size(); i++) expect(got[i] == want[i % want.size()], "a node changed a result");
            }
        });
    for (auto& u : users) u.join();
}

// One step's tables asked for by two engines' threads.
void shared_step() {
    Step step({0, 1, 2, 0, 1}, {0, 3, 5}, {3, 2}, {0, 1}, 1);
    std::vector<std::thread> users;
    for (int u = 0; u < 4; u++)
        users.emplace_back([&, u] {
            for (int i = 0; i < 20; i++) {
                step.check_pages(2 + i, 16);
                expect(step.rotations({1.f, 0.5f}, static_cast<float>(1 + (i + u) % 5))[0] > 0, "no rotation");
            }
        });
    for (auto& u : users) u.join();
}

}  // namespace

int main() {
    birth_and_death();
    many_regions();
    uneven_threads();
    shared_pool();
    refusals();
    experts();
    lane();
    node_team();
    shared_step();
    std::puts("threads: all well");
}

// Checks of slots, and the convolution by blocks of channels.
#include "blocks/delta_states.h"

#include <algorithm>
#include <cstring>

namespace ktcore {
namespace {
constexpr int kConvChannels = 256;  // of one work item
}

StateSlots::StateSlots(const Step& step, const std::vector<int32_t>& slots, const std::vector<KeptState>& keep, int64_t count)
    : own(slots), kept(keep) {
    check(static_cast<int>(own.size()) == step.sequences(), "there must be one state slot for each sequence");
    check(kept.empty() || kept.size() == own.size(), "states are kept of each sequence, or of none");
    std::vector<int32_t> sorted(own);
    for (size_t i = 0; i < kept.size(); i++) {
        if (kept[i].slot == -1) continue;
        check(kept[i].tokens > 0 && kept[i].tokens <= step.queries(static_cast<int>(i)),
              "a state is kept after some of a sequence's tokens in the step");
        sorted.push_back(kept[i].slot);
    }
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; i < sorted.size(); i++)
        check(sorted[i] >= 0 && sorted[i] < count && (i == 0 || sorted[i] != sorted[i - 1]),
              "state slot " + std::to_string(sorted[i]) + " is used twice or not one of " + std::to_string(count));
}

// Channels are independent of each other: an item takes some of them through all tokens of a sequence.
void convolve(Engine& e, const Step& step, const StateSlots& slots, const DeltaStates& states, const Vector& taps, int width,
              int channels, const float* in, float* out) {
    const int keep = width - 1, blocks = (channels + kConvChannels - 1) / kConvChannels;
    const size_t ld = static_cast<size_t>(channels);
    e.pool.run(step.sequences() * blocks, [&](int item, int) {
        const int seq = item / blocks, c0 = item % blocks * kConvChannels, cols = std::min(kConvChannels, channels - c0);
        const int n = step.queries(seq);
        if (n == 0) return;
        const size_t bytes = sizeof(float) * static_cast<size_t>(cols), first = static_cast<size_t>(step.q_start(seq)) * ld;
        const float* x = in + first + c0;
        const size_t size = static_cast<size_t>(keep) * ld;  // of a slot
        float* before = states.conv + slots.of(seq) * size + c0;
        if (step.context(seq) == n)
            for (int r = 0; r < keep; r++) std::memset(before + static_cast<size_t>(r) * ld, 0, bytes);
        const auto input = [&](int t) { return t < 0 ? before + static_cast<size_t>(keep + t) * ld : x + static_cast<size_t>(t) * ld; };
        for (int t = 0; t < n; t++) {
            const float* rows[kMaxConvWidth];
            for (int w = 0; w <= keep; w++) rows[w] = input(t - keep + w);
            e.kernels.conv_silu(rows, width, taps.data() + c0, ld, cols, out + first + static_cast<size_t>(t) * ld + c0);
        }
        if (const KeptState k = slots.keep(seq); k.slot >= 0)
            for (int r = 0; r < keep; r++)
                std::memcpy(states.conv + static_cast<size_t>(k.slot) * size + static_cast<size_t>(r) * ld + c0,
                            input(k.tokens - keep + r), bytes);
        // ascending: a row that is kept moves down, onto one that is not needed any more
        for (int r = 0; r < keep; r++) std::memmove(before + static_cast<size_t>(r) * ld, input(n - keep + r), bytes);
    });
}

}  // namespace ktcore

// The router's choice, a sub-group a token. Macros: EXPERTS, GROUPS, KEPT, TOP; SIGMOID, TWO_BEST, RENORMALISE,
// ON_LOGITS 0 or 1. Of equal scores the lower id is chosen.

KERNEL void route(const float *logits, const float *bias, std::int64_t *ids, float *weights, float eps, float scale) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int lane = lanes.get_local_linear_id();
    const std::size_t token = item.get_group(2);
    const float *mine = logits + token * EXPERTS;
    LOCAL(float, score, EXPERTS);
    LOCAL(float, choice, EXPERTS);
    float top = -NOTHING, total = 0.0f;
    for (int e = lane; e < EXPERTS; e += LANES) top = sycl::fmax(top, mine[e]);
    top = lanes_max(lanes, top);
    for (int e = lane; e < EXPERTS; e += LANES) total += sycl::exp(mine[e] - top);
    total = lanes_sum(lanes, total);
    for (int e = lane; e < EXPERTS; e += LANES) {
        const float plain = SIGMOID ? 1.0f / (1.0f + sycl::exp(-mine[e])) : sycl::exp(mine[e] - top) / total;
        score[e] = ON_LOGITS && !SIGMOID ? mine[e] : plain;
        choice[e] = ON_LOGITS ? mine[e] : bias ? plain + bias[e] : plain;
    }
    sycl::group_barrier(lanes);
    if constexpr (GROUPS > 1) {
        constexpr int EACH = EXPERTS / GROUPS;
        LOCAL(float, group, GROUPS);
        for (int g = lane; g < GROUPS; g += LANES) {
            float first = -NOTHING, second = -NOTHING;
            for (int e = g * EACH; e < (g + 1) * EACH; ++e) {
                second = sycl::fmax(second, sycl::fmin(first, choice[e]));
                first = sycl::fmax(first, choice[e]);
            }
            group[g] = TWO_BEST ? first + second : first;
        }
        sycl::group_barrier(lanes);
        for (int e = lane; e < EXPERTS; e += LANES) {
            int better = 0;
            for (int g = 0; g < GROUPS; ++g) {
                better += group[g] > group[e / EACH] || (group[g] == group[e / EACH] && g < e / EACH);
            }
            if (better >= KEPT) choice[e] = TWO_BEST ? -NOTHING : 0.0f;
        }
        sycl::group_barrier(lanes);
    }
    int picked[TOP];
    float chosen[TOP], sum = 0.0f, largest = 0.0f;
    for (int k = 0; k < TOP; ++k) {
        float best = -NOTHING;
        int at = EXPERTS;
        for (int e = lane; e < EXPERTS; e += LANES) {
            if (choice[e] > best || (choice[e] == best && e < at)) {
                best = choice[e];
                at = e;
            }
        }
        const float winner = lanes_max(lanes, best);
        at = sycl::reduce_over_group(lanes, best == winner ? at : EXPERTS, sycl::minimum<int>());
        // nothing but what is not a number is left: the lowest that is not chosen yet
        if (at == EXPERTS) {
            bool used = true;
            for (at = -1; used;) {
                ++at;
                used = false;
                for (int j = 0; j < k; ++j) used = used || picked[j] == at;
            }
        }
        picked[k] = at;
        chosen[k] = score[at];
        if (k == 0) largest = score[at];
        if constexpr (ON_LOGITS && !SIGMOID) chosen[k] = sycl::exp(chosen[k] - largest);
        sum += chosen[k];
        if (lane == 0) {
            // no score is equal to it, as -inf may be to others
            choice[at] = __builtin_nanf("");
            ids[token * TOP + k] = at;
        }
        sycl::group_barrier(lanes);
    }
    float factor = scale;
    if constexpr (ON_LOGITS && !SIGMOID) {
        factor = RENORMALISE ? scale / sum / (1.0f + eps) : scale / sum;
    } else if constexpr (RENORMALISE) {
        factor = scale / (sum + eps);
    }
    for (int k = lane; k < TOP; k += LANES) weights[token * TOP + k] = chosen[k] * factor;
}

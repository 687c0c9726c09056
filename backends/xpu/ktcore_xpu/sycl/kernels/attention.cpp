// Attention over a paged cache, keys in splits that `merge` puts together. A sub-group takes a query head, a work-group
// up to HEADS heads that share keys, which it reads tile by tile into local memory.
// Macros: CACHE type; KEY and VALUE widths, multiples of 16; HEADS; LATENT: a key's first VALUE numbers are its value.

constexpr int TILE = LANES;

KERNEL void attend(const float *q, const CACHE *keys, const CACHE *values, const int *sequence, const int *visible,
                   const int *table, float *parts, float *stats, int heads, int kv_heads, int blocks, int page,
                   int splits, int window, int chunk, float scale) {
    const auto item = here();
    const auto lanes = item.get_sub_group();
    const int lane = lanes.get_local_linear_id(), local = item.get_local_linear_id();
    const int token = item.get_group(0), split = item.get_group(2);
    const int group = heads / kv_heads, sets = (group + HEADS - 1) / HEADS;
    const int kv_head = item.get_group(1) / sets;
    const int within = item.get_group(1) % sets * HEADS + static_cast<int>(lanes.get_group_linear_id());
    const int head = kv_head * group + sycl::min(within, group - 1);
    const int *pages = table + static_cast<std::size_t>(sequence[token]) * blocks;
    const int end = visible[token];
    int begin = window ? sycl::max(0, end - window) : 0;
    if (chunk) begin = sycl::max(begin, (end - 1) / chunk * chunk);
    const int span = ((end - begin + splits - 1) / splits + TILE - 1) / TILE * TILE;
    const int from = begin + split * span, to = sycl::min(end, from + span);

    float query[KEY / LANES], sum[VALUE / LANES] = {};
    const float *mine = q + (static_cast<std::size_t>(token) * heads + head) * KEY;
    for (int i = 0; i < KEY / LANES; ++i) query[i] = mine[i * LANES + lane] * scale;
    LOCAL(CACHE, tile, TILE * KEY);
#if LATENT
    CACHE *tile_v = tile;
    constexpr int STRIDE = KEY;
#else
    LOCAL(CACHE, tile_v, TILE * VALUE);
    constexpr int STRIDE = VALUE;
#endif
    float top = -NOTHING, total = 0.0f;
    for (int first = from; first < to; first += TILE) {
        const int count = sycl::min(TILE, to - first);
        for (int j = 0; j < count; ++j) {
            const int at = first + j;
            const std::size_t slot = static_cast<std::size_t>(pages[at / page]) * page + at % page;
            const std::size_t row = slot * kv_heads + kv_head;
            for (int i = local; i < KEY; i += HEADS * LANES) tile[j * KEY + i] = keys[row * KEY + i];
#if !LATENT
            for (int i = local; i < VALUE; i += HEADS * LANES) tile_v[j * VALUE + i] = values[row * VALUE + i];
#endif
        }
        sycl::group_barrier(item.get_group());
        float score = -NOTHING;
        for (int j = 0; j < count; ++j) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < KEY / LANES; ++i) dot += query[i] * static_cast<float>(tile[j * KEY + i * LANES + lane]);
            dot = lanes_sum(lanes, dot);
            if (lane == j) score = dot;
        }
        const float next = sycl::fmax(top, lanes_max(lanes, score));
        const float fade = sycl::exp(top - next), weight = sycl::exp(score - next);
        total = total * fade + lanes_sum(lanes, weight);
        top = next;
        for (int i = 0; i < VALUE / LANES; ++i) sum[i] *= fade;
        for (int j = 0; j < count; ++j) {
            const float share = sycl::group_broadcast(lanes, weight, j);
#pragma unroll
            for (int i = 0; i < VALUE / LANES; ++i) {
                sum[i] += share * static_cast<float>(tile_v[j * STRIDE + i * LANES + lane]);
            }
        }
        sycl::group_barrier(item.get_group());
    }
    if (within >= group) return;
    const std::size_t part = (static_cast<std::size_t>(token) * heads + head) * splits + split;
    for (int i = 0; i < VALUE / LANES; ++i) parts[part * VALUE + i * LANES + lane] = sum[i];
    if (lane == 0) stats[2 * part] = top;
    if (lane == 0) stats[2 * part + 1] = total;
}

// one sub-group a token and head; `sinks` [heads] are logits without a value, or null
KERNEL void merge(const float *parts, const float *stats, const float *sinks, float *out, int heads, int splits) {
    const auto item = here();
    const int lane = item.get_local_linear_id();
    const int head = item.get_group(1);
    const std::size_t row = item.get_group(0) * heads + head, first = row * splits;
    float top = sinks ? sinks[head] : -NOTHING;
    for (int s = 0; s < splits; ++s) top = sycl::fmax(top, stats[2 * (first + s)]);
    float total = sinks ? sycl::exp(sinks[head] - top) : 0.0f;
    for (int s = 0; s < splits; ++s) total += stats[2 * (first + s) + 1] * sycl::exp(stats[2 * (first + s)] - top);
    for (int i = lane; i < VALUE; i += LANES) {
        float sum = 0.0f;
        for (int s = 0; s < splits; ++s) sum += parts[(first + s) * VALUE + i] * sycl::exp(stats[2 * (first + s)] - top);
        out[row * VALUE + i] = sum / total;
    }
}

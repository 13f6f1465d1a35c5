// A code for each row of logits: guidance, temperature, top-k, top-p and the largest sum of logit and Gumbel noise, as
// draw.py and noise.py have it.
#include <algorithm>
#include <cmath>
#include <functional>

#include "vector.h"

typedef uint64_t lvec __attribute__((vector_size(LANES * 8)));

template <typename T> static inline T mix(T x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

static inline vec gumbel(uint64_t state, lvec counter) {
    const uvec bits = __builtin_convertvector(mix(state + counter * GOLDEN) >> 32, uvec);
    const vec most = vec{} + (1.0f - 0x1p-24f);
    vec uniform = (__builtin_convertvector(bits, vec) + 0.5f) * 0x1p-32f;
    uniform = uniform > most ? most : uniform;
    const vec rest = 1.0f - uniform;  // its rounding error is taken out again
    const vec lost = 1.0f - rest;
    return -logarithm(lost == 0.0f ? uniform : logarithm(rest) * -uniform / (lost == 0.0f ? vec{} + 1.0f : lost));
}

struct Draw {
    int32_t batch, vocabulary, guided, top_k, threads;
    float scale, temperature, top_p;
    uint64_t seed, step;
    const int64_t* index;  // (batch)
    const float* logits;   // (batch, vocabulary), or twice as many rows where guided
    float* scratch;        // (batch, 2, vocabulary)
    int64_t* codes;        // (batch), `stride` apart
    int64_t stride;
    bool* broken;          // (batch), set where logits are not finite
};

// By its bits: a compiler that was told of no infinities (-ffast-math) would leave out comparisons.
static inline uint32_t not_finite(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

// The smallest logit above which at most the probability `most` lies. Halves the range like quickselect: no sort.
static float nucleus(float* from, float* end, double most) {
    double total = 0.0, above = 0.0;
    for (float* at = from; at < end; at++) total += std::exp(*at);
    float smallest = INFINITY;
    while (from < end && above <= most * total) {
        const float pivot = std::max(std::min(*from, end[-1]), std::min(std::max(*from, end[-1]), from[(end - from) / 2]));
        float* middle = std::partition(from, end, [=](float x) { return x > pivot; });
        double more_likely = above;
        for (float* at = from; at < middle; at++) more_likely += std::exp(*at);
        if (more_likely > most * total) {
            end = middle;
            continue;
        }
        float* rest = std::partition(middle, end, [=](float x) { return x == pivot; });
        above = more_likely + (rest - middle) * (double)std::exp(pivot);
        smallest = pivot;
        from = rest;
    }
    return smallest;
}

// The smallest of the logits that may be drawn; `kept` is a copy of them, which is reordered.
static float threshold(const Draw& d, float* kept) {
    float *end = kept + d.vocabulary, smallest = -INFINITY;
    if (d.top_k > 0 && d.top_k < d.vocabulary) {
        std::nth_element(kept, kept + d.top_k - 1, end, std::greater<float>());
        end = kept + d.top_k;
        smallest = end[-1];
    }
    if (d.top_p < 1.0f) smallest = nucleus(kept, end, d.top_p);
    return smallest;
}

static int64_t draw_row(const Draw& d, int row) {
    const int V = d.vocabulary;
    const float *conditional = d.logits + (int64_t)row * V, *unconditional = conditional + (int64_t)d.batch * V;
    float *value = d.scratch + (int64_t)row * 2 * V, top = -INFINITY;
    int64_t best = 0;
    uint32_t broken = 0;
    for (int i = 0; i < V; i++) broken |= not_finite(conditional[i]);
    for (int i = 0; d.guided && i < V; i++) broken |= not_finite(unconditional[i]);
    for (int i = 0; i < V; i++) {
        const float x = d.guided && d.scale != 1.0f ? unconditional[i] + d.scale * (conditional[i] - unconditional[i])
                                                    : conditional[i];
        value[i] = x;
        if (x > top) top = x, best = i;
    }
    if (d.guided)  // finite branches may be far enough apart for their difference not to be
        for (int i = 0; i < V; i++) broken |= not_finite(value[i]);
    if (broken) d.broken[row] = true;
    if (d.temperature == 0.0f) return best;
    for (int i = 0; i < V; i++) value[i] = (value[i] - top) / d.temperature;
    float smallest = -INFINITY;
    if (d.top_p < 1.0f || (d.top_k > 0 && d.top_k < V)) {
        std::copy(value, value + V, value + V);
        smallest = threshold(d, value + V);
    }
    uint64_t state = mix(d.seed + GOLDEN);
    state = mix((state ^ (uint64_t)d.index[row]) + GOLDEN);
    state = mix((state ^ d.step) + GOLDEN);
    lvec counter;
    for (int i = 0; i < LANES; i++) counter[i] = i + 1;
    float most = -INFINITY;
    for (int i = 0; i < V; i += LANES, counter += LANES) {
        const vec noise = gumbel(state, counter);
        for (int j = 0; j < LANES && i + j < V; j++) {
            const float sum = value[i + j] >= smallest ? value[i + j] + noise[j] : -INFINITY;
            if (sum > most) most = sum, best = i + j;
        }
    }
    return best;
}

extern "C" void draw(const Draw* d) {
#pragma omp parallel for num_threads(d->threads)
    for (int row = 0; row < d->batch; row++) d->codes[row * d->stride] = draw_row(*d, row);
}

// Samples codes from logits: guidance, temperature, top-k, top-p, and the largest sum of logit and Gumbel
// noise. The same arithmetic as in logits.py and noise.py.
#include <omp.h>

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
    const vec limit = vec{} + (1.0f - 0x1p-24f);
    vec uniform = (__builtin_convertvector(bits, vec) + 0.5f) * 0x1p-32f;
    uniform = uniform > limit ? limit : uniform;
    const vec rest = 1.0f - uniform;  // log1p(-uniform), corrected for the rounding error of this difference
    const vec lost = 1.0f - rest;
    return -logarithm(lost == 0.0f ? uniform : logarithm(rest) * -uniform / (lost == 0.0f ? vec{} + 1.0f : lost));
}

// `count` draws. Mirrored by _Sampling in step.py.
struct Sampling {
    int32_t count, vocabulary, top_k, threads;
    float temperature, top_p;
    const float* logits;          // (rows, vocabulary)
    const int32_t* conditional;   // (count): row of the logits
    const int32_t* unconditional; // (count): row of the logits, the conditional one if the draw is not guided
    const float* scale;           // (count): guidance scale
    const uint64_t* seed;         // (count)
    const int64_t* index;         // (count)
    const int64_t* step;          // (count)
    float* scratch;               // (threads, 2, vocabulary)
    int64_t* codes;               // (count)
    bool* broken;                 // (count): whether logits are not finite
};

// footgun: comparisons with infinity could be optimized away under -ffast-math; the bits cannot.
static inline uint32_t not_finite(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

// The smallest logit such that all larger ones together have at most the probability top_p. Like quickselect, it
// partitions around pivots and does not sort.
static float nucleus(float* from, float* end, double top_p) {
    double total = 0.0, above = 0.0;
    for (float* at = from; at < end; at++) total += std::exp(*at);
    float smallest = INFINITY;
    while (from < end && above <= top_p * total) {
        const float pivot = std::max(std::min(*from, end[-1]), std::min(std::max(*from, end[-1]), from[(end - from) / 2]));
        float* middle = std::partition(from, end, [=](float x) { return x > pivot; });
        double more_likely = above;
        for (float* at = from; at < middle; at++) more_likely += std::exp(*at);
        if (more_likely > top_p * total) {
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

// The smallest logit that top-k and top-p keep; `kept` is a copy of the logits, which is reordered.
static float threshold(const Sampling& call, float* kept) {
    float *end = kept + call.vocabulary, smallest = -INFINITY;
    if (call.top_k > 0 && call.top_k < call.vocabulary) {
        std::nth_element(kept, kept + call.top_k - 1, end, std::greater<float>());
        end = kept + call.top_k;
        smallest = end[-1];
    }
    if (call.top_p < 1.0f) smallest = nucleus(kept, end, call.top_p);
    return smallest;
}

// The code of draw n; `value` has room for 2 vocabularies.
static int64_t draw(const Sampling& call, int n, float* value) {
    const int V = call.vocabulary;
    const bool branches = call.unconditional[n] != call.conditional[n];
    const float scale = call.scale[n], *conditional = call.logits + (int64_t)call.conditional[n] * V;
    const float* unconditional = branches ? call.logits + (int64_t)call.unconditional[n] * V : conditional;
    float top = -INFINITY;
    int64_t best = 0;
    uint32_t broken = 0;
    for (int i = 0; i < V; i++) broken |= not_finite(conditional[i]);
    for (int i = 0; branches && i < V; i++) broken |= not_finite(unconditional[i]);
    for (int i = 0; i < V; i++) {
        const bool guide = branches && scale != 1.0f;
        const float x = guide ? unconditional[i] + scale * (conditional[i] - unconditional[i]) : conditional[i];
        value[i] = x;
        if (x > top) top = x, best = i;
    }
    if (branches)  // the difference of two finite branches may overflow
        for (int i = 0; i < V; i++) broken |= not_finite(value[i]);
    call.broken[n] = broken;
    if (call.temperature == 0.0f) return best;
    for (int i = 0; i < V; i++) value[i] = (value[i] - top) / call.temperature;
    float smallest = -INFINITY;
    if (call.top_p < 1.0f || (call.top_k > 0 && call.top_k < V)) {
        std::copy(value, value + V, value + V);
        smallest = threshold(call, value + V);
    }
    uint64_t state = mix(call.seed[n] + GOLDEN);
    state = mix((state ^ (uint64_t)call.index[n]) + GOLDEN);
    state = mix((state ^ (uint64_t)call.step[n]) + GOLDEN);
    lvec counter;
    for (int i = 0; i < LANES; i++) counter[i] = i + 1;
    float largest = -INFINITY;
    for (int i = 0; i < V; i += LANES, counter += LANES) {
        const vec noise = gumbel(state, counter);
        for (int j = 0; j < LANES && i + j < V; j++) {
            const float sum = value[i + j] >= smallest ? value[i + j] + noise[j] : -INFINITY;
            if (sum > largest) largest = sum, best = i + j;
        }
    }
    return best;
}

extern "C" void sample_codes(const Sampling* call) {
#pragma omp parallel num_threads(call->threads)
    {
        float* value = call->scratch + (int64_t)omp_get_thread_num() * 2 * call->vocabulary;
#pragma omp for
        for (int n = 0; n < call->count; n++) call->codes[n] = draw(*call, n, value);
    }
}

// Samples codes from logits: guidance, temperature, top-k, top-p, and the largest sum of logit and Gumbel
// noise. The same arithmetic as in logits.py and noise.py.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "vector.h"

typedef uint64_t lvec __attribute__((vector_size(LANES * 8)));
typedef float half_vec __attribute__((vector_size(LANES * 2)));
typedef double half_dvec __attribute__((vector_size(LANES * 4)));

template <typename T> static inline T mix(T x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

static inline vec gumbel(uvec bits) {
    const vec limit = vec{} + (1.0f - 0x1p-24f);
    vec uniform = (__builtin_convertvector(bits, vec) + 0.5f) * 0x1p-32f;
    uniform = uniform > limit ? limit : uniform;
    const vec rest = 1.0f - uniform;  // log1p(-uniform), corrected for the rounding error of this difference
    const vec lost = 1.0f - rest;
    return -logarithm(lost == 0.0f ? uniform : logarithm(rest) * -uniform / (lost == 0.0f ? vec{} + 1.0f : lost));
}

// At least the noise, and cheap to compute: -log(u) ≥ -log(-log(1 - u)), and the bits of a float, read as an integer,
// are at most its logarithm. The last term exceeds all rounding errors.
static inline vec noise_limit(uvec bits) {
    const ivec number = (ivec)(__builtin_convertvector(bits, vec) + 0.5f);
    return (32.0f + 127.0f - __builtin_convertvector(number, vec) * 0x1p-23f) * 0.693147181f + 1e-3f;
}
constexpr float MAX_NOISE = 23.0f;

// `count` draws. Mirrored by _Sampling in step.py.
struct Sampling {
    int32_t count, rows, vocabulary, padded, top_k, threads;
    float temperature, top_p;
    const float* logits;          // (rows, vocabulary)
    const int64_t* conditional;   // (count): row of the logits
    const int64_t* unconditional; // (count): row of the logits, the conditional one if the draw is not guided
    const float* scale;           // (count): guidance scale
    const uint64_t* seed;         // (count)
    const int64_t* index;         // (count)
    const int64_t* step;          // (count)
    float* scratch;               // (threads, 2, padded): room for a vocabulary in whole vectors
    int64_t* codes;               // (count)
    bool* broken;                 // (count): whether logits are not finite
};

// footgun: comparisons with infinity could be optimized away under -ffast-math; the bits cannot.
static inline ivec not_finite(vec x) { return ((ivec)x & 0x7f800000) == 0x7f800000; }

static inline bool any(ivec lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    return lanes[0] | lanes[1] | lanes[2] | lanes[3];
#endif
}

// Logits of at most 0, and their weights; null means 1.
struct Weighted {
    const float *logits, *weights;
    int count;
};
struct Total {
    double weight;
    int count;
};

// The logits larger than `limit`.
static Total larger(const Weighted& all, float limit) {
    half_dvec weights[2] = {half_dvec{}, half_dvec{}};
    ivec counts = ivec{};
    for (int i = 0; i < all.count; i += LANES) {
        const ivec chosen = load(all.logits + i) > limit;  // -1 or 0
        counts -= chosen;
        if (all.weights) {
            const ivec chosen_weights = chosen & (ivec)load(all.weights + i);
            half_vec halves[2];
            memcpy(halves, &chosen_weights, sizeof halves);
            for (int h = 0; h < 2; h++) weights[h] += __builtin_convertvector(halves[h], half_dvec);
        }
    }
    Total total = {0.0, 0};
    for (int i = 0; i < LANES; i++) total.weight += weights[i % 2][i / 2], total.count += counts[i];
    if (!all.weights) total.weight = total.count;
    return total;
}

static inline float logit_of_size(uint32_t size) {
    float x;
    memcpy(&x, &size, 4);
    return -x;
}

// The smallest logit, at least `lowest`, such that all larger ones together have at most the weight `limit`. Halves an
// interval of sizes: the bits of floats of one sign have the order of the floats.
static float smallest_kept(const Weighted& all, double limit, float lowest) {
    constexpr int FEW = 64;
    uint32_t low = 0, high;
    const float largest_size = -lowest;
    memcpy(&high, &largest_size, 4);
    Total at_low = {0.0, 0}, at_high = larger(all, lowest);
    if (!(at_high.weight > limit)) return lowest;
    while (high - low > 1 && at_high.count - at_low.count > FEW) {
        const uint32_t middle = low + (high - low) / 2;
        const Total found = larger(all, logit_of_size(middle));
        if (found.weight > limit)
            high = middle, at_high = found;
        else
            low = middle, at_low = found;
    }
    if (high - low <= 1) return logit_of_size(low);
    // Few are left between the two: go through them from the largest on.
    std::pair<float, float> rest[FEW];
    const float begin = logit_of_size(low), end = logit_of_size(high);
    int count = 0;
    for (int i = 0; i < all.count; i += LANES) {
        const vec x = load(all.logits + i);
        if (any((x <= begin) & (x > end)))
            for (int j = i; j < i + LANES; j++)
                if (all.logits[j] <= begin && all.logits[j] > end)
                    rest[count++] = {all.logits[j], all.weights ? all.weights[j] : 1.0f};
    }
    std::sort(rest, rest + count);
    double weight = at_low.weight;
    float smallest = rest[count - 1].first;
    while (count--) {
        if (rest[count].first != smallest && weight > limit) break;
        smallest = rest[count].first;
        weight += rest[count].second;
    }
    return smallest;
}

// The smallest logit that top-k and top-p keep; `weights` has room for a vocabulary.
static float threshold(const Sampling& call, const float* logits, float* weights) {
    float smallest = -INFINITY;
    const bool limited = call.top_k > 0 && call.top_k < call.vocabulary;
    if (limited) smallest = smallest_kept({logits, nullptr, call.padded}, call.top_k - 1, smallest);
    if (call.top_p == 1.0f) return smallest;
    for (int i = 0; i < call.padded; i += LANES) store(exponential(load(logits + i)), weights + i);
    const Weighted all = {logits, weights, call.padded};
    Total total = larger(all, smallest);
    if (limited) total.weight += (call.top_k - total.count) * (double)std::exp(smallest);  // of equal ones, k count
    return smallest_kept(all, call.top_p * total.weight, smallest);
}

// The code of draw n; `value` has room for 2 vocabularies.
static int64_t draw(const Sampling& call, int n, float* value) {
    const int V = call.vocabulary;
    const bool branches = call.unconditional[n] != call.conditional[n];
    const float scale = call.scale[n], *conditional = call.logits + call.conditional[n] * V;
    const float* unconditional = branches ? call.logits + call.unconditional[n] * V : conditional;
    const bool guide = branches && scale != 1.0f;
    vec tops = vec{} - INFINITY;
    ivec broken = ivec{};
    for (int i = 0; i < call.padded; i += LANES) {
        const int count = V - i < LANES ? V - i : LANES;
        vec c = vec{}, u = vec{};
        if (count == LANES)
            c = load(conditional + i), u = load(unconditional + i);
        else
            for (int j = 0; j < count; j++) c[j] = conditional[i + j], u[j] = unconditional[i + j];
        vec x = guide ? u + scale * (c - u) : c;
        broken |= not_finite(c) | not_finite(u) | not_finite(x);  // the difference of finite branches may overflow
        for (int j = count > 0 ? count : 0; j < LANES; j++) x[j] = -INFINITY;
        store(x, value + i);
        tops = x > tops ? x : tops;
    }
    const float top = maximum(tops);
    call.broken[n] = any(broken);
    int64_t best = 0;
    for (int i = 0; i < call.padded && top > -INFINITY; i += LANES)
        if (any(load(value + i) == top)) {
            for (best = i; value[best] != top;) best++;
            break;
        }
    if (call.temperature == 0.0f) return best;
    for (int i = 0; i < call.padded; i += LANES) store((load(value + i) - top) / call.temperature, value + i);
    float smallest = -INFINITY;
    if (call.top_p < 1.0f || (call.top_k > 0 && call.top_k < V)) smallest = threshold(call, value, value + call.padded);
    uint64_t state = mix(call.seed[n] + GOLDEN);
    state = mix((state ^ (uint64_t)call.index[n]) + GOLDEN);
    state = mix((state ^ (uint64_t)call.step[n]) + GOLDEN);
    lvec counter;
    for (int i = 0; i < LANES; i++) counter[i] = state + (i + 1) * GOLDEN;
    float largest = -INFINITY;
    for (int i = 0; i < call.padded; i += LANES, counter += LANES * GOLDEN) {
        // Few codes can exceed the largest sum so far, so the noise of most is not computed.
        const vec x = load(value + i);
        const ivec kept = x >= smallest;
        if (!any(kept & (x + MAX_NOISE >= largest))) continue;
        const uvec bits = __builtin_convertvector(mix(counter) >> 32, uvec);
        if (!any(kept & (x + noise_limit(bits) >= largest))) continue;
        const vec sum = kept ? x + gumbel(bits) : vec{} - INFINITY;
        for (int j = 0; j < LANES; j++)
            if (sum[j] > largest) largest = sum[j], best = i + j;
    }
    return best;
}

// Returns false, and samples nothing, if a draw names a row that the logits do not have.
extern "C" bool sample_codes(const Sampling* call) {
    for (int n = 0; n < call->count; n++)
        for (int64_t row : {call->conditional[n], call->unconditional[n]})
            if (row < 0 || row >= call->rows) return false;
    // footgun: OpenMP ends and starts threads if the size of the team changes, so it is that of the passes or 1.
#pragma omp parallel num_threads(call->threads) if (call->count > 1)
    {
        float* value = call->scratch + (int64_t)omp_get_thread_num() * 2 * call->padded;
#pragma omp for
        for (int n = 0; n < call->count; n++) call->codes[n] = draw(*call, n, value);
    }
    return true;
}

// Attention of new tokens to the cached ones. Queries that share keys (the tokens of a row, the heads of a group) are
// computed together, so that each key and value is read once for up to QUERIES of them.
//
// The result of a query does not depend on the other queries: each sum runs over the positions, or over the elements of
// a head, in the same order. Positions that a query does not attend to are masked, never multiplied by 0, because a
// token after it may not be finite.
//
// The cache of a sequence and head holds 32-bit words: one float, or two neighbouring bfloat16 values.
// - Keys: blocks of LANES positions, in each (width / PAIR, LANES, PAIR). A lane computes the score of a position.
// - Values: (capacity / PAIR, width, PAIR). A lane computes an element of the mean; a word has two positions.
// The last block or word is narrower if the capacity is not a multiple, so the cache has exactly capacity · width values.
#pragma once
#include <cmath>
#include <type_traits>

#include "vector.h"

constexpr int PAIR = 4 / sizeof(NARROW);         // values of a word
constexpr int QUERIES = LANES == 8 ? 2 : 4;      // computed together; a power of 2. AVX2 has only 16 registers
constexpr int BLOCKS = LANES == 8 ? 2 : 4;       // of keys, computed together for one query
#if defined(__AVX512BF16__) && defined(__AVX512F__)
typedef NARROW Factor;  // elements of queries and weights of positions: rounded for the dot instruction
#else
typedef float Factor;
#endif

// Cache of one sequence and key-value head.
struct CachedHead {
    NARROW *keys, *values;
    int width, capacity;
};
// Memory of a thread.
struct AttentionScratch {
    float *scores, *rotated;  // (QUERIES, padded), (width)
    Factor *weights, *queries;  // (QUERIES, padded), (QUERIES, width)
    NARROW* edge;  // (width, LANES)
    int padded;  // capacity, rounded up to full blocks
    int64_t bytes;
    AttentionScratch(int width, int capacity, char* base) {
        bytes = 0;
        auto take = [&](int64_t size) {
            const uintptr_t begin = (uintptr_t)base + bytes;
            bytes += (size + 63) & ~(int64_t)63;
            return begin;
        };
        padded = (capacity + LANES - 1) / LANES * LANES;
        scores = (float*)take(QUERIES * padded * 4);
        rotated = (float*)take(width * 4);
        weights = (Factor*)take(QUERIES * padded * sizeof(Factor));
        queries = (Factor*)take(QUERIES * width * sizeof(Factor));
        edge = (NARROW*)take(LANES * width * sizeof(NARROW));
    }
};

static inline uvec load_words(const NARROW* from) {
    uvec words;
    memcpy(&words, from, sizeof words);
    return words;
}

// Adds to each lane the product of its word and PAIR factors.
static inline vec add_products(vec sums, uvec words, const Factor* factors) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    if constexpr (PAIR == 2) {
        int32_t pair;
        memcpy(&pair, factors, 4);
        return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)words, (__m512bh)_mm512_set1_epi32(pair));
    }
#endif
    if constexpr (PAIR == 1) return sums + (vec)words * (float)factors[0];
    sums += (vec)(words << 16) * (float)factors[0];
    return sums + (vec)(words & 0xffff0000u) * (float)factors[PAIR - 1];
}

static inline void rotate(const float* head, const float* turn, int width, float* out) {
    typedef uint64_t complex_vec __attribute__((vector_size(LANES * 4)));
    constexpr uint64_t LOW = 0xffffffffu;
    int e = 0;
    for (; e + LANES <= width; e += LANES) {
        const complex_vec x = (complex_vec)load(head + e), t = (complex_vec)load(turn + e);
        const vec swapped = (vec)(x << 32 | x >> 32), cosine = (vec)((t & LOW) | t << 32);
        const vec sine = (vec)((t >> 32 | (t & ~LOW)) ^ (uint64_t)0x80000000u);  // negative for even elements
        store((vec)x * cosine + swapped * sine, out + e);
    }
    for (; e < width; e += 2) {
        const float even = head[e], odd = head[e + 1];
        out[e] = even * turn[e] - odd * turn[e + 1];
        out[e + 1] = odd * turn[e] + even * turn[e + 1];
    }
}

static inline void append(const CachedHead& cache, int position, const float* key, const float* value) {
    const int block = position / LANES * LANES, word = position / PAIR * PAIR;
    const int lanes = cache.capacity - block < LANES ? cache.capacity - block : LANES;
    const int pair = cache.capacity - word < PAIR ? cache.capacity - word : PAIR;
    NARROW* keys = cache.keys + (int64_t)block * cache.width + (position - block) * PAIR;
    NARROW* values = cache.values + (int64_t)word * cache.width + (position - word);
    for (int e = 0; e < cache.width; e += PAIR)
        for (int i = 0; i < PAIR; i++) store(key[e + i], keys + e * lanes + i);
    for (int e = 0; e < cache.width; e++) store(value[e], values + e * pair);
}

// Scores of Q queries and B blocks of keys.
template <int Q, int B>
static inline void score(const Factor* queries, const NARROW* keys, const NARROW* values, int width, float* scores,
                         int padded) {
    vec sums[Q][B];
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < B; b++) sums[q][b] = vec{};
    for (int e = 0; e < width; e += PAIR) {
        uvec words[B];
        for (int b = 0; b < B; b++) {
            const int64_t at = (int64_t)(b * width + e) * LANES;
            words[b] = load_words(keys + at);
            __builtin_prefetch(keys + at + (int64_t)B * LANES * width, 0, 2);
            __builtin_prefetch(values + at, 0, 2);  // read after the loop over all scores
        }
        for (int q = 0; q < Q; q++)
            for (int b = 0; b < B; b++) sums[q][b] = add_products(sums[q][b], words[b], queries + q * width + e);
    }
    const float scale = 1.0f / std::sqrt((float)width);
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < B; b++) store(sums[q][b] * scale, scores + (int64_t)q * padded + b * LANES);
}

template <int Q>
static void all_scores(const CachedHead& cache, int from, int last, const AttentionScratch& scratch) {
    constexpr int B = BLOCKS / Q > 1 ? BLOCKS / Q : 1;
    const int width = cache.width, full = cache.capacity / LANES * LANES;
    const int end = last < full ? last + 1 : full;
    int p = from / LANES * LANES;
    auto blocks = [&](auto count, const NARROW* keys) {
        score<Q, decltype(count)::value>(scratch.queries, keys, cache.values + (int64_t)p * width, width,
                                         scratch.scores + p, scratch.padded);
        p += LANES * decltype(count)::value;
    };
    while (p + (B - 1) * LANES < end) blocks(std::integral_constant<int, B>(), cache.keys + (int64_t)p * width);
    while (p < end) blocks(std::integral_constant<int, 1>(), cache.keys + (int64_t)p * width);
    if (last >= full) {  // the narrower block at the end of the cache
        const int words = (cache.capacity - full) * PAIR;
        memset(scratch.edge, 0, LANES * width * sizeof(NARROW));
        for (int e = 0; e < width; e += PAIR)
            memcpy(scratch.edge + e * LANES, cache.keys + (int64_t)full * width + e / PAIR * words,
                   words * sizeof(NARROW));
        blocks(std::integral_constant<int, 1>(), scratch.edge);
    }
}

// Softmax of the scores of from … last, not yet divided by the sum of the weights. Returns the inverse of that sum.
static inline float softmax(float* scores, int from, int last, Factor* weights) {
    const int begin = from / LANES * LANES, end = last / LANES * LANES + LANES;
    for (int p = begin; p < from; p++) scores[p] = -INFINITY;
    for (int p = last + 1; p < end; p++) scores[p] = -INFINITY;
    vec tops = vec{} - INFINITY, totals = vec{};
    for (int p = begin; p < end; p += LANES) {
        const vec x = load(scores + p);
        tops = x > tops ? x : tops;
    }
    float top = tops[0];
    for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    for (int p = begin; p < end; p += LANES) {
        const vec x = load(scores + p);
        store(x == -INFINITY ? vec{} : exponential(x - top), weights + p);
        totals += load(weights + p);  // after rounding, so that the weights sum to 1
    }
    return 1.0f / sum(totals);
}

// Weighted means of N vectors of the values, from element e on.
template <int Q, int N, typename Put>
static inline void mix(const CachedHead& cache, int e, int from, const int* last, const float* factor,
                       const AttentionScratch& scratch, Put put) {
    const int width = cache.width, lanes = width < LANES ? width : LANES;
    vec means[Q][N];
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) means[q][n] = vec{};
    auto add = [&](int q, int p) {  // the word of positions p … p + PAIR - 1, of which the query may skip one
        const Factor* weight = scratch.weights + (int64_t)q * scratch.padded + p;
        const uint32_t mask = PAIR == 1 ? ~0u : (p >= from ? 0xffffu : 0u) | (p < last[q] ? 0xffff0000u : 0u);
        for (int n = 0; n < N; n++) {
            const NARROW* at = cache.values + (int64_t)p * width + (e + n * LANES) * PAIR;
            uvec words = uvec{};
            if (p + PAIR > cache.capacity)
                for (int i = 0; i < lanes; i++) words[i] = cache.values[(int64_t)p * width + e + n * LANES + i];
            else
                memcpy(&words, at, lanes * 4);
            means[q][n] = add_products(means[q][n], words & mask, weight);
        }
    };
    const int begin = (from + PAIR - 1) / PAIR * PAIR, common = (last[0] + 1) / PAIR * PAIR;
    int p = begin;
    if (begin > from)
        for (int q = 0; q < Q; q++) add(q, begin - PAIR);
    for (; lanes == LANES && p < common; p += PAIR) {
        uvec words[N];
        for (int n = 0; n < N; n++) words[n] = load_words(cache.values + (int64_t)p * width + (e + n * LANES) * PAIR);
        for (int q = 0; q < Q; q++)
            for (int n = 0; n < N; n++)
                means[q][n] = add_products(means[q][n], words[n], scratch.weights + (int64_t)q * scratch.padded + p);
    }
    for (int q = 0; q < Q; q++) {
        for (int rest = p; rest <= last[q]; rest += PAIR) add(q, rest);
        for (int n = 0; n < N; n++) put(q, e + n * LANES, means[q][n] * factor[q], lanes);
    }
}

// Attention of Q queries, in scratch.queries, to the cached positions from … last[q]; `last` does not decrease.
// Calls put(query, element, vector, count) for all elements of the results, for some of them twice.
template <int Q, typename Put>
static void attend(const CachedHead& cache, int from, const int* last, const AttentionScratch& scratch, Put put) {
    all_scores<Q>(cache, from, last[Q - 1], scratch);
    float factor[Q];
    for (int q = 0; q < Q; q++)
        factor[q] = softmax(scratch.scores + (int64_t)q * scratch.padded, from, last[q],
                            scratch.weights + (int64_t)q * scratch.padded);
    int e = 0;
    for (; e + 4 * LANES <= cache.width; e += 4 * LANES) mix<Q, 4>(cache, e, from, last, factor, scratch, put);
    for (; e + LANES <= cache.width; e += LANES) mix<Q, 1>(cache, e, from, last, factor, scratch, put);
    if (e < cache.width)  // the last full vector overlaps the one before
        mix<Q, 1>(cache, cache.width < LANES ? 0 : cache.width - LANES, from, last, factor, scratch, put);
}

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

#include "vector.h"

constexpr int PAIR = 4 / sizeof(NARROW);         // values of a word
constexpr int QUERIES = LANES == 8 ? 2 : 4;      // computed together; a power of 2. AVX2 has only 16 registers
constexpr int CHAINS = LANES == 8 ? 2 : 4;       // partial sums of a score, because an addition takes several cycles
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
    float *scores, *rotated;    // (QUERIES, padded), (width)
    Factor *weights, *queries;  // (QUERIES, padded), (QUERIES, width)
    NARROW *edge, *rounded;     // (width, LANES), (2, width)
    int padded;                 // capacity, rounded up to full blocks
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
        rounded = (NARROW*)take(2 * width * sizeof(NARROW));
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

template <typename To>
static inline void round_all(const float* from, int count, To* to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(load(from + i), to + i);
    for (; i < count; i++) store(from[i], to + i);
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

// `rounded` has room for a key and a value.
static inline void append(const CachedHead& cache, int position, const float* key, const float* value,
                          NARROW* rounded) {
    const int width = cache.width, block = position / LANES * LANES, word = position / PAIR * PAIR;
    const int lanes = cache.capacity - block < LANES ? cache.capacity - block : LANES;
    NARROW* keys = cache.keys + (int64_t)block * width + (position - block) * PAIR;
    NARROW* values = cache.values + (int64_t)word * width;
    round_all(key, width, rounded);
    round_all(value, width, rounded + width);
    for (int e = 0; e < width; e += PAIR) memcpy(keys + e * lanes, rounded + e, 4);
    if (PAIR == 1 || word + PAIR > cache.capacity) {
        memcpy(values, rounded + width, width * sizeof(NARROW));
        return;
    }
    const int shift = 16 * (position - word);
    int e = 0;
    for (; e + LANES <= width; e += LANES) {  // replaces a half of each word
        hvec halves;
        memcpy(&halves, rounded + width + e, sizeof halves);
        const uvec kept = load_words(values + e * PAIR) & ~(0xffffu << shift);
        const uvec words = kept | __builtin_convertvector(halves, uvec) << shift;
        memcpy(values + e * PAIR, &words, sizeof words);
    }
    for (; e < width; e++) values[e * PAIR + position - word] = rounded[width + e];
}

// Scores of Q queries and a block of keys.
template <int Q>
static inline void score(const Factor* queries, const NARROW* keys, const NARROW* values, int width, float* scores,
                         int padded) {
    vec sums[Q][CHAINS];
    for (int q = 0; q < Q; q++)
        for (int c = 0; c < CHAINS; c++) sums[q][c] = vec{};
    auto add = [&](int c, int e) {
        const uvec words = load_words(keys + (int64_t)e * LANES);
        __builtin_prefetch(values + (int64_t)e * LANES, 0, 2);  // read later; the processor foresees keys
        for (int q = 0; q < Q; q++) sums[q][c] = add_products(sums[q][c], words, queries + q * width + e);
    };
    int e = 0;
    for (; e + CHAINS * PAIR <= width; e += CHAINS * PAIR)
        for (int c = 0; c < CHAINS; c++) add(c, e + c * PAIR);
    for (; e < width; e += PAIR) add(0, e);
    const float scale = 1.0f / std::sqrt((float)width);
    for (int q = 0; q < Q; q++) {
        vec total = sums[q][0];
        for (int c = 1; c < CHAINS; c++) total += sums[q][c];
        store(total * scale, scores + (int64_t)q * padded);
    }
}

template <int Q>
static void all_scores(const CachedHead& cache, int from, int last, const AttentionScratch& scratch) {
    const int width = cache.width, full = cache.capacity / LANES * LANES;
    for (int p = from / LANES * LANES; p <= last; p += LANES) {
        const NARROW* keys = cache.keys + (int64_t)p * width;
        if (p == full) {  // the narrower block at the end of the cache
            const int words = (cache.capacity - full) * PAIR;
            memset(scratch.edge, 0, LANES * width * sizeof(NARROW));
            for (int e = 0; e < width; e += PAIR)
                memcpy(scratch.edge + e * LANES, keys + e / PAIR * words, words * sizeof(NARROW));
            keys = scratch.edge;
        }
        score<Q>(scratch.queries, keys, cache.values + (int64_t)p * width, width, scratch.scores + p, scratch.padded);
    }
}

// Softmax of the scores of from … last, not yet divided by the sum of the weights. Returns the inverse of that sum.
static inline float softmax(float* scores, int from, int last, Factor* weights) {
    const int begin = from / LANES * LANES, end = last / LANES * LANES;
    for (int p = begin; p <= end; p += end > begin ? end - begin : LANES) {  // the first and the last block
        const ivec position = lane_numbers() + p;
        store((position >= from) & (position <= last) ? load(scores + p) : vec{} - INFINITY, scores + p);
    }
    vec tops = vec{} - INFINITY, totals = vec{};
    for (int p = begin; p <= end; p += LANES) {
        const vec x = load(scores + p);
        tops = x > tops ? x : tops;
    }
    const float top = maximum(tops);
    for (int p = begin; p <= end; p += LANES) {
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
    auto weight = [&](int q, int p) { return scratch.weights + (int64_t)q * scratch.padded + p; };
    auto add_masked = [&](int p) {  // a word of positions of which some queries skip one or all
        uvec words[N];
        for (int n = 0; n < N; n++) {
            words[n] = uvec{};
            if (p + PAIR > cache.capacity)
                for (int i = 0; i < lanes; i++) words[n][i] = cache.values[(int64_t)p * width + e + n * LANES + i];
            else
                memcpy(&words[n], cache.values + (int64_t)p * width + (e + n * LANES) * PAIR, lanes * 4);
        }
        for (int q = 0; q < Q; q++) {
            uint32_t mask = 0;
            for (int i = 0; i < PAIR; i++)
                if (p + i >= from && p + i <= last[q]) mask |= ~0u >> (32 - 32 / PAIR) << 16 * i;
            if (!mask) continue;  // footgun: the query may have no weight here; 0 times what is in memory may be NaN
            for (int n = 0; n < N; n++) means[q][n] = add_products(means[q][n], words[n] & mask, weight(q, p));
        }
    };
    int p = from / PAIR * PAIR;
    const int common = lanes == LANES ? (last[0] + 1) / PAIR * PAIR : p;  // all queries attend to positions up to here
    if (p < from) add_masked(p), p += PAIR;
    for (; p < common; p += PAIR) {
        uvec words[N];
        for (int n = 0; n < N; n++) words[n] = load_words(cache.values + (int64_t)p * width + (e + n * LANES) * PAIR);
        for (int q = 0; q < Q; q++)
            for (int n = 0; n < N; n++) means[q][n] = add_products(means[q][n], words[n], weight(q, p));
    }
    for (; p <= last[Q - 1]; p += PAIR) add_masked(p);
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) put(q, e + n * LANES, means[q][n] * factor[q], lanes);
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

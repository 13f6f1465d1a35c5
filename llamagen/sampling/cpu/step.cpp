// One pass of a GPT over new tokens of a few sequences on a CPU. Small batches are bound by memory bandwidth, so a pass
// reads each weight once, prefetches it, and multiplies it with a tile of rows.
//
// The result of a row does not depend on the other rows, on their number or on the number of threads: each product is
// summed over the inner dimension in the same order.
//
// Compiled with WEIGHT (float, uint16_t for bfloat16, int8_t), the type of the weights, and NARROW (float, uint16_t),
// the type of the cache and of activations in products. The residual stream and all sums are float32.
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cmath>

#include "attention.h"
#include "tiles.h"

typedef Product<NARROW, WEIGHT> Multiply;

constexpr int GATES = 96;          // hidden units of the feed-forward layer computed at a time
constexpr int PATIENCE = 1 << 12;  // polls of a barrier before a waiting thread yields its core

struct Layer {
    const float* attention_norm;
    Matrix wqkv, wo;
    const float* ffn_norm;
    Matrix w1, w3, w2;
    const float *q_norm, *k_norm;  // (E), or null without QK-norm
};
struct Model {
    int32_t layers, dim, heads, kv_heads, head_dim, ffn_dim, vocabulary;
    float eps;
    const float* rope;   // (P, E / 2, 2)
    const Layer* layer;
    const float* norm;
    Matrix head;
};
// `span` new tokens for each of `batch` sequences. Mirrored by _Pass in step.py.
struct Pass {
    int32_t batch, span, outputs, start, cache_rows, capacity, threads;
    const int32_t* rows;       // (batch): row of the cache of each sequence; null means 0, 1, …
    const int32_t* starts;     // (batch): number of cached tokens of each sequence; null means `start` for all
    const int32_t* first;      // (batch): tokens before it are padding; or null
    const int32_t* positions;  // (batch, span): row of the rotary table; null means those of the next tokens
    const float* adaptive;     // (6 layers + 2, cache_rows, dim): see KVCache.adaptive; or null without adaptive norms
    float* x;                  // (batch, span, dim): the embedded tokens; overwritten
    NARROW *keys, *values;     // (layers, cache_rows, kv_heads, capacity, head_dim)
    float* logits;             // (batch, outputs, vocabulary), after the last `outputs` tokens
    char* scratch;
};

// footgun: OpenMP's barrier spins. On busy cores that costs a time slice at each barrier, so this one yields.
struct Barrier {
    std::atomic<int> arrived{0}, generation{0};
    void wait(int threads) {
        const int now = generation.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            generation.store(now + 1, std::memory_order_release);
            return;
        }
        for (int polls = 0; generation.load(std::memory_order_acquire) == now; polls++)
            if (polls > PATIENCE) sched_yield();
    }
};

struct Scratch {
    NARROW *normed, *hidden, *packed;
    float *qkv, *gates;
    char *attention, *workspaces;  // for each thread: an AttentionScratch, memory of the products
    int64_t attention_bytes, workspace, packed_size, bytes;
    Scratch(const Model& m, int64_t rows, int64_t threads, int64_t capacity, char* base) {
        uintptr_t at = ((uintptr_t)base + 63) & ~(uintptr_t)63;
        auto take = [&](int64_t size) { uintptr_t begin = at; at = (at + size + 63) & ~(uintptr_t)63; return begin; };
        const int64_t widest = m.dim > m.ffn_dim ? m.dim : m.ffn_dim;
        normed = (NARROW*)take(rows * m.dim * sizeof(NARROW));
        hidden = (NARROW*)take(rows * widest * sizeof(NARROW));
        qkv = (float*)take(rows * (m.heads + 2 * m.kv_heads) * m.head_dim * 4);
        attention_bytes = AttentionScratch(m.head_dim, capacity, nullptr).bytes;
        attention = (char*)take(threads * attention_bytes);
        gates = (float*)take(threads * rows * 2 * GATES * 4);
        packed_size = Operand<NARROW>::packed_size(rows, widest);
        packed = (NARROW*)take(3 * packed_size * sizeof(NARROW));
        workspace = Multiply::workspace(widest);
        workspaces = (char*)take(threads * workspace);
        bytes = (int64_t)(at - (uintptr_t)base) + 64;
    }
};

// What the products of a pass read.
struct Operands {
    const Operand<NARROW> normed, attended, gated;
    Operands(const Model& m, const Scratch& s, int64_t rows)
        : normed(s.normed, s.packed, rows, m.dim),
          attended(s.hidden, s.packed + s.packed_size, rows, m.dim),
          gated(s.hidden, s.packed + 2 * s.packed_size, rows, m.ffn_dim) {
        normed.start(), attended.start(), gated.start();
    }
};

// Gain, shift and gate of one branch of a block, for one sequence. Without adaptive norms all are null.
struct Adaptive {
    const float *gain, *shift, *gate;
};

// The vectors from `vector` on for sequence s.
static inline Adaptive adaptive_of(const Model& m, const Pass& pass, int vector, int s) {
    if (!pass.adaptive) return {nullptr, nullptr, nullptr};
    const int64_t row = pass.rows ? pass.rows[s] : s, next = (int64_t)pass.cache_rows * m.dim;
    const float* first = pass.adaptive + vector * next + row * m.dim;
    return {first, first + next, first + 2 * next};
}

template <typename To>
static void normalise(const float* x, const float* weight, const Adaptive& adaptive, int dim, float eps, To* out) {
    vec squares = vec{};
    int k = 0;
    for (; k + LANES <= dim; k += LANES) squares += load(x + k) * load(x + k);
    float total = sum(squares);
    for (; k < dim; k++) total += x[k] * x[k];
    const float factor = 1.0f / std::sqrt(total / dim + eps);
    if (adaptive.gain)
        for (k = 0; k < dim; k++)
            store(x[k] * factor * weight[k] * (1.0f + adaptive.gain[k]) + adaptive.shift[k], out + k);
    else
        for (k = 0; k < dim; k++) store(x[k] * factor * weight[k], out + k);
}

// Normalises a query or key, if there is QK-norm, and rotates it.
static inline void turn_head(const float* head, const float* weight, float eps, const float* turn, int width,
                             float* out) {
    if (weight) {
        normalise(head, weight, {nullptr, nullptr, nullptr}, width, eps, out);
        head = out;  // `rotate` may work in place
    }
    rotate(head, turn, width, out);
}

static CachedHead cached_head(const Model& m, const Pass& pass, int layer, int s, int g) {
    const int64_t row = pass.rows ? pass.rows[s] : s;
    const int64_t place = (((int64_t)layer * pass.cache_rows + row) * m.kv_heads + g) * pass.capacity * m.head_dim;
    return {pass.keys + place, pass.values + place, m.head_dim, pass.capacity};
}

static inline const float* turn_of(const Model& m, const Pass& pass, int s, int j, int start) {
    return m.rope + (int64_t)(pass.positions ? pass.positions[s * pass.span + j] : start + j) * m.head_dim;
}

// Appends the keys and values of the new tokens of sequence s in key-value head g.
static void append_tokens(const Model& m, const Pass& pass, const Scratch& scratch, int layer, int s, int g,
                          const AttentionScratch& memory) {
    const int E = m.head_dim, group = m.heads / m.kv_heads, start = pass.starts ? pass.starts[s] : pass.start;
    const CachedHead cache = cached_head(m, pass, layer, s, g);
    for (int j = 0; j < pass.span; j++) {
        const float* row = scratch.qkv + ((int64_t)s * pass.span + j) * (m.heads + 2 * m.kv_heads) * E;
        const float *key = row + (m.heads + g) * E, *value = key + m.kv_heads * E;
        for (int e = 0; e < E; e += 16) {  // of the next head: the rows are too far apart for the processor to foresee it
            __builtin_prefetch(key + E + e);
            __builtin_prefetch(value + E + e);
            for (int h = 0; h < group; h++) __builtin_prefetch(row + ((g + 1) * group + h) * E + e);
        }
        turn_head(key, m.layer[layer].k_norm, m.eps, turn_of(m, pass, s, j, start), E, memory.rotated);
        append(cache, start + j, memory.rotated, value, memory.rounded);
    }
}

// Attention of the queries [query, query + Q) of sequence s in key-value head g, counted token by token.
template <int Q>
static void attend_queries(const Model& m, const Pass& pass, const Scratch& scratch, const AttentionScratch& memory,
                           const Operand<NARROW>& result, int layer, int s, int g, int query, const int* last,
                           int from) {
    const int E = m.head_dim, group = m.heads / m.kv_heads, start = pass.starts ? pass.starts[s] : pass.start;
    NARROW* out[Q];
    for (int q = 0; q < Q; q++) {
        const int j = (query + q) / group, head = g * group + (query + q) % group;
        const int64_t row = (int64_t)s * pass.span + j;
        turn_head(scratch.qkv + (row * (m.heads + 2 * m.kv_heads) + head) * E, m.layer[layer].q_norm, m.eps,
                  turn_of(m, pass, s, j, start), E, memory.rotated);
        round_all(memory.rotated, E, memory.queries + q * E);
        out[q] = result.matrix + row * result.width + head * E;
    }
    attend<Q>(cached_head(m, pass, layer, s, g), from, last, memory, [&](int q, int e, vec mean, int count) {
        if (count == LANES)
            store(mean, out[q] + e);
        else
            for (int i = 0; i < count; i++) store(mean[i], out[q] + e + i);
    });
    for (int q = 0; q < Q; q++)
        result.update(s * pass.span + (query + q) / group, (g * group + (query + q) % group) * E, E);
}

// Attention of at most QUERIES queries from `query` on.
static void attend_tile(const Model& m, const Pass& pass, const Scratch& scratch, const AttentionScratch& memory,
                        const Operand<NARROW>& result, int layer, int s, int g, int query) {
    const int group = m.heads / m.kv_heads, start = pass.starts ? pass.starts[s] : pass.start;
    const int first = pass.first ? pass.first[s] : 0, all = pass.span * group;
    for (const int end = query + QUERIES < all ? query + QUERIES : all; query < end;) {
        int last[QUERIES], from[QUERIES], count = 0;
        for (; count < end - query; count++) {
            last[count] = start + (query + count) / group;
            from[count] = first < last[count] ? first : last[count];  // padding attends to itself
            if (from[count] != from[0]) break;
        }
        if (count == QUERIES) {
            attend_queries<QUERIES>(m, pass, scratch, memory, result, layer, s, g, query, last, from[0]);
            query += QUERIES;
        } else if (count >= 2) {
            attend_queries<2>(m, pass, scratch, memory, result, layer, s, g, query, last, from[0]);
            query += 2;
        } else {
            attend_queries<1>(m, pass, scratch, memory, result, layer, s, g, query, last, from[0]);
            query += 1;
        }
    }
}

// hidden = silu(w1 · normed) * (w3 · normed) for the units [first, end).
static void gate(const Multiply& multiply, const Layer& w, const Operands& operands, int rows, int first, int end,
                 float* gates) {
    const Operand<NARROW>& gated = operands.gated;
    float* factors = gates + (int64_t)rows * GATES;
    for (int n = first; n < end; n += GATES) {
        const int stop = n + GATES < end ? n + GATES : end;
        multiply(operands.normed, w.w1, rows, n, stop, {gates - n, GATES, false});
        multiply(operands.normed, w.w3, rows, n, stop, {factors - n, GATES, false});
        for (int r = 0; r < rows; r++) {
            for (int i = 0; i < stop - n; i += LANES) {
                const vec x = load(gates + r * GATES + i), e = exponential(x < 0.0f ? x : -x);
                const vec y = x * (x < 0.0f ? e : vec{} + 1.0f) / (1.0f + e) * load(factors + r * GATES + i);
                NARROW* out = gated.matrix + (int64_t)r * gated.width + n + i;
                for (int j = 0; j < LANES && i + j < stop - n; j++) store(y[j], out + j);
            }
            gated.update(r, n, stop - n);
        }
    }
}

// The items [first, end) of thread t of n, rounded to multiples of `unit`.
static inline void share(int items, int unit, int t, int n, int* first, int* end) {
    const int64_t units = (items + unit - 1) / unit;
    *first = (int)(units * t / n) * unit;
    *end = (int)(units * (t + 1) / n) * unit;
    if (*end > items) *end = items;
}

// The part of thread t of n of the attention of a layer.
static void attention_layer(const Model& m, const Pass& pass, const Scratch& scratch, const Operand<NARROW>& result,
                            Barrier& barrier, int layer, int t, int n) {
    const AttentionScratch memory(m.head_dim, pass.capacity, scratch.attention + t * scratch.attention_bytes);
    const int heads = pass.batch * m.kv_heads, queries = pass.span * (m.heads / m.kv_heads);
    const int tiles = (queries + QUERIES - 1) / QUERIES;
    const bool split = n > 1 && tiles > 1 && heads < 4 * n;  // too few heads: several threads share one
    int first, end;
    share(heads, 1, t, n, &first, &end);
    for (int i = first; i < end; i++) {
        const int s = i / m.kv_heads, g = i % m.kv_heads;
        append_tokens(m, pass, scratch, layer, s, g, memory);
        for (int query = 0; query < queries && !split; query += QUERIES)
            attend_tile(m, pass, scratch, memory, result, layer, s, g, query);
    }
    if (!split) return;
    barrier.wait(n);
    share(heads * tiles, 1, t, n, &first, &end);
    for (int i = first; i < end; i++) {
        const int s = i / tiles / m.kv_heads, g = i / tiles % m.kv_heads;
        attend_tile(m, pass, scratch, memory, result, layer, s, g, i % tiles * QUERIES);
    }
}

static void work(const Model& m, const Pass& pass, const Scratch& scratch, const Operands& operands, Barrier& barrier,
                 int t, int n) {
    const int D = m.dim, rows = pass.batch * pass.span, width = (m.heads + 2 * m.kv_heads) * m.head_dim;
    float* gates = scratch.gates + (int64_t)t * rows * 2 * GATES;
    const Multiply multiply(scratch.workspaces + t * scratch.workspace);
    const Target add{pass.x, D, true};
    auto norm = [&](int64_t from, const float* weight, int vector, int to) {
        const Adaptive adaptive = adaptive_of(m, pass, vector, from / pass.span);
        normalise(pass.x + from * D, weight, adaptive, D, m.eps, scratch.normed + (int64_t)to * D);
        operands.normed.update(to, 0, D);
    };
    // Adds a branch to the columns [first, end) of x, times its gate if there is one.
    auto add_branch = [&](const Operand<NARROW>& branch, const Matrix& weight, int vector, int first, int end) {
        if (!pass.adaptive) return multiply(branch, weight, rows, first, end, add);
        float* product = scratch.qkv;  // which nothing reads any more in this layer
        multiply(branch, weight, rows, first, end, {product, D, false});
        for (int64_t r = 0; r < rows; r++) {
            const float* gate = adaptive_of(m, pass, vector, r / pass.span).gate;
            for (int k = first; k < end; k++) pass.x[r * D + k] += gate[k] * product[r * D + k];
        }
    };
    int first, end;
    for (int l = 0; l < m.layers; l++) {
        const Layer& w = m.layer[l];
        share(rows, 1, t, n, &first, &end);
        for (int r = first; r < end; r++) norm(r, w.attention_norm, 6 * l, r);
        barrier.wait(n);
        share(width, Multiply::UNIT, t, n, &first, &end);
        multiply(operands.normed, w.wqkv, rows, first, end, {scratch.qkv, width, false});
        barrier.wait(n);
        attention_layer(m, pass, scratch, operands.attended, barrier, l, t, n);
        barrier.wait(n);
        share(D, Multiply::UNIT, t, n, &first, &end);
        add_branch(operands.attended, w.wo, 6 * l, first, end);
        barrier.wait(n);
        share(rows, 1, t, n, &first, &end);
        for (int r = first; r < end; r++) norm(r, w.ffn_norm, 6 * l + 3, r);
        barrier.wait(n);
        share(m.ffn_dim, GATES, t, n, &first, &end);
        gate(multiply, w, operands, rows, first, end, gates);
        barrier.wait(n);
        share(D, Multiply::UNIT, t, n, &first, &end);
        add_branch(operands.gated, w.w2, 6 * l + 3, first, end);
        barrier.wait(n);
    }
    const int outputs = pass.batch * pass.outputs;
    share(outputs, 1, t, n, &first, &end);
    for (int r = first; r < end; r++) {
        const int64_t s = r / pass.outputs, token = pass.span - pass.outputs + r % pass.outputs;
        norm(s * pass.span + token, m.norm, 6 * m.layers, r);
    }
    barrier.wait(n);
    share(m.vocabulary, Multiply::UNIT, t, n, &first, &end);
    multiply(operands.normed, m.head, outputs, first, end, {pass.logits, m.vocabulary, false});
}

// 0, or the number of the error with which the kernel refuses the processor's matrix unit. Once a process.
extern "C" int32_t prepare_processor() { return allow_tiles(); }

extern "C" const int32_t cache_lanes = LANES;  // see attention.h

extern "C" int64_t scratch_bytes(const Model* m, int64_t rows, int64_t threads, int64_t capacity) {
    return Scratch(*m, rows, threads, capacity, nullptr).bytes;
}

extern "C" void forward(const Model* m, const Pass* pass) {
    const Scratch scratch(*m, (int64_t)pass->batch * pass->span, pass->threads, pass->capacity, pass->scratch);
    const Operands operands(*m, scratch, (int64_t)pass->batch * pass->span);
    Barrier barrier;
#pragma omp parallel num_threads(pass->threads)
    work(*m, *pass, scratch, operands, barrier, omp_get_thread_num(), omp_get_num_threads());
}

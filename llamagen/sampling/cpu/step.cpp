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

#include "tiles.h"

typedef Product<NARROW, WEIGHT> Multiply;

constexpr int GATES = 96;          // hidden units of the feed-forward layer computed at a time
constexpr int PATIENCE = 1 << 12;  // polls of a barrier before a waiting thread yields its core

struct Layer {
    const float* attention_norm;
    Matrix wqkv, wo;
    const float* ffn_norm;
    Matrix w1, w3, w2;
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
    float *qkv, *scores, *gates;
    char* workspaces;  // of the products, for each thread
    int64_t workspace, packed_size, bytes;
    Scratch(const Model& m, int64_t rows, int64_t threads, int64_t capacity, char* base) {
        uintptr_t at = ((uintptr_t)base + 63) & ~(uintptr_t)63;
        auto take = [&](int64_t size) { uintptr_t begin = at; at = (at + size + 63) & ~(uintptr_t)63; return begin; };
        const int64_t widest = m.dim > m.ffn_dim ? m.dim : m.ffn_dim;
        normed = (NARROW*)take(rows * m.dim * sizeof(NARROW));
        hidden = (NARROW*)take(rows * widest * sizeof(NARROW));
        qkv = (float*)take(rows * (m.heads + 2 * m.kv_heads) * m.head_dim * 4);
        scores = (float*)take(threads * (capacity + LANES) * 4);
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

static void normalise(const float* x, const float* weight, int dim, float eps, NARROW* out) {
    vec squares = vec{};
    int k = 0;
    for (; k + LANES <= dim; k += LANES) squares += load(x + k) * load(x + k);
    float total = sum(squares);
    for (; k < dim; k++) total += x[k] * x[k];
    const float factor = 1.0f / std::sqrt(total / dim + eps);
    for (k = 0; k < dim; k++) store(x[k] * factor * weight[k], out + k);
}

static void rotate(float* head, const float* turn, int width) {
    for (int e = 0; e < width; e += 2) {
        const float even = head[e], odd = head[e + 1];
        head[e] = even * turn[e] - odd * turn[e + 1];
        head[e + 1] = odd * turn[e] + even * turn[e + 1];
    }
}

// Weighted mean of the values, N vectors of lanes at a time.
template <int N>
static inline void mix(const float* score, const NARROW* values, int width, int from, int last, float factor,
                       NARROW* out) {
    vec means[N];
    for (int n = 0; n < N; n++) means[n] = vec{};
    for (int p = from; p <= last; p++)
        for (int n = 0; n < N; n++) means[n] += score[p] * load(values + (int64_t)p * width + n * LANES);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < LANES; i++) store((means[n] * factor)[i], out + n * LANES + i);
}

// Attention of one query to the cached tokens from … last.
static void attend(const float* q, const NARROW* keys, const NARROW* values, int width, int from, int last,
                   float* score, NARROW* out) {
    const float scale = 1.0f / std::sqrt((float)width);
    const int line = 64 / sizeof(NARROW), soon = 8 * width;
    for (int p = from; p <= last; p++) {
        const NARROW *key = keys + (int64_t)p * width, *value = values + (int64_t)p * width;
        for (int e = 0; e < width; e += line) {  // the values are read after the loop over all scores
            __builtin_prefetch(key + soon + e, 0, 2);
            __builtin_prefetch(value + e, 0, 2);
        }
        vec products = vec{};
        int e = 0;
        for (; e + LANES <= width; e += LANES) products += load(q + e) * load(key + e);
        float total = sum(products);
        for (; e < width; e++) total += q[e] * wide(key[e]);
        score[p] = total * scale;
    }
    float top = -INFINITY;
    for (int p = from; p <= last; p++) top = score[p] > top ? score[p] : top;
    vec totals = vec{};
    float rest = 0.0f;
    int p = from;
    for (; p + LANES <= last + 1; p += LANES) {
        vec weights = exponential(load(score + p) - top);
        memcpy(score + p, &weights, sizeof weights);
        totals += weights;
    }
    for (; p <= last; p++) rest += score[p] = std::exp(score[p] - top);
    const float factor = 1.0f / (sum(totals) + rest);
    int e = 0;
    for (; e + 4 * LANES <= width; e += 4 * LANES) mix<4>(score, values + e, width, from, last, factor, out + e);
    for (; e + LANES <= width; e += LANES) mix<1>(score, values + e, width, from, last, factor, out + e);
    for (; e < width; e++) {
        float mean = 0.0f;
        for (p = from; p <= last; p++) mean += score[p] * wide(values[(int64_t)p * width + e]);
        store(mean * factor, out + e);
    }
}

// All query heads of key-value head g in sequence s: rotate, append to the cache, attend.
static void attend_group(const Model& m, const Pass& pass, const Scratch& scratch, int layer, int s, int g,
                         float* score) {
    const int E = m.head_dim, group = m.heads / m.kv_heads, width = (m.heads + 2 * m.kv_heads) * E;
    const int cache_row = pass.rows ? pass.rows[s] : s, start = pass.starts ? pass.starts[s] : pass.start;
    const int64_t place = (((int64_t)layer * pass.cache_rows + cache_row) * m.kv_heads + g) * pass.capacity * E;
    NARROW *keys = pass.keys + place, *values = pass.values + place;
    for (int j = 0; j < pass.span; j++) {
        float* row = scratch.qkv + (int64_t)(s * pass.span + j) * width;
        const int64_t at = (int64_t)(start + j) * E;
        const int position = pass.positions ? pass.positions[s * pass.span + j] : start + j;
        const float* turn = m.rope + (int64_t)position * E;
        float *key = row + (m.heads + g) * E, *value = key + m.kv_heads * E;
        for (int h = 0; h < group; h++) rotate(row + (g * group + h) * E, turn, E);
        rotate(key, turn, E);
        for (int e = 0; e < E; e++) store(key[e], keys + at + e), store(value[e], values + at + e);
    }
    const int first = pass.first ? pass.first[s] : 0;
    for (int j = 0; j < pass.span; j++) {
        const int64_t row = s * pass.span + j;
        const int last = start + j, from = first < last ? first : last;  // padding attends to itself
        for (int h = g * group; h < (g + 1) * group; h++)
            attend(scratch.qkv + row * width + h * E, keys, values, E, from, last, score,
                   scratch.hidden + row * m.dim + h * E);
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

static void work(const Model& m, const Pass& pass, const Scratch& scratch, const Operands& operands, Barrier& barrier,
                 int t, int n) {
    const int D = m.dim, rows = pass.batch * pass.span, width = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const int E = m.head_dim, group = m.heads / m.kv_heads * E;
    float* score = scratch.scores + (int64_t)t * (pass.capacity + LANES);
    float* gates = scratch.gates + (int64_t)t * rows * 2 * GATES;
    const Multiply multiply(scratch.workspaces + t * scratch.workspace);
    const Target add{pass.x, D, true};
    auto norm = [&](int64_t from, const float* weight, int to) {
        normalise(pass.x + from * D, weight, D, m.eps, scratch.normed + (int64_t)to * D);
        operands.normed.update(to, 0, D);
    };
    int first, end;
    for (int l = 0; l < m.layers; l++) {
        const Layer& w = m.layer[l];
        share(rows, 1, t, n, &first, &end);
        for (int r = first; r < end; r++) norm(r, w.attention_norm, r);
        barrier.wait(n);
        share(width, Multiply::UNIT, t, n, &first, &end);
        multiply(operands.normed, w.wqkv, rows, first, end, {scratch.qkv, width, false});
        barrier.wait(n);
        share(pass.batch * m.kv_heads, 1, t, n, &first, &end);
        for (int i = first; i < end; i++) {
            const int s = i / m.kv_heads, g = i % m.kv_heads;
            attend_group(m, pass, scratch, l, s, g, score);
            for (int j = 0; j < pass.span; j++) operands.attended.update(s * pass.span + j, g * group, group);
        }
        barrier.wait(n);
        share(D, Multiply::UNIT, t, n, &first, &end);
        multiply(operands.attended, w.wo, rows, first, end, add);
        barrier.wait(n);
        share(rows, 1, t, n, &first, &end);
        for (int r = first; r < end; r++) norm(r, w.ffn_norm, r);
        barrier.wait(n);
        share(m.ffn_dim, GATES, t, n, &first, &end);
        gate(multiply, w, operands, rows, first, end, gates);
        barrier.wait(n);
        share(D, Multiply::UNIT, t, n, &first, &end);
        multiply(operands.gated, w.w2, rows, first, end, add);
        barrier.wait(n);
    }
    const int outputs = pass.batch * pass.outputs;
    share(outputs, 1, t, n, &first, &end);
    for (int r = first; r < end; r++) {
        const int64_t s = r / pass.outputs, token = pass.span - pass.outputs + r % pass.outputs;
        norm(s * pass.span + token, m.norm, r);
    }
    barrier.wait(n);
    share(m.vocabulary, Multiply::UNIT, t, n, &first, &end);
    multiply(operands.normed, m.head, outputs, first, end, {pass.logits, m.vocabulary, false});
}

// 0, or the number of the error with which the kernel refuses the processor's matrix unit. Once a process.
extern "C" int32_t prepare_processor() { return allow_tiles(); }

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

// Products of activations with the weights of a linear layer, by vectors. tiles.h has others, for matrix units.
//
// The result of a row does not depend on the other rows or on their number: each product is summed over the inner
// dimension in the same order.
#pragma once
#include "vector.h"
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define BF16_DOT 1
#endif

// ROWS × COLUMNS sums, COLUMNS weights and one activation fit into the registers.
constexpr int ROWS = LANES == 8 ? 4 : 8, COLUMNS = LANES == 16 ? 3 : 2;
constexpr int AHEAD = 4;              // prefetch distance, in tiles of columns
constexpr int PANEL = 16;             // tiles of columns that stay in the L2 cache while tiles of rows pass
constexpr int NEAR_BYTES = 24 << 10;  // activations up to this size stay in the L1 cache
// AMD's processors with the bfloat16 instruction read faster if few rows prefetch into L1, one tile ahead. On an Intel
// Xeon that halves the speed.
#if defined(BF16_DOT) && !defined(__AMX_TILE__)
constexpr bool NEAR_PREFETCH = sizeof(WEIGHT) > 1;
#else
constexpr bool NEAR_PREFETCH = false;
#endif

struct Matrix {
    const WEIGHT* values;  // (outputs, inputs)
    const float* scale;    // (outputs), or null
};

// Where the results go: column c of row r is stored in, or added to, values[r * stride + c].
struct Target {
    float* values;
    int64_t stride;
    bool add;
};

// The activations of a phase, as products read them: here the matrix (rows, width) itself.
template <typename X> struct Operand {
    X* matrix;
    int width;
    static int64_t packed_size(int64_t rows, int64_t width) { return 0; }
    Operand(X* matrix, X* packed, int64_t rows, int width) : matrix(matrix), width(width) {}
    void start() const {}
    // To be called after the columns [column, column + count) of a row of the matrix have been written.
    void update(int row, int column, int count) const {}
};

// Multiplies STEP activations and weights and adds the products to LANES sums.
template <typename X, typename W> struct Dot {
    static constexpr int STEP = LANES;
    typedef vec Register;
    static inline Register activation(const X* p) { return load(p); }
    static inline Register weight(const W* p) { return load(p); }
    static inline vec add(vec sums, Register x, Register w) { return sums + x * w; }
};
#ifdef BF16_DOT
struct PairDot {
    static constexpr int STEP = 32;
    typedef __m512bh Register;
    static inline Register activation(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static inline vec add(vec sums, Register x, Register w) { return (vec)_mm512_dpbf16_ps((__m512)sums, x, w); }
};
template <> struct Dot<bf16, bf16> : PairDot {
    static inline Register weight(const bf16* p) { return activation(p); }
};
template <> struct Dot<bf16, int8_t> : PairDot {
    static inline __m512 half(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static inline Register weight(const int8_t* p) { return _mm512_cvtne2ps_pbh(half(p + 16), half(p)); }
};
#endif

// Sums of four vectors, each with the additions of sum().
static inline void sum4(const vec* v, float* out) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    const __m512 quarters = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    const __m512 pairs = quarters + _mm512_permute_ps(quarters, 0x4e);
    const __m512 totals = pairs + _mm512_permute_ps(pairs, 0xb1);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, totals)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

// Which weights a tile prefetches while it reads its own: those `ahead` elements further. Of several tiles of rows that
// read the same weights, each prefetches every `tiles`-th vector.
struct Prefetch {
    int64_t ahead;
    int tiles, tile;
};

// Products of R rows and C columns. ALONE: no other tile of rows reads these weights.
template <int R, int C, bool ALONE>
static inline void tile(const NARROW* x, const WEIGHT* w, int width, Prefetch next, float* out) {
    typedef Dot<NARROW, WEIGHT> D;
    vec sums[(R * C + 3) / 4 * 4];
    for (vec& one : sums) one = vec{};
    int k = 0;
    for (; k + D::STEP <= width; k += D::STEP) {
        typename D::Register weights[C];
        for (int c = 0; c < C; c++) weights[c] = D::weight(w + (int64_t)c * width + k);
        if (ALONE || next.tile-- == 0) {
            next.tile = next.tiles - 1;
            for (int c = 0; c < C; c++) {
                const WEIGHT* at = w + (int64_t)c * width + k;
                if (ALONE && R < ROWS && NEAR_PREFETCH)
                    __builtin_prefetch(at + (int64_t)C * width, 0, 3);
                else
                    __builtin_prefetch(at + next.ahead, 0, 2);  // into the L2 cache: L1 is too small
            }
        }
        for (int r = 0; r < R; r++) {
            typename D::Register row = D::activation(x + (int64_t)r * width + k);
#if defined(__AVX512F__)
            asm("" : "+v"(row));  // keeps it in a register; the compiler would load it again for each product
#endif
            for (int c = 0; c < C; c++) sums[r * C + c] = D::add(sums[r * C + c], row, weights[c]);
        }
    }
    for (int i = 0; i < R * C; i += 4) sum4(sums + i, out + i);
    if (k == width) return;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float total = out[r * C + c];
            for (int j = k; j < width; j++) total += wide(x[(int64_t)r * width + j]) * wide(w[(int64_t)c * width + j]);
            out[r * C + c] = total;
        }
}
template <int C, bool ALONE>
static void tile_rows(int rows, const NARROW* x, const WEIGHT* w, int width, Prefetch next, float* out) {
    switch (rows) {
        case 1: return tile<1, C, ALONE>(x, w, width, next, out);
        case 2: return tile<2, C, ALONE>(x, w, width, next, out);
        case 3: return tile<3, C, ALONE>(x, w, width, next, out);
        case 4: return tile<4, C, ALONE>(x, w, width, next, out);
        case 5: return tile<ROWS < 5 ? ROWS : 5, C, ALONE>(x, w, width, next, out);
        case 6: return tile<ROWS < 6 ? ROWS : 6, C, ALONE>(x, w, width, next, out);
        case 7: return tile<ROWS < 7 ? ROWS : 7, C, ALONE>(x, w, width, next, out);
        default: return tile<ROWS, C, ALONE>(x, w, width, next, out);
    }
}

// Multiplies activations and weights in a thread. Made once a pass.
template <typename X, typename W> class Product {
public:
    static constexpr int UNIT = COLUMNS;  // threads share the columns in multiples of this
    static int64_t workspace(int64_t width) { return 0; }  // bytes for a thread
    explicit Product(char* workspace) {}

    // Computes the columns [first, end) of x · wᵀ for the first `rows` rows of x.
    void operator()(const Operand<X>& x, Matrix w, int rows, int first, int end, Target to) const {
        const int tiles = (rows + ROWS - 1) / ROWS;
        const bool near = rows * (int64_t)x.width * (int64_t)sizeof(X) <= NEAR_BYTES;
        const int panel = near ? COLUMNS : PANEL * COLUMNS;
        for (int begin = first; begin < end; begin += panel) {
            const int stop = begin + panel < end ? begin + panel : end;
            for (int t = 0; t < tiles; t++) {
                const int count = rows - t * ROWS < ROWS ? rows - t * ROWS : ROWS;
                for (int n = begin, columns; n < stop; n += columns) {
                    columns = n + COLUMNS <= stop ? COLUMNS : 1;
                    const int64_t ahead = near || tiles == 1 ? AHEAD * columns : panel;
                    part(x, w, t * ROWS, count, n, columns, {ahead * x.width, tiles, t}, to);
                }
            }
        }
    }

private:
    static inline void part(const Operand<X>& x, Matrix w, int first, int rows, int n, int columns, Prefetch next,
                            Target to) {
        float out[ROWS * COLUMNS + 3];
        const X* from = x.matrix + (int64_t)first * x.width;
        const W* at = w.values + (int64_t)n * x.width;
        if (columns < COLUMNS)
            tile_rows<1, false>(rows, from, at, x.width, next, out);
        else if (next.tiles == 1)
            tile_rows<COLUMNS, true>(rows, from, at, x.width, next, out);
        else
            tile_rows<COLUMNS, false>(rows, from, at, x.width, next, out);
        for (int r = 0; r < rows; r++) {
            float* row = to.values + (first + r) * to.stride + n;
            for (int c = 0; c < columns; c++) {
                const float value = out[r * columns + c];
                const float scaled = w.scale ? value * w.scale[n + c] : value;
                row[c] = to.add ? row[c] + scaled : scaled;
            }
        }
    }
};

// Products of activations with the weights of a linear layer.
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
constexpr int AHEAD = 4;           // prefetch distance, in tiles of columns

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

template <int R, int C>
static inline void tile(const NARROW* x, const WEIGHT* w, int width, float out[ROWS][COLUMNS]) {
    typedef Dot<NARROW, WEIGHT> D;
    vec sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = vec{};
    int k = 0;
    for (; k + D::STEP <= width; k += D::STEP) {
        typename D::Register weights[C];
        for (int c = 0; c < C; c++) {
            const WEIGHT* at = w + (int64_t)c * width + k;
            weights[c] = D::weight(at);
            __builtin_prefetch(at + (int64_t)AHEAD * C * width, 0, 2);  // into the L2 cache: L1 is too small
        }
        for (int r = 0; r < R; r++) {
            typename D::Register row = D::activation(x + (int64_t)r * width + k);
#if defined(__AVX512F__)
            asm("" : "+v"(row));  // keeps it in a register; the compiler would load it again for each product
#endif
            for (int c = 0; c < C; c++) sums[r][c] = D::add(sums[r][c], row, weights[c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float total = sum(sums[r][c]);
            for (int j = k; j < width; j++) total += wide(x[(int64_t)r * width + j]) * wide(w[(int64_t)c * width + j]);
            out[r][c] = total;
        }
}
template <int C>
static void tile_rows(int rows, const NARROW* x, const WEIGHT* w, int width, float out[ROWS][COLUMNS]) {
    switch (rows) {
        case 1: return tile<1, C>(x, w, width, out);
        case 2: return tile<2, C>(x, w, width, out);
        case 3: return tile<3, C>(x, w, width, out);
        case 4: return tile<4, C>(x, w, width, out);
        case 5: return tile<ROWS < 5 ? ROWS : 5, C>(x, w, width, out);
        case 6: return tile<ROWS < 6 ? ROWS : 6, C>(x, w, width, out);
        case 7: return tile<ROWS < 7 ? ROWS : 7, C>(x, w, width, out);
        default: return tile<ROWS, C>(x, w, width, out);
    }
}

struct Matrix {
    const WEIGHT* values;
    const float* scale;
};

// Calls put(row, column, value) for all rows and the columns [first, end) of x · wᵀ.
template <typename Put>
static void product(const NARROW* x, Matrix w, int rows, int width, int first, int end, Put put) {
    float out[ROWS][COLUMNS];
    for (int n = first; n < end;) {
        const int columns = n + COLUMNS <= end ? COLUMNS : 1;
        const WEIGHT* at = w.values + (int64_t)n * width;
        for (int r = 0; r < rows; r += ROWS) {
            const int count = rows - r < ROWS ? rows - r : ROWS;
            if (columns == COLUMNS)
                tile_rows<COLUMNS>(count, x + (int64_t)r * width, at, width, out);
            else
                tile_rows<1>(count, x + (int64_t)r * width, at, width, out);
            for (int i = 0; i < count; i++)
                for (int c = 0; c < columns; c++)
                    put(r + i, n + c, w.scale ? out[i][c] * w.scale[n + c] : out[i][c]);
        }
        n += columns;
    }
}

// Products of bfloat16 activations by the matrix unit of Intel processors (AMX). It multiplies tiles in registers: 16
// outputs × 32 inputs of weights, which it reads from the model's own matrix, times 32 inputs × 16 rows of activations.
//
// All numbers of rows take this way, and every sum runs over the inputs in the same order, so the result of a row does
// not depend on the other rows or on their number.
#pragma once
#include <type_traits>

#include "product.h"

#if defined(TILE_MODEL)  // a test's plain C++ model of the instructions; it defines them
#define TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Asks the kernel for the tile registers, which a process may not use by default. Returns 0, or the error's number.
static inline int allow_tiles() {
#if defined(TILES) && !defined(TILE_MODEL)
    const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) ? errno : 0;
#else
    return 0;
#endif
}

#ifdef TILES
constexpr int TILE = 16, TILE_INPUTS = 32;                 // outputs or rows of a tile; inputs
constexpr int TILE_ELEMENTS = TILE * TILE_INPUTS;          // of bfloat16
static inline int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Activations in the order of tiles: (rows / 16, inputs / 2, 16, 2), the inputs padded with zeros to a multiple of 32.
// A product does not read the columns of a tile for rows that do not exist, so these may hold anything.
template <> struct Operand<bf16> {
    bf16 *matrix, *packed;
    int64_t rows;
    int width;

    static int64_t packed_size(int64_t rows, int64_t width) {
        return tiles_of(rows, TILE) * tiles_of(width, TILE_INPUTS) * TILE_ELEMENTS;
    }
    Operand(bf16* matrix, bf16* packed, int64_t rows, int width)
        : matrix(matrix), packed(packed), rows(rows), width(width) {}
    int64_t block() const { return tiles_of(width, TILE_INPUTS) * TILE_ELEMENTS; }

    void start() const {  // zeros the padding
        if (width % TILE_INPUTS == 0) return;
        for (int64_t b = 1; b <= tiles_of(rows, TILE); b++)
            memset(packed + b * block() - TILE_ELEMENTS, 0, TILE_ELEMENTS * sizeof(bf16));
    }
    void update(int row, int column, int count) const {  // `column` is even
        const bf16* from = matrix + (int64_t)row * width + column;
        bf16* to = packed + row / TILE * block() + row % TILE * 2 + column * TILE;
        for (int c = 0; c + 1 < count; c += 2) memcpy(to + c * TILE, from + c, 2 * sizeof(bf16));
        if (count % 2) to[(count - 1) * TILE] = from[count - 1];
    }
};

// Writes a matrix of 16 × 16 floats as the rows of `to`, transposed.
static inline void transpose(const float* from, float* to) {
#if defined(__AVX512F__)
    __m512 rows[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) rows[i] = _mm512_load_ps(from + i * TILE);
#pragma GCC unroll 4
    for (int step = 1; step < TILE; step *= 2) {  // exchanges the off-diagonal quarters of all squares of 2 · step
        alignas(64) int32_t low[TILE], high[TILE];
#pragma GCC unroll 16
        for (int j = 0; j < TILE; j++) {
            low[j] = j & step ? TILE + j - step : j;
            high[j] = j & step ? TILE + j : j + step;
        }
        const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            if (i & step) continue;
            const __m512 a = rows[i], b = rows[i + step];
            rows[i] = _mm512_permutex2var_ps(a, first, b);
            rows[i + step] = _mm512_permutex2var_ps(a, second, b);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) _mm512_store_ps(to + i * TILE, rows[i]);
#else
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) to[i * TILE + j] = from[j * TILE + i];
#endif
}

// Sums of two tiles of outputs for a block of rows → `rows` rows of `outputs` columns of the target.
static inline void put(const float* sums, const float* scale, int rows, int outputs, Target to) {
    alignas(64) float turned[TILE * TILE];
    for (; outputs > 0; outputs -= TILE) {
        transpose(sums, turned);
        const int count = outputs < TILE ? outputs : TILE;
        for (int r = 0; r < rows; r++) {
            float* row = to.values + r * to.stride;
            const auto write = [&](int c) {
                const float value = turned[r * TILE + c], scaled = scale ? value * scale[c] : value;
                row[c] = to.add ? row[c] + scaled : scaled;
            };
            if (count == TILE)
                for (int c = 0; c < TILE; c++) write(c);
            else
                for (int c = 0; c < count; c++) write(c);
        }
        sums += TILE * TILE, to.values += TILE;
        if (scale) scale += TILE;
    }
}

static inline void to_bfloat16(const bf16* from, int count, bf16* to) { memcpy(to, from, count * sizeof(bf16)); }
static inline void to_bfloat16(const int8_t* from, int count, bf16* to) {  // exact
    for (int i = 0; i < count; i++) {
        const float value = from[i];
        uint32_t bits;
        memcpy(&bits, &value, 4);
        to[i] = (bf16)(bits >> 16);
    }
}
static inline void to_bfloat16(const float*, int, bf16*) {}  // float weights have float activations

template <typename W> class Product<bf16, W> {
public:
    static constexpr int UNIT = 2 * TILE;
    static int64_t workspace(int64_t width) {
        return UNIT * tiles_of(width, TILE_INPUTS) * TILE_INPUTS * (int64_t)sizeof(bf16);
    }
    explicit Product(char* workspace) : panel((bf16*)workspace) {  // footgun: each thread has its own configuration
        alignas(64) Configuration all{};
        all.palette = 1;
        for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = TILE;
        // footgun: the compiler does not know that the instructions for loading read all of this memory.
        asm volatile("" : : "r"(&all) : "memory");
        _tile_loadconfig(&all);
    }
    ~Product() { _tile_release(); }
    Product(const Product&) = delete;

    void operator()(const Operand<bf16>& x, Matrix w, int rows, int first, int end, Target to) const {
        const int64_t width = x.width, steps = tiles_of(width, TILE_INPUTS), blocks = tiles_of(rows, TILE);
        alignas(64) float sums[2][UNIT * TILE];
        for (int n = first; n < end; n += UNIT) {
            const int outputs = n + UNIT <= end ? UNIT : end - n;
            const W* from = w.values + n * width;
            Weights weights{(const bf16*)from, width, from + UNIT * width};
            if (!std::is_same<W, bf16>::value || width % TILE_INPUTS || outputs < UNIT)
                weights.values = panel, weights.stride = copy(from, outputs, width);
            asm volatile("" : : : "memory");  // the panel is written, see above
            for (int64_t b = 0; b < blocks; b += 2) {
                const bf16* block = x.packed + b * x.block();
                const int turns = (blocks + 1) / 2, turn = b / 2;  // each prefetches a part of the next weights
                if (b + 1 < blocks)
                    multiply<2>(weights, width, block, x.block(), steps, turns, turn, sums);
                else
                    multiply<1>(weights, width, block, x.block(), steps, turns, turn, sums);
                for (int64_t i = b; i < b + 2 && i < blocks; i++) {
                    const int left = rows - i * TILE, count = left < TILE ? left : TILE;
                    const Target part{to.values + i * TILE * to.stride + n, to.stride, to.add};
                    put(sums[i - b], w.scale ? w.scale + n : nullptr, count, outputs, part);
                }
            }
        }
    }

private:
    struct Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];  // of a row of each tile
        uint8_t rows[16];
    };
    struct Weights {
        const bf16* values;  // (32, inputs)
        int64_t stride;
        const W* next;  // to be prefetched
    };
    bf16* panel;

    // Weights that tiles cannot read in place: of another type, or with outputs or inputs missing, which become zeros.
    int64_t copy(const W* from, int outputs, int64_t width) const {
        const int64_t stride = tiles_of(width, TILE_INPUTS) * TILE_INPUTS;
        for (int o = 0; o < UNIT; o++) {
            bf16* to = panel + o * stride;
            const int64_t count = o < outputs ? width : 0;
            to_bfloat16(from + o * width, (int)count, to);
            memset(to + count, 0, (stride - count) * sizeof(bf16));
        }
        return stride;
    }

    // Sums of 32 outputs for one or two blocks of rows. Tiles 0 … 3 are sums, 4 and 5 weights, 6 and 7 activations.
    template <int BLOCKS>
    static inline void multiply(const Weights& w, int64_t width, const bf16* x, int64_t block, int64_t steps, int turns,
                                int turn, float sums[2][UNIT * TILE]) {
        _tile_zero(0);
        _tile_zero(1);
        if (BLOCKS == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t k = 0; k < steps; k++) {
            if (turn-- == 0) {
                turn = turns - 1;
                for (int o = 0; o < UNIT; o++) __builtin_prefetch(w.next + o * width + k * TILE_INPUTS, 0, 2);
            }
            const bf16 *weights = w.values + k * TILE_INPUTS, *rows = x + k * TILE_ELEMENTS;
            _tile_loadd(4, weights, w.stride * 2);
            _tile_loadd(6, rows, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights + TILE * w.stride, w.stride * 2);
            _tile_dpbf16ps(1, 5, 6);
            if (BLOCKS == 2) {
                _tile_loadd(7, rows + block, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[0] + TILE * TILE, 64);
        if (BLOCKS == 2) {
            _tile_stored(2, sums[1], 64);
            _tile_stored(3, sums[1] + TILE * TILE, 64);
        }
    }
};
#endif

// A plain C++ model of the instructions of Intel's matrix unit (AMX) that tiles.h uses, after Intel's manual. The test
// compiles the decode step with it: -include tile_model.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define TILE_MODEL 1
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace tile_model {
struct Tile {
    int rows, bytes;
    alignas(64) uint8_t data[16][64];
};
struct Registers {
    bool configured = false;
    Tile tile[8];
};
inline thread_local Registers registers;

inline Tile& tile(int number) {
    if (!registers.configured) abort();  // an invalid instruction
    return registers.tile[number];
}
inline float quiet(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float bfloat16(const uint8_t* at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return quiet(value);
}

inline void loadconfig(const void* from) {
    const uint8_t* bytes = (const uint8_t*)from;
    if (bytes[0] != 1) abort();  // the palette
    registers.configured = true;
    for (int i = 0; i < 8; i++) {
        uint16_t width;
        memcpy(&width, bytes + 16 + 2 * i, 2);
        if (width > 64 || bytes[48 + i] > 16) abort();
        registers.tile[i] = {bytes[48 + i], width, {}};
    }
}
inline void release() { registers = Registers(); }
inline void zero(int to) { memset(tile(to).data, 0, sizeof(Tile::data)); }
inline void load(int to, const void* from, int64_t stride) {
    zero(to);
    Tile& t = tile(to);
    for (int r = 0; r < t.rows; r++) memcpy(t.data[r], (const uint8_t*)from + r * stride, t.bytes);
}
inline void store(int from, void* to, int64_t stride) {
    const Tile& t = tile(from);
    for (int r = 0; r < t.rows; r++) memcpy((uint8_t*)to + r * stride, t.data[r], t.bytes);
}
// Pairs of a row of `a` times pairs of a column of `b`. The products of even and of odd places have sums of their own.
inline void multiply(int to, int left, int right) {
    Tile &sums = tile(to), &a = tile(left), &b = tile(right);
    for (int m = 0; m < sums.rows; m++)
        for (int n = 0; n < sums.bytes / 4; n++) {
            float parts[2] = {0, 0}, total;
            for (int k = 0; k < a.bytes / 4; k++)
                for (int i = 0; i < 2; i++) {
                    const float x = bfloat16(a.data[m] + 4 * k + 2 * i), y = bfloat16(b.data[k] + 4 * n + 2 * i);
                    parts[i] = quiet(std::fma(x, y, parts[i]));
                }
            memcpy(&total, sums.data[m] + 4 * n, 4);
            total = quiet(quiet(total) + quiet(parts[0] + parts[1]));
            memcpy(sums.data[m] + 4 * n, &total, 4);
        }
}
}  // namespace tile_model

#define _tile_loadconfig tile_model::loadconfig
#define _tile_release tile_model::release
#define _tile_zero tile_model::zero
#define _tile_loadd tile_model::load
#define _tile_stored tile_model::store
#define _tile_dpbf16ps tile_model::multiply

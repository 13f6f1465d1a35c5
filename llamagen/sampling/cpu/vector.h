// Vectors of floats of the machine's width, by the vector extensions of GCC and Clang: one source for x86 and Arm.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef int8_t bvec __attribute__((vector_size(LANES)));

static inline float wide(float x) { return x; }
static inline float wide(int8_t x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline void store(float x, float* to) { *to = x; }
static inline void store(float x, bf16* to) {  // rounds to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vec load(const float* from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}
static inline vec load(const bf16* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
    hvec half;
    memcpy(&half, from, sizeof half);
    uvec bits = __builtin_convertvector(half, uvec) << 16;
    vec value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}
static inline vec load(const int8_t* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
    bvec bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, vec);
#endif
}
static inline void store(vec x, float* to) { memcpy(to, &x, sizeof x); }
static inline void store(vec x, bf16* to) {  // rounds like the function above; some processors flush subnormals
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    const auto half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &half, sizeof half);
#else
    const uvec bits = (uvec)x;
    const hvec half = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, hvec);
    memcpy(to, &half, sizeof half);
#endif
}
static inline float sum(vec v) {
    typedef float quarter __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
    const __m256 half = _mm512_castps512_ps256((__m512)v) + upper;
    const quarter q = (quarter)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    const quarter q = (quarter)(_mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1));
#else
    const quarter q = v;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}
static inline float maximum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}
static inline ivec lane_numbers() {
    ivec numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}
static inline vec exponential(vec x) {  // for x ≤ 0, with a relative error of at most 2e-7
    const vec low = vec{} - 87.0f;
    x = x < low ? low : x;
    ivec whole = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);
    vec n = __builtin_convertvector(whole, vec);
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (whole + 127) << 23;
    vec power;
    memcpy(&power, &exponent, sizeof power);
    return p * power;
}
static inline vec logarithm(vec x) {  // for positive normal x, with an error of at most 2e-7 · max(1, |log x|)
    ivec bits;
    memcpy(&bits, &x, sizeof bits);
    ivec exponent = ((bits >> 23) & 0xff) - 126;
    bits = (bits & 0x007fffff) | 0x3f000000;
    vec m;  // in [0.5, 1)
    memcpy(&m, &bits, sizeof m);
    const ivec low = m < 0.707106781186547524f;  // -1 or 0
    exponent += low;
    vec n = __builtin_convertvector(exponent, vec);
    m = (low ? m + m : m) - 1.0f;
    const vec square = m * m;
    vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square - n * 2.12194440e-4f - square * 0.5f;
    return m + p + n * 0.693359375f;
}

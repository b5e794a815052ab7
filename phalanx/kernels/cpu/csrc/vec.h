// Sixteen fp32 lanes in the compiler's own vector types: one AVX-512 register, two AVX2 or four SSE registers.
// Intrinsics only where g++ 12 misses the one right instruction. Every reduction has one fixed order, so that the bits
// of a row do not depend on what is computed beside it.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define PHALANX_API extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

INLINE vec broadcast(float x) { return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vec max(vec a, vec b) { return a > b ? a : b; }
INLINE ivec iota() { return ivec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE vec load(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE vec load(const bf16* p) {
    hvec x;
    memcpy(&x, p, sizeof x);
#ifdef __AVX512F__
    return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (vec)(__builtin_convertvector(x, uvec) << 16);
#endif
}
INLINE void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
INLINE void store(bf16* p, vec x) {  // to nearest, ties to even
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
    const uvec bits = (uvec)x;
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    hvec half = __builtin_convertvector(x == x ? rounded : uvec{} + 0x7fc0, hvec);
#endif
    memcpy(p, &half, sizeof half);
}

// The first n of 16 lanes; the others read as 0 and are not written.
template <class T>
INLINE vec load_part(const T* p, int n) {
    if (n >= LANES) return load(p);
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T>
INLINE void store_part(T* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    T part[LANES];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

// What x becomes when it is stored as T and read again.
template <class T>
INLINE vec rounded_to(vec x) {
    T stored[LANES];
    store(stored, x);
    return load(stored);
}

INLINE float sum(vec x) {
    x += __builtin_shuffle(x, ivec{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, ivec{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    return (x[0] + x[2]) + (x[1] + x[3]);
}
INLINE float largest(vec x) {
    x = max(x, __builtin_shuffle(x, ivec{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    x = max(x, __builtin_shuffle(x, ivec{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

// e^x to about 1 ulp; 0 below -87.3, NaN stays NaN. x = n ln2 + r, e^x = 2^n e^r, a Taylor polynomial for e^r.
INLINE vec exp(vec x) {
    const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    vec in_range = x > 88.0f ? broadcast(88.0f) : x;
    in_range = in_range < -87.3f ? broadcast(-87.3f) : in_range;
    vec shifted = in_range * 1.44269504f + ROUND;
    vec n = shifted - ROUND;
    vec r = in_range - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec e = broadcast(1.9875691500e-4f);
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    vec power = (vec)(((ivec)shifted << 23) + 0x3f800000);
    return x < -87.3f ? vec{} : e * power;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

INLINE vec tanh(vec x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// Natural logarithm of positive normal x to about 1 ulp. x = 2^n m with m in [1/sqrt2, sqrt2).
INLINE vec log(vec x) {
    ivec bits = (ivec)x - 0x3f3504f3;
    vec n = __builtin_convertvector(bits >> 23, vec);
    vec f = (vec)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vec p = broadcast(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    vec square = f * f;
    vec tail = p * f * square + n * -2.12194440e-4f - 0.5f * square;
    return f + tail + n * 0.693359375f;
}

// Products of rows go word by word: a 32-bit word is one fp32 element or a pair of bf16 elements.
template <class T>
constexpr long words(long elements) {
    return elements * sizeof(T) / 4;
}

// acc + a . b of one word per lane, in fp32.
INLINE vec dot_word(vec acc, vec a, vec b, const float*) { return acc + a * b; }
INLINE vec dot_word(vec acc, vec a, vec b, const bf16*) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    const vec a_odd = (vec)((uvec)a & 0xffff0000u), b_odd = (vec)((uvec)b & 0xffff0000u);
    return acc + a_odd * b_odd + (vec)((uvec)a << 16) * (vec)((uvec)b << 16);
#endif
}

// Turn a small run-time number, 1 <= n <= N, into a template argument: body(Int<n>).
template <int N>
struct Int {
    static constexpr int value = N;
};
template <int N, class Body>
INLINE void with_int(int n, const Body& body) {
    if constexpr (N > 1) {
        if (n < N) return with_int<N - 1>(n, body);
    }
    body(Int<N>{});
}

// The inner loops of attention.cpp: a tile of 64 keys against a few query rows, all in registers.
#pragma once
#include "vec.h"

#include <algorithm>
#include <cmath>

constexpr int TILE = 64;        // keys
constexpr int SCORE_ROWS = 6;   // 6 rows x 4 vectors of keys in registers
constexpr int VALUE_ROWS = 4;   // 4 rows x 4 vectors of dims in registers

INLINE void transpose(vec r[LANES]) {
    vec t[LANES];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = __builtin_shuffle(r[i], r[i + 1], ivec{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
        t[i + 1] = __builtin_shuffle(r[i], r[i + 1], ivec{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        UNROLL for (int j = 0; j < 2; ++j) {
            vec a = t[i + j], b = t[i + j + 2];
            r[i + 2 * j] = __builtin_shuffle(a, b, ivec{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
            r[i + 2 * j + 1] =
                __builtin_shuffle(a, b, ivec{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
        }
    }
    UNROLL for (int i = 0; i < 16; i += 8) {
        UNROLL for (int j = 0; j < 4; ++j) {
            vec a = r[i + j], b = r[i + j + 4];
            t[i + j] = __builtin_shuffle(a, b, ivec{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
            t[i + j + 4] = __builtin_shuffle(a, b, ivec{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
        }
    }
    UNROLL for (int j = 0; j < 8; ++j) {
        const vec a = t[j], b = t[j + 8];
        r[j] = __builtin_shuffle(a, b, ivec{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
        r[j + 8] = __builtin_shuffle(a, b, ivec{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    }
}

// Up to 16 words of 16 keys, from word `at`, to out[word][TILE]; meanwhile the next tile's rows are on their way.
template <int WORDS, class T>
INLINE void transpose_words(const T* const* keys, const T* const* next, int at, float* out) {
    vec rows[LANES] = {};
    UNROLL for (int i = 0; i < LANES; ++i) {
        memcpy(&rows[i], (const char*)keys[i] + 4 * at, 4 * WORDS);
        __builtin_prefetch((const char*)next[i] + 4 * at);
    }
    transpose(rows);
    UNROLL for (int i = 0; i < WORDS; ++i) store(out + (at + i) * TILE, rows[i]);
}

// 16 keys, whole rows; a row is a whole number of 16 fp32 or bf16 elements.
template <class T>
INLINE void transpose_keys(const T* const* keys, const T* const* next, int num_words, float* out) {
    int at = 0;
    for (; at + LANES <= num_words; at += LANES) transpose_words<LANES>(keys, next, at, out);
    if (at < num_words) transpose_words<LANES / 2>(keys, next, at, out);
}

// scores[R][16 V] = q[R] . k, q as words
template <class T, int R, int V>
void score_rows(const float* q, int num_words, const float* k_transposed, float* scores) {
    vec acc[R][V] = {};
    for (int w = 0; w < num_words; ++w) {
        vec k[V];
        UNROLL for (int v = 0; v < V; ++v) k[v] = load(k_transposed + w * TILE + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            const vec x = broadcast(q[r * num_words + w]);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_word(acc[r][v], x, k[v], (const T*)nullptr);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v)
        store(scores + r * TILE + v * LANES, acc[r][v]);
}

// acc[R][16 V] = alpha[R] acc + sum over keys of p v; `next` = the next tile's values to fetch meanwhile, or null.
template <class T, int R, int V>
INLINE void value_rows(const T* const* values, const T* const* next, int at, int first, int last, const float* p,
                       const float* alpha, float* acc, int padded) {
    vec sum[R][V];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v)
        sum[r][v] = load(acc + r * padded + at + v * LANES) * alpha[r];
    for (int key = first; key < last; ++key) {
        const T* row = values[key] + at;
        if (next)
            for (int i = 0; i < V * LANES; i += 64 / sizeof(T)) __builtin_prefetch(next[key] + at + i);
        vec x[V];
        UNROLL for (int v = 0; v < V; ++v) x[v] = load(row + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            vec weight = broadcast(p[r * TILE + key]);
            UNROLL for (int v = 0; v < V; ++v) sum[r][v] += weight * x[v];
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v)
        store(acc + r * padded + at + v * LANES, sum[r][v]);
}

template <class T>
INLINE void add_values(const T* const* values, const T* const* next, int rows, int first, int last, const float* p,
                       const float* alpha, float* acc, int padded) {
    for (int at = 0; at < padded; at += 4 * LANES)
        with_int<VALUE_ROWS>(rows, [&](auto r) {
            with_int<4>(std::min((padded - at) / LANES, 4), [&](auto v) {
                value_rows<T, r.value, v.value>(values, next, at, first, last, p, alpha, acc, padded);
            });
        });
}

// One step of the online softmax of one row: scores become probabilities relative to the new maximum.
INLINE void softmax_row(float* scores, int start, int vectors, int first_key, int last_key, float scale, float softcap,
                        float& top, float& total, float& alpha) {
    vec x[TILE / LANES];
    vec best = broadcast(-INFINITY);
    for (int v = 0; v < vectors; ++v) {
        x[v] = load(scores + v * LANES) * scale;
        if (softcap > 0) x[v] = softcap * tanh(x[v] * (1.0f / softcap));
        ivec key = iota() + (start + v * LANES);
        x[v] = ((key >= first_key) & (key < last_key)) ? x[v] : broadcast(-INFINITY);
        best = max(best, x[v]);
    }
    const float highest = largest(best), new_top = top > highest ? top : highest;
    const float base = new_top == -INFINITY ? 0.0f : new_top;
    vec added{};
    for (int v = 0; v < vectors; ++v) {
        vec p = exp(x[v] - base);
        store(scores + v * LANES, p);
        added += p;
    }
    alpha = exp(broadcast(top - base))[0];
    total = total * alpha + sum(added);
    top = new_top;
}

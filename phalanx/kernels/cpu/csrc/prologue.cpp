// qkv_prologue: per token and head, norm and rotate in fp32, then one store to q or to the KV pool.
#include "vec.h"

#include <cmath>
#include <vector>

namespace {

// A head's row as fp32, zero up to a whole number of vectors.
template <class T>
INLINE void read_row(const T* x, float* row, int dim) {
    for (int i = 0; i < dim; i += LANES) store(row + i, load_part(x + i, dim - i));
}

template <class T>
INLINE void write_row(const float* row, T* out, int dim) {
    for (int i = 0; i < dim; i += LANES) store_part(out + i, load(row + i), dim - i);
}

INLINE void rms_norm(float* row, const float* weight, int dim, float eps) {
    vec squares{};
    for (int i = 0; i < dim; i += LANES) squares += load(row + i) * load(row + i);
    vec scale = broadcast(1.0f / std::sqrt(sum(squares) / dim + eps));
    for (int i = 0; i < dim; i += LANES) store(row + i, load(row + i) * scale * load_part(weight + i, dim - i));
}

INLINE void rotate(float* row, const float* cos, int half, bool interleaved) {
    const float* sin = cos + half;
    int i = 0;
    if (interleaved) {
        for (; i < half; ++i) {
            float a = row[2 * i], b = row[2 * i + 1];
            row[2 * i] = a * cos[i] - b * sin[i];
            row[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (; i + LANES <= half; i += LANES) {
        vec a = load(row + i), b = load(row + half + i), c = load(cos + i), s = load(sin + i);
        store(row + i, a * c - b * s);
        store(row + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        float a = row[i], b = row[half + i];
        row[i] = a * cos[i] - b * sin[i];
        row[half + i] = b * cos[i] + a * sin[i];
    }
}

struct Shape {
    long tokens;
    int kv_heads, group, dim, rotary_dim, block_size, layers, layer, interleaved;
    float eps;
};

template <class T>
void token(const Shape& s, long t, const T* qkv, const float* cos_sin, const float* q_weight, const float* k_weight,
           long slot, T* kv, T* q, float* row) {
    const int heads = s.kv_heads * s.group, half = s.rotary_dim / 2;
    const T* in = qkv + t * (heads + 2L * s.kv_heads) * s.dim;
    for (int h = 0; h < heads; ++h) {
        read_row(in + (long)h * s.dim, row, s.dim);
        if (q_weight) rms_norm(row, q_weight, s.dim, s.eps);
        rotate(row, cos_sin, half, s.interleaved);
        write_row(row, q + ((h / s.group * s.tokens + t) * s.group + h % s.group) * s.dim, s.dim);
    }
    if (slot < 0) return;
    const long head_size = (long)s.block_size * s.dim;
    const long first_head = (slot / s.block_size * s.layers + s.layer) * 2 * s.kv_heads;
    T* keys = kv + first_head * head_size + slot % s.block_size * s.dim;
    for (int h = 0; h < s.kv_heads; ++h) {
        read_row(in + (long)(heads + h) * s.dim, row, s.dim);
        if (k_weight) rms_norm(row, k_weight, s.dim, s.eps);
        rotate(row, cos_sin, half, s.interleaved);
        write_row(row, keys + h * head_size, s.dim);
        memcpy(keys + (s.kv_heads + h) * head_size, in + (long)(heads + s.kv_heads + h) * s.dim, s.dim * sizeof(T));
    }
}

template <class T>
void qkv_prologue(const T* qkv, const int* positions, const float* cos_sin, const float* q_weight,
                  const float* k_weight, const int64_t* slots, T* kv, T* q, const Shape& s, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && s.tokens > 3)
    {
        std::vector<float> row(ceil_div(s.dim, LANES) * LANES);
#pragma omp for
        for (long t = 0; t < s.tokens; ++t)
            token(s, t, qkv, cos_sin + (long)positions[t] * s.rotary_dim, q_weight, k_weight, slots[t], kv, q,
                  row.data());
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void qkv_prologue_##SUFFIX(                                                                            \
        const T* qkv, const int* positions, const float* cos_sin, const float* q_weight, const float* k_weight,        \
        const int64_t* slots, T* kv, T* q, long tokens, int kv_heads, int group, int dim, int rotary_dim,              \
        int block_size, int layers, int layer, int interleaved, float eps, int threads) {                              \
        Shape shape{tokens, kv_heads, group, dim, rotary_dim, block_size, layers, layer, interleaved, eps};            \
        qkv_prologue(qkv, positions, cos_sin, q_weight, k_weight, slots, kv, q, shape, threads);                       \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

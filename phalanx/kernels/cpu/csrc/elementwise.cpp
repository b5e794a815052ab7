// add_rms_norm and act_mul: one pass over memory, one row at a time.
#include "activation.h"

#include <cmath>

namespace {

constexpr long PARALLEL_FROM = 16384;  // elements; below, starting a team costs more than it saves

template <class T>
void norm_row(const T* x, const T* residual, const float* weight, T* y, T* stream, long width, float eps) {
    vec squares{};
    for (long i = 0; i < width; i += LANES) {
        int n = width - i < LANES ? width - i : LANES;
        vec v = load_part(x + i, n);
        if (residual) {
            v = rounded_to<T>(v + load_part(residual + i, n));
            store_part(stream + i, v, n);
        }
        squares += v * v;
    }
    const T* row = residual ? stream : x;
    vec scale = broadcast(1.0f / std::sqrt(sum(squares) / width + eps));
    for (long i = 0; i < width; i += LANES) {
        int n = width - i < LANES ? width - i : LANES;
        store_part(y + i, load_part(row + i, n) * scale * load_part(weight + i, n), n);
    }
}

template <class T>
void add_rms_norm(const T* x, const T* residual, const float* weight, T* y, T* stream, long rows, long width, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1 && rows * width >= PARALLEL_FROM)
    for (long row = 0; row < rows; ++row) {
        long at = row * width;
        norm_row(x + at, residual ? residual + at : nullptr, weight, y + at, residual ? stream + at : nullptr, width,
                 eps);
    }
}

template <class T, class Activation>
void act_mul(const T* gate_up, T* out, long rows, long width, int threads, Activation activation) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1 && rows * width >= PARALLEL_FROM)
    for (long row = 0; row < rows; ++row) {
        const T *gate = gate_up + 2 * row * width, *up = gate + width;
        for (long i = 0; i < width; i += LANES) {
            int n = width - i < LANES ? width - i : LANES;
            store_part(out + row * width + i, activation(load_part(gate + i, n)) * load_part(up + i, n), n);
        }
    }
}

template <class T>
void act_mul(const T* gate_up, T* out, long rows, long width, int gelu, int threads) {
    if (gelu)
        act_mul(gate_up, out, rows, width, threads, [](vec x) { return gelu_tanh(x); });
    else
        act_mul(gate_up, out, rows, width, threads, [](vec x) { return silu(x); });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void add_rms_norm_##SUFFIX(const T* x, const T* residual, const float* weight, T* y, T* stream,        \
                                           long rows, long width, float eps, int threads) {                            \
        add_rms_norm(x, residual, weight, y, stream, rows, width, eps, threads);                                       \
    }                                                                                                                  \
    PHALANX_API void act_mul_##SUFFIX(const T* gate_up, T* out, long rows, long width, int gelu, int threads) {        \
        act_mul(gate_up, out, rows, width, gelu, threads);                                                             \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

// linear: y = x w^T + bias with the weight packed in panels of 64 outputs, [panel][word of k][64].
//
// An output element is one chain of multiply-adds over k, kept in a register, so its bits depend neither on the number of
// rows nor on the threads. A panel stays in the L2 cache for all rows.
#include "attention_tile.h"

#include <atomic>

namespace {

#ifndef PV
#define PV 2
#define PR 12
#endif
constexpr int VECTORS = PV, PANEL = VECTORS * LANES;
constexpr int ROWS = PR;
constexpr int ITEM_ROWS = 192;  // rows of one work item

template <class T, int R>
void panel_rows(const T* x, const float* panel, const float* ahead, int lines, const float* bias, T* y, long k, long n, int columns) {
    const int num_words = words<T>(k);
    vec acc[R][VECTORS] = {};
    const float* row[R];
    UNROLL for (int r = 0; r < R; ++r) row[r] = (const float*)(x + r * k);
    for (int w = 0; w < num_words; ++w) {
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + (w * lines + i) * LANES, 0, 2);
        vec weight[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; ++v) weight[v] = load(panel + w * PANEL + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            const vec value = broadcast(row[r][w]);
            UNROLL for (int v = 0; v < VECTORS; ++v) acc[r][v] = dot_word(acc[r][v], value, weight[v], (const T*)nullptr);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; ++v) {
        const int left = columns - v * LANES;
        if (left <= 0) return;
        const vec b = bias ? load_part(bias + v * LANES, left) : vec{};
        UNROLL for (int r = 0; r < R; ++r) store_part(y + r * n + v * LANES, acc[r][v] + b, left);
    }
}

template <class T>
void linear(const T* x, const float* packed, const float* bias, T* y, long m, long k, long n, int threads) {
    const long panels = (n + PANEL - 1) / PANEL, blocks = (m + ITEM_ROWS - 1) / ITEM_ROWS;
    std::atomic<long> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1 && panels * blocks > 1)
    for (long i; (i = next.fetch_add(1)) < panels * blocks;) {
        const long panel = i / blocks, first = i % blocks * ITEM_ROWS, last = std::min(first + ITEM_ROWS, m);
        const int columns = std::min<long>(n - panel * PANEL, PANEL);
        const long groups = (last - first + ROWS - 1) / ROWS;
        for (long g = 0; g < groups; ++g) {  // rows as even as possible: 8 is 4 + 4, not 6 + 2
            const long from = first + (last - first) * g / groups, to = first + (last - first) * (g + 1) / groups;
            const long parts = std::min<long>(groups, VECTORS), start = VECTORS * g / parts;
            const int lines = groups == 1 || g >= parts || panel + 1 == panels ? 0 : VECTORS * (g + 1) / parts - start;
            const long size = PANEL * words<T>(k);
            with_int<ROWS>(to - from, [&](auto rows) {
                panel_rows<T, rows.value>(x + from * k, packed + panel * size, packed + (panel + 1) * size + start * words<T>(k) * LANES, lines, bias ? bias + panel * PANEL : nullptr,
                                          y + from * n + panel * PANEL, k, n, columns);
            });
        }
    }
}

template <class T>
void pack_linear(const T* weight, float* packed, long n, long k, int threads) {
    const long num_words = words<T>(k), panels = (n + PANEL - 1) / PANEL;
    const float* rows = (const float*)weight;
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < panels; ++panel)
        for (long w = 0; w < num_words; ++w)
            for (long c = 0; c < PANEL; ++c) {
                const long row = panel * PANEL + c;
                memcpy(packed + (panel * num_words + w) * PANEL + c, row < n ? rows + row * num_words + w : rows, 4);
            }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void linear_##SUFFIX(const T* x, const float* packed, const float* bias, T* y, long m, long k, long n, \
                                     int threads) {                                                                    \
        linear(x, packed, bias, y, m, k, n, threads);                                                                  \
    }                                                                                                                  \
    PHALANX_API void pack_linear_##SUFFIX(const T* weight, float* packed, long n, long k, int threads) {               \
        pack_linear(weight, packed, n, k, threads);                                                                    \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

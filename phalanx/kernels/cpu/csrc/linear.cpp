// linear: y = x w^T + bias, with the weight packed in panels of 48 outputs (panel.h).
#include "tiles.h"

#include <atomic>

namespace {

constexpr int VECTORS = 3, PANEL = VECTORS * LANES;
constexpr int ROWS = 8;          // 8 rows x 3 vectors of outputs in registers
constexpr int BLOCK_ROWS = 192;  // rows of a work item, where there are too few panels for the threads

template <class T, int R, int V>
void panel_rows(const T* x, const float* panel, const float* bias, T* y, long k, long n, int columns,
                const Fetch& fetch) {
    vec acc[R][V] = {};
    const T* row[R];
    UNROLL for (int r = 0; r < R; ++r) row[r] = x + r * k;
    multiply<T, R, V, PANEL>(acc, row, panel, words<T>(k), fetch);
    UNROLL for (int v = 0; v < V; ++v) {
        const int left = columns - v * LANES;
        const vec b = bias ? load_part(bias + v * LANES, left) : vec{};
        UNROLL for (int r = 0; r < R; ++r) store_part(y + r * n + v * LANES, acc[r][v] + b, left);
    }
}

#if PHALANX_TILES
template <int V>
void panel_tiles(const bf16* x, const float* panel, const float* bias, bf16* y, long k, long n, int columns, int rows,
                 const Fetch& fetch) {
    alignas(64) float sums[GROUP_ROWS * V * LANES];
    if (rows > TILE_ROWS)
        multiply_tiles<2, V, PANEL>(sums, V * LANES, x, k, rows - TILE_ROWS, panel, words<bf16>(k), fetch);
    else
        multiply_tiles<1, V, PANEL>(sums, V * LANES, x, k, 0, panel, words<bf16>(k), fetch);
    for (int v = 0; v < V; ++v) {
        const int left = columns - v * LANES;
        const vec b = bias ? load_part(bias + v * LANES, left) : vec{};
        for (int r = 0; r < rows; ++r) store_part(y + r * n + v * LANES, load(sums + (r * V + v) * LANES) + b, left);
    }
}
#endif

// Rows [first, last) of one panel.
template <class T>
void panel_block(Tiles& tiles, const T* x, const float* panel, const float* bias, T* y, long k, long n, int columns,
                 const float* next, long first, long last) {
#if PHALANX_TILES
    if constexpr (sizeof(T) == 2) {
        if (fits_tiles(words<T>(k)))
            return in_tiles<VECTORS>(
                tiles, first, last, words<T>(k), panel, next, [&](int rows, long from, const Fetch& fetch) {
                    with_int<VECTORS>(ceil_div(columns, LANES), [&](auto vectors) {
                        panel_tiles<vectors.value>(x + from * k, panel, bias, y + from * n, k, n, columns, rows, fetch);
                    });
                });
    }
#endif
    in_groups<ROWS, VECTORS>(first, last, words<T>(k), panel, next, [&](auto rows, long from, const Fetch& fetch) {
        with_int<VECTORS>(ceil_div(columns, LANES), [&](auto vectors) {
            panel_rows<T, rows.value, vectors.value>(x + from * k, panel, bias, y + from * n, k, n, columns, fetch);
        });
    });
}

template <class T>
void linear(const T* x, const float* packed, const float* bias, T* y, long m, long k, long n, int threads) {
    if (m == 0) return;
    const long panels = ceil_div(n, PANEL), size = words<T>(k) * PANEL;
    const long blocks = panels < 4 * threads ? ceil_div(m, BLOCK_ROWS) : 1, rows = ceil_div(m, blocks);
    std::atomic<long> claimed{0};
#pragma omp parallel num_threads(threads) if (threads > 1 && m * n * k > 1 << 16)
    {
        Tiles tiles;
        // One ahead, so that a thread knows which panel to fetch next.
        for (long i = claimed.fetch_add(1), following; i < panels * blocks; i = following) {
            following = claimed.fetch_add(1);
            const long panel = i / blocks, next = following / blocks, first = i % blocks * rows;
            const float* ahead = next < panels && next != panel ? packed + next * size : nullptr;
            panel_block(tiles, x, packed + panel * size, bias ? bias + panel * PANEL : nullptr, y + panel * PANEL, k, n,
                        std::min<long>(n - panel * PANEL, PANEL), ahead, first, std::min(first + rows, m));
        }
    }
}

template <class T>
void pack_linear(const T* weight, float* packed, long n, long k, int threads) {
    const long panels = ceil_div(n, PANEL), num_words = words<T>(k);
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < panels; ++panel)
        pack_panel<T>(packed + panel * num_words * PANEL, num_words, PANEL, [&](int c) {
            const long output = panel * PANEL + c;
            return output < n ? weight + output * k : nullptr;
        });
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

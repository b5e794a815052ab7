// Products with weights in panels: [word of k][V * LANES outputs]. Shared by linear.cpp and experts.cpp.
//
// An output is one chain of multiply-adds over k that never leaves its register, so its bits depend neither on the
// number of rows nor on the threads. A panel is read from memory once and serves all rows from the L2 cache, while the
// next one is fetched.
#pragma once
#include "vec.h"

#include <algorithm>

constexpr int PREFETCH_FROM = 4;  // rows; below, the panels are read so fast that the hardware runs ahead by itself

// R rows times the first V vectors of a panel of WIDTH outputs; in the meantime `lines` cache lines per word are
// fetched from `ahead` on.
template <class T, int R, int V, int WIDTH>
INLINE void multiply(vec (&acc)[R][V], const T* const (&row)[R], const float* panel, long num_words, const float* ahead,
                     int lines) {
    for (long w = 0; w < num_words; ++w) {
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + (w * lines + i) * LANES);
        vec weight[V];
        UNROLL for (int v = 0; v < V; ++v) weight[v] = load(panel + w * WIDTH + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            const vec value = broadcast(((const float*)row[r])[w]);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_word(acc[r][v], value, weight[v], (const T*)nullptr);
        }
    }
}

// Rows [first, last) of one panel in groups of at most ROWS, as even as possible: body(Int<rows>, from, ahead, lines).
// The groups share the fetching of `ahead`, a panel of the same size with `vectors` lines per word.
template <int ROWS, class Body>
INLINE void in_groups(long first, long last, long num_words, int vectors, const float* ahead, const Body& body) {
    const long groups = ceil_div(last - first, ROWS), parts = std::min<long>(groups, vectors);
    for (long g = 0; g < groups; ++g) {
        const long from = first + (last - first) * g / groups, to = first + (last - first) * (g + 1) / groups;
        const long skip = vectors * g / parts;
        const int lines = ahead && g < parts && last - first >= PREFETCH_FROM ? vectors * (g + 1) / parts - skip : 0;
        with_int<ROWS>(to - from, [&](auto rows) { body(rows, from, ahead + skip * num_words * LANES, lines); });
    }
}

// One weight row per output, output(c) or null for a column of zeros, into a panel of `width` outputs.
template <class T, class Output>
INLINE void pack_panel(float* panel, long num_words, int width, const Output& output) {
    for (int c = 0; c < width; ++c) {
        const T* from = output(c);
        for (long w = 0; w < num_words; ++w)
            if (from)
                memcpy(panel + w * width + c, (const char*)from + 4 * w, 4);
            else
                panel[w * width + c] = 0;
    }
}

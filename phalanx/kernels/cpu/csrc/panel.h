// Products with weights in panels: [word of k][V * LANES outputs]. Shared by linear.cpp and experts.cpp.
// Products of bf16 by tiles are in tiles.h.
//
// An output is one chain of multiply-adds over k that never leaves its register, so its bits depend neither on the
// number of rows nor on the threads. A panel is read from memory once and serves all rows from the L2 cache.
#pragma once
#include "vec.h"

#include <algorithm>

constexpr long NEAR = 1536;  // floats: how far ahead a panel that is read once is fetched

// What a product fetches while it runs, `lines` cache lines per word of k: from `first` on, after `turn` words from
// `then` on; both already moved back by the words before.
struct Fetch {
    const float *first, *then;
    long turn;
    int lines;
};

// R rows times the first V vectors of a panel of WIDTH outputs. One or two rows fetch nothing: they read so fast that
// the hardware runs ahead by itself.
template <class T, int R, int V, int WIDTH>
INLINE void multiply(vec (&acc)[R][V], const T* const (&row)[R], const float* panel, long num_words,
                     const Fetch& fetch) {
    for (long w = 0; w < num_words; ++w) {
        if constexpr (R > 2) {
            const float* ahead = (w < fetch.turn ? fetch.first : fetch.then) + w * fetch.lines * LANES;
            for (int i = 0; i < fetch.lines; ++i) __builtin_prefetch(ahead + i * LANES);
        }
        vec weight[V];
        UNROLL for (int v = 0; v < V; ++v) weight[v] = load(panel + w * WIDTH + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            const vec value = broadcast(((const float*)row[r])[w]);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot_word(acc[r][v], value, weight[v], (const T*)nullptr);
        }
    }
}

// What group g of the rows of a panel fetches.
//
// A single group is as fast as memory: it fetches its own panel a little ahead, and in the end the start of the next.
// Several groups find their panel in the L2 cache and share the fetching of the next one.
template <int VECTORS>
INLINE Fetch fetch_plan(long g, long groups, long num_words, const float* panel, const float* next) {
    const long parts = std::min<long>(groups, VECTORS), line = num_words * LANES, skip = VECTORS * g / parts;
    if (groups == 1)
        return {panel + NEAR, next + NEAR - VECTORS * line, num_words - NEAR / (VECTORS * LANES), VECTORS};
    return {next + skip * line, nullptr, num_words, g < parts ? int(VECTORS * (g + 1) / parts - skip) : 0};
}

// Rows [first, last) of one panel in groups of at most ROWS, as even as possible: body(Int<rows>, from, fetch).
template <int ROWS, int VECTORS, class Body>
INLINE void in_groups(long first, long last, long num_words, const float* panel, const float* next, const Body& body) {
    const long groups = ceil_div(last - first, ROWS);
    for (long g = 0; g < groups; ++g) {
        const long from = first + (last - first) * g / groups, to = first + (last - first) * (g + 1) / groups;
        const Fetch fetch = fetch_plan<VECTORS>(g, groups, num_words, panel, next ? next : panel);
        with_int<ROWS>(to - from, [&](auto rows) { body(rows, from, fetch); });
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

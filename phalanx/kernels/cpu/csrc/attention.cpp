// paged_attention: online softmax over tiles of 64 keys that lie at fixed positions (0-63, 64-127, ...).
//
// A query row's result is a function of its q and its keys alone, bit for bit: every row does the same operations in the
// same order whether it is a decode, stands anywhere in a prefill chunk, or shares its tile with other rows. Masked keys
// have probability +0 and a finite value, so they add nothing. No split of the keys depends on the batch or the threads.
//
// One work item = (sequence, kv head, up to BLOCK_ROWS rows), a row being (token, head of the group). Per tile:
//   k tile, transposed to fp32 [dim][64]  ->  scores [rows][64]  ->  softmax step  ->  acc [rows][dim] += p v
#include "vec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <vector>

namespace {

constexpr int TILE = 64;         // keys
constexpr int BLOCK_ROWS = 96;   // rows that share the conversion of a tile; bounds a thread's scratch to the L2 cache
constexpr int SCORE_ROWS = 6;    // 6 rows x 4 vectors of keys in registers
constexpr int VALUE_ROWS = 4;    // 4 rows x 4 vectors of dims in registers
constexpr int WIDEN_FROM = 12;   // rows from which it pays to convert a value tile to fp32 once

struct Batch {
    const int *cu_seqlens_q, *seq_lens, *block_tables;
    long num_seqs, table_width, tokens;
};

struct Shape {
    int kv_heads, group, dim, block_size, layers, layer;
    float scale, softcap;  // softcap 0 = off
    int window;            // 0 = off
};

// Rows [row, row + rows) of (sequence, kv head), which see the keys [first, last) between them.
struct Item {
    long seq, head;
    int row, rows = 0, q_start, context, first = 0, last = 0;
    const int* table;
};

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Everything one thread needs for one item; all rows padded to whole vectors.
template <class T>
struct Scratch {
    int padded;
    float* storage;
    float *q, *acc, *scores, *k_transposed, *v_wide;
    T *zeros, *staged;
    const T *k[TILE], *v[TILE];
    const float* v_wide_rows[TILE];
    float top[BLOCK_ROWS], total[BLOCK_ROWS], alpha[BLOCK_ROWS];
    int first_key[BLOCK_ROWS], last_key[BLOCK_ROWS];  // visible keys [first, last)

    explicit Scratch(int dim) : padded(round_up(dim, LANES)) {
        const long rows = (long)BLOCK_ROWS * padded, tile = (long)TILE * padded;
        storage = (float*)std::aligned_alloc(64, (2 * rows + BLOCK_ROWS * TILE + 4 * tile + padded) * sizeof(float));
        float* at = storage;
        auto take = [&at](long n) { return (at += n) - n; };
        q = take(rows), acc = take(rows), scores = take(BLOCK_ROWS * TILE);
        k_transposed = take(tile), v_wide = take(tile);
        staged = (T*)take(2 * tile), zeros = (T*)take(padded);
        std::fill_n(zeros, padded, T{});
        for (int i = 0; i < TILE; ++i) v_wide_rows[i] = v_wide + i * padded;
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(storage); }
};

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
            r[i + 2 * j + 1] = __builtin_shuffle(a, b, ivec{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
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
        r[j] = __builtin_shuffle(t[j], t[j + 8], ivec{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
        r[j + 8] = __builtin_shuffle(t[j], t[j + 8], ivec{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    }
}

// 16 keys x 16 dims.
template <class T>
INLINE void transpose_16(const T* const* keys, int at, float* out) {
    vec rows[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) rows[i] = load(keys[i] + at);
    transpose(rows);
    UNROLL for (int i = 0; i < LANES; ++i) store(out + (at + i) * TILE, rows[i]);
}

// 16 keys x 32 dims of bf16: a pair of dims moves as one 32-bit lane, which halves the shuffles.
INLINE void transpose_32(const bf16* const* keys, int at, float* out) {
    vec rows[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) memcpy(&rows[i], keys[i] + at, sizeof(vec));
    transpose(rows);
    UNROLL for (int i = 0; i < LANES; ++i) {
        store(out + (at + 2 * i) * TILE, (vec)((uvec)rows[i] << 16));
        store(out + (at + 2 * i + 1) * TILE, (vec)((uvec)rows[i] & 0xffff0000u));
    }
}

INLINE void transpose_keys(const float* const* keys, int dim, float* out) {
    for (int at = 0; at < dim; at += LANES) transpose_16(keys, at, out);
}
INLINE void transpose_keys(const bf16* const* keys, int dim, float* out) {
    int at = 0;
    for (; at + 2 * LANES <= dim; at += 2 * LANES) transpose_32(keys, at, out);
    for (; at < dim; at += LANES) transpose_16(keys, at, out);
}

// scores[R][16 V] = q[R] . k
template <int R, int V>
void score_rows(const float* q, int padded, const float* k_transposed, float* scores) {
    vec acc[R][V] = {};
    for (int d = 0; d < padded; ++d) {
        vec k[V];
        UNROLL for (int v = 0; v < V; ++v) k[v] = load(k_transposed + d * TILE + v * LANES);
        UNROLL for (int r = 0; r < R; ++r) {
            vec x = broadcast(q[r * padded + d]);
            UNROLL for (int v = 0; v < V; ++v) acc[r][v] += x * k[v];
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) store(scores + r * TILE + v * LANES, acc[r][v]);
}

// acc[R][16 V] = alpha[R] acc + sum over keys of p v
template <class T, int R, int V>
void value_rows(const T* const* values, int at, int first, int last, const float* p, const float* alpha, float* acc,
                int padded) {
    vec sum[R][V];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v)
        sum[r][v] = load(acc + r * padded + at + v * LANES) * alpha[r];
    for (int key = first; key < last; ++key) {
        const T* row = values[key] + at;
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

// Turn two small run-time numbers, 1 <= n <= N, into template arguments: body(Int<r>, Int<v>).
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

template <class T>
INLINE void add_values(const T* const* values, int rows, int first, int last, const float* p, const float* alpha,
                       float* acc, int padded) {
    for (int at = 0; at < padded; at += 4 * LANES)
        with_int<VALUE_ROWS>(rows, [&](auto r) {
            with_int<4>(std::min((padded - at) / LANES, 4), [&](auto v) {
                value_rows<T, r.value, v.value>(values, at, first, last, p, alpha, acc, padded);
            });
        });
}

// One step of the online softmax of one row: scores become probabilities relative to the new maximum.
INLINE void softmax_row(float* scores, int start, int vectors, int first_key, int last_key, float softcap, float& top,
                        float& total, float& alpha) {
    vec x[TILE / LANES];
    vec best = broadcast(-INFINITY);
    for (int v = 0; v < vectors; ++v) {
        x[v] = load(scores + v * LANES);
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

template <class T>
struct Attention {
    const T *q, *kv;
    T* out;
    const float* sinks;
    Batch batch;
    Shape shape;

    // Calls body(key, address, count) for every run of keys in [first, last) that lies in one block.
    template <class Body>
    __attribute__((always_inline)) void for_runs(const int* table, int head, int first, int last, const Body& body) const {
        const long head_size = (long)shape.block_size * shape.dim;
        for (int key = first, count; key < last; key += count) {
            const int index = key / shape.block_size, offset = key - index * shape.block_size;
            const long head_row = ((long)table[index] * shape.layers + shape.layer) * 2 * shape.kv_heads + head;
            count = std::min(shape.block_size - offset, last - key);
            body(key, kv + head_row * head_size + (long)offset * shape.dim, count);
        }
    }

    // Distance from a key to its value.
    long to_value() const { return (long)shape.kv_heads * shape.block_size * shape.dim; }

    // Pointers to the keys and values of a tile; zeros for those no row of the block can see: an unwritten slot may hold
    // NaN, and a window's blocks may be gone.
    void point_at_tile(Scratch<T>& s, const Item& item, int start) const {
        const int first = std::max(start, item.first), last = std::min(start + TILE, item.last);
        std::fill_n(s.k, TILE, s.zeros);
        std::fill_n(s.v, TILE, s.zeros);
        for_runs(item.table, item.head, first, last, [&](int key, const T* address, int count) {
            for (int i = 0; i < count; ++i) {
                s.k[key - start + i] = address + (long)i * shape.dim;
                s.v[key - start + i] = address + (long)i * shape.dim + to_value();
            }
        });
        if (shape.dim % LANES == 0) return;
        for (int i = 0; i < TILE; ++i) {  // rows that do not end on a vector: copy, so that nothing reads past them
            T *k = s.staged + i * s.padded, *v = k + TILE * s.padded;
            std::fill(std::copy_n(s.k[i], shape.dim, k), k + s.padded, T{});
            std::fill(std::copy_n(s.v[i], shape.dim, v), v + s.padded, T{});
            s.k[i] = k, s.v[i] = v;
        }
    }

    // Blocks lie anywhere, so the hardware cannot foresee the next one.
    void prefetch_tile(const Item& item, int start) const {
        const int first = std::max(start, item.first), last = std::min(start + TILE, item.last);
        for_runs(item.table, item.head, first, last, [&](int, const T* address, int count) {
            const long bytes = (long)count * shape.dim * sizeof(T);
            for (long i = 0; i < bytes; i += 64) {
                __builtin_prefetch((const char*)address + i, 0, 2);
                __builtin_prefetch((const char*)(address + to_value()) + i, 0, 2);
            }
        });
    }

    // Row r of an item sees the keys [first_key, last_key).
    int last_key(const Item& item, int r) const { return std::max(item.context + (item.row + r) / shape.group + 1, 0); }
    int first_key(const Item& item, int r) const {
        return shape.window > 0 ? std::max(last_key(item, r) - shape.window, 0) : 0;
    }

    void begin_rows(Scratch<T>& s, const Item& item) const {
        for (int r = 0; r < item.rows; ++r) {
            const long token = item.q_start + (item.row + r) / shape.group;
            const int in_group = (item.row + r) % shape.group;
            const T* from = q + ((item.head * batch.tokens + token) * shape.group + in_group) * shape.dim;
            for (int i = 0; i < s.padded; i += LANES) {
                store(s.q + r * s.padded + i, load_part(from + i, shape.dim - i) * shape.scale);
                store(s.acc + r * s.padded + i, vec{});
            }
            s.first_key[r] = first_key(item, r), s.last_key[r] = last_key(item, r);
            s.top[r] = sinks ? sinks[item.head * shape.group + in_group] : -INFINITY;
            s.total[r] = sinks ? 1.0f : 0.0f;
        }
    }

    void end_rows(const Scratch<T>& s, const Item& item) const {
        for (int r = 0; r < item.rows; ++r) {
            const long token = item.q_start + (item.row + r) / shape.group;
            const int in_group = (item.row + r) % shape.group;
            T* to = out + ((token * shape.kv_heads + item.head) * shape.group + in_group) * shape.dim;
            const float inverse = s.total[r] == 0 ? 0.0f : 1.0f / s.total[r];
            for (int i = 0; i < s.padded; i += LANES)
                store_part(to + i, load(s.acc + r * s.padded + i) * inverse, shape.dim - i);
        }
    }

    void tile(Scratch<T>& s, int start, int rows) const {
        const int vectors = (std::min(s.last_key[rows - 1] - start, TILE) + LANES - 1) / LANES;
        for (int v = 0; v < vectors; ++v) transpose_keys(s.k + v * LANES, s.padded, s.k_transposed + v * LANES);
        const bool widen = sizeof(T) < sizeof(float) && rows >= WIDEN_FROM;
        if (widen)
            for (int i = 0; i < vectors * LANES; ++i)
                for (int d = 0; d < s.padded; d += LANES) store(s.v_wide + i * s.padded + d, load(s.v[i] + d));

        auto overlaps = [&](int r, int n) { return s.last_key[r + n - 1] > start && s.first_key[r] < start + TILE; };
        for (int r = 0, n; r < rows; r += n) {
            n = std::min(rows - r, SCORE_ROWS);
            if (!overlaps(r, n)) continue;
            float* scores = s.scores + r * TILE;
            with_int<SCORE_ROWS>(n, [&](auto count) {
                with_int<TILE / LANES>(vectors, [&](auto v) {
                    score_rows<count.value, v.value>(s.q + r * s.padded, s.padded, s.k_transposed, scores);
                });
            });
        }
        for (int r = 0, n; r < rows; r += n) {
            n = std::min(rows - r, VALUE_ROWS);
            if (!overlaps(r, n)) continue;
            for (int i = r; i < r + n; ++i)
                softmax_row(s.scores + i * TILE, start, vectors, s.first_key[i], s.last_key[i], shape.softcap, s.top[i],
                            s.total[i], s.alpha[i]);
            const int first = std::max(s.first_key[r] - start, 0), last = std::min(s.last_key[r + n - 1] - start, TILE);
            const float *p = s.scores + r * TILE, *alpha = s.alpha + r;
            float* acc = s.acc + r * s.padded;
            if (widen)
                add_values(s.v_wide_rows, n, first, last, p, alpha, acc, s.padded);
            else
                add_values(s.v, n, first, last, p, alpha, acc, s.padded);
        }
    }

    void compute(Scratch<T>& s, const Item& item, const Item& next) const {
        begin_rows(s, item);
        for (int start = item.first / TILE * TILE; start < item.last; start += TILE) {
            point_at_tile(s, item, start);
            if (start + TILE < item.last)
                prefetch_tile(item, start + TILE);
            else
                prefetch_tile(next, next.first / TILE * TILE);
            tile(s, start, item.rows);
        }
        end_rows(s, item);
    }

    // Item number i of the batch; an empty one for i < 0.
    Item item_at(long i, const std::vector<long>& first_item) const {
        if (i < 0) return Item{};
        Item item;
        item.seq = std::upper_bound(first_item.begin(), first_item.end(), i) - first_item.begin() - 1;
        const long within = i - first_item[item.seq];
        item.head = within % shape.kv_heads;
        item.row = within / shape.kv_heads * BLOCK_ROWS;
        item.q_start = batch.cu_seqlens_q[item.seq];
        const int q_len = batch.cu_seqlens_q[item.seq + 1] - item.q_start;
        item.rows = std::min(q_len * shape.group - item.row, BLOCK_ROWS);
        item.context = batch.seq_lens[item.seq] - q_len;
        item.table = batch.block_tables + item.seq * batch.table_width;
        item.first = first_key(item, 0);
        item.last = last_key(item, item.rows - 1);
        return item;
    }

    void run(int threads) const {
        // first_item[i] .. first_item[i + 1]: items of sequence i. They are taken from the end, where the long ones are:
        // prefills come after decodes, and a sequence's last rows see the most keys.
        std::vector<long> first_item(batch.num_seqs + 1);
        for (long i = 0; i < batch.num_seqs; ++i) {
            const long rows = (long)(batch.cu_seqlens_q[i + 1] - batch.cu_seqlens_q[i]) * shape.group;
            first_item[i + 1] = first_item[i] + (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * shape.kv_heads;
        }
        std::atomic<long> left{first_item.back()};
        const long width = (long)shape.kv_heads * shape.group * shape.dim, used = batch.cu_seqlens_q[batch.num_seqs];
        std::fill(out + used * width, out + batch.tokens * width, T{});
#pragma omp parallel num_threads(threads) if (threads > 1 && first_item.back() > 1)
        {
            Scratch<T> scratch(shape.dim);
            auto claim = [&] { return item_at(left.fetch_sub(1) - 1, first_item); };
            for (Item item = claim(), next; item.rows > 0; item = next) {
                next = claim();  // one ahead, so that its first tile can be on its way
                compute(scratch, item, next);
            }
        }
    }
};

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void paged_attention_##SUFFIX(                                                                         \
        const T* q, const T* kv, T* out, const float* sinks, const int* cu_seqlens_q, const int* seq_lens,             \
        const int* block_tables, long num_seqs, long table_width, long tokens, int kv_heads, int group, int dim,       \
        int block_size, int layers, int layer, float scale, float softcap, int window, int threads) {                  \
        Batch batch{cu_seqlens_q, seq_lens, block_tables, num_seqs, table_width, tokens};                              \
        Shape shape{kv_heads, group, dim, block_size, layers, layer, scale, softcap, window};                          \
        Attention<T>{q, kv, out, sinks, batch, shape}.run(threads);                                                    \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

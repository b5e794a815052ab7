// paged_attention: online softmax over tiles of 64 keys that lie at fixed positions (0-63, 64-127, ...).
//
// A query row's result is a function of its q and its keys alone, bit for bit: every row does the same operations in
// the same order whether it is a decode, stands anywhere in a prefill chunk, or shares its tile with other rows. Masked
// keys have probability +0 and a finite value, so they add nothing. No split of the keys depends on batch or threads.
//
// A work item is up to BLOCK_ROWS rows of one sequence, a row being (kv head, token, head of its group). Its steps are
// (tile, kv head), heads inside: the heads of a block lie side by side in the pool, which the hardware can foresee.
//   k tile, transposed to [word][64]  ->  scores [rows][64]  ->  softmax step  ->  acc [rows][dim] += p v
#include "attention_tile.h"

#include <atomic>
#include <cstdlib>
#include <utility>
#include <vector>

namespace {

constexpr int BLOCK_ROWS = 96;  // of an item; bounds a thread's scratch to the L2 cache
constexpr int WIDEN_FROM = 12;  // rows from which it pays to convert a value tile to fp32 once

struct Batch {
    const int *cu_seqlens_q, *seq_lens, *block_tables;
    long num_seqs, table_width, tokens;
};

struct Shape {
    int kv_heads, group, dim, block_size, layers, parts, layer;  // parts: 2 = key and value, 1 = one row is both
    float scale, softcap;  // softcap 0 = off
    int window;            // 0 = off
};

// Rows [row, row + rows) of each of the kv heads [head, head + heads) of a sequence; they see the keys [first, last)
// between them.
struct Item {
    const int* table = nullptr;
    long q_start = 0;
    int head = 0, heads = 0, row = 0, rows = 0, context = 0, first = 0, last = 0;
};

// Where the keys and values of one tile and head are; zeros for keys that no row of the item sees.
template <class T>
struct Tile {
    const T *k[TILE], *v[TILE];
};

// Everything one thread needs; all rows padded to whole vectors.
template <class T>
struct Scratch {
    int padded;
    float *storage, *q, *acc, *scores, *k_transposed, *v_wide;
    T *zeros, *staged;
    Tile<T> tiles[2];
    const float* v_wide_rows[TILE];
    float top[BLOCK_ROWS], total[BLOCK_ROWS], alpha[BLOCK_ROWS];
    int first_key[BLOCK_ROWS], last_key[BLOCK_ROWS];

    explicit Scratch(int dim) : padded(ceil_div(dim, LANES) * LANES) {
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

template <class T>
struct Attention {
    const T *q, *kv;
    T* out;
    const float* sinks;
    Batch batch;
    Shape shape;

    // Row r of a head of an item sees the keys [first_key, last_key).
    int last_key(const Item& item, int r) const { return std::max(item.context + (item.row + r) / shape.group + 1, 0); }
    int first_key(const Item& item, int r) const {
        return shape.window > 0 ? std::max(last_key(item, r) - shape.window, 0) : 0;
    }

    // An unwritten slot may hold NaN, and a window's blocks may be gone: only keys that some row sees are pointed at.
    void point_at(Tile<T>& tile, const Scratch<T>& s, const Item& item, int head, int start) const {
        const long head_size = (long)shape.block_size * shape.dim;
        const long to_value = (shape.parts - 1) * shape.kv_heads * head_size;
        const int last = std::min(start + TILE, item.last);
        std::fill_n(tile.k, TILE, s.zeros);
        std::fill_n(tile.v, TILE, s.zeros);
        for (int key = std::max(start, item.first); key < last;) {
            const int index = key / shape.block_size, offset = key - index * shape.block_size;
            const long tile_of = ((long)item.table[index] * shape.layers + shape.layer) * shape.parts;
            const long head_row = tile_of * shape.kv_heads + head;
            const T* k = kv + head_row * head_size + (long)offset * shape.dim;
            for (const int end = std::min(key + shape.block_size - offset, last); key < end; ++key, k += shape.dim)
                tile.k[key - start] = k, tile.v[key - start] = k + to_value;
        }
    }

    // Heads whose rows do not end on a vector: copy, so that nothing reads past them.
    void stage(Tile<T>& tile, const Scratch<T>& s) const {
        for (int i = 0; i < TILE; ++i) {
            T *k = s.staged + i * s.padded, *v = k + TILE * s.padded;
            std::fill(std::copy_n(tile.k[i], shape.dim, k), k + s.padded, T{});
            std::fill(std::copy_n(tile.v[i], shape.dim, v), v + s.padded, T{});
            tile.k[i] = k, tile.v[i] = v;
        }
    }

    // Calls body(index into the scratch rows, offset of the row in q, offset of the row in out, query head).
    template <class Body>
    void for_rows(const Item& item, const Body& body) const {
        for (int h = 0; h < item.heads; ++h)
            for (int r = 0; r < item.rows; ++r) {
                const long head = item.head + h, token = item.q_start + (item.row + r) / shape.group;
                const long in_group = (item.row + r) % shape.group, query_head = head * shape.group + in_group;
                const long from = (head * batch.tokens + token) * shape.group + in_group;
                const long to = token * shape.kv_heads * shape.group + query_head;
                body(h * item.rows + r, from * shape.dim, to * shape.dim, query_head);
            }
    }

    void begin_rows(Scratch<T>& s, const Item& item) const {
        for_rows(item, [&](int i, long from, long, long query_head) {
            for (int d = 0; d < s.padded; d += LANES) {
                store((T*)(s.q + i * words<T>(s.padded)) + d, load_part(q + from + d, shape.dim - d));
                store(s.acc + i * s.padded + d, vec{});
            }
            s.first_key[i] = first_key(item, i % item.rows), s.last_key[i] = last_key(item, i % item.rows);
            s.top[i] = sinks ? sinks[query_head] : -INFINITY;
            s.total[i] = sinks ? 1.0f : 0.0f;
        });
    }

    void end_rows(const Scratch<T>& s, const Item& item) const {
        for_rows(item, [&](int i, long, long to, long) {
            const float inverse = s.total[i] == 0 ? 0.0f : 1.0f / s.total[i];
            for (int d = 0; d < s.padded; d += LANES)
                store_part(out + to + d, load(s.acc + i * s.padded + d) * inverse, shape.dim - d);
        });
    }

    // One tile of one head; its rows stand from `base` in the scratch.
    void step(Scratch<T>& s, const Item& item, const Tile<T>& now, const Tile<T>& next, int base, int start) const {
        const int rows = item.rows, vectors = ceil_div(std::min(item.last - start, TILE), LANES);
        const int num_words = words<T>(s.padded);
        for (int v = 0; v < vectors; ++v)
            transpose_keys(now.k + v * LANES, next.k + v * LANES, num_words, s.k_transposed + v * LANES);
        const bool widen = sizeof(T) < sizeof(float) && rows >= WIDEN_FROM;
        if (widen)
            for (int i = 0; i < vectors * LANES; ++i)
                for (int d = 0; d < s.padded; d += LANES) store(s.v_wide + i * s.padded + d, load(now.v[i] + d));

        auto unseen = [&](int r, int n) { return s.last_key[r + n - 1] <= start || s.first_key[r] >= start + TILE; };
        for (int r = 0, n; r < rows; r += n) {
            n = std::min(rows - r, SCORE_ROWS);
            if (unseen(r, n)) continue;
            const float* rows_q = s.q + (base + r) * num_words;
            float* scores = s.scores + r * TILE;
            with_int<SCORE_ROWS>(n, [&](auto count) {
                with_int<TILE / LANES>(vectors, [&](auto v) {
                    score_rows<T, count.value, v.value>(rows_q, num_words, s.k_transposed, scores);
                });
            });
        }
        for (int r = 0, n; r < rows; r += n) {
            n = std::min(rows - r, VALUE_ROWS);
            if (unseen(r, n)) continue;
            for (int i = r; i < r + n; ++i)
                softmax_row(s.scores + i * TILE, start, vectors, s.first_key[i], s.last_key[i], shape.scale,
                            shape.softcap, s.top[base + i], s.total[base + i], s.alpha[i]);
            const int first = std::max(s.first_key[r] - start, 0), last = std::min(s.last_key[r + n - 1] - start, TILE);
            const float *p = s.scores + r * TILE, *alpha = s.alpha + r;
            float* acc = s.acc + (base + r) * s.padded;
            if (widen)
                add_values<float>(s.v_wide_rows, nullptr, n, first, last, p, alpha, acc, s.padded);
            else
                add_values<T>(now.v, r == 0 ? next.v : nullptr, n, first, last, p, alpha, acc, s.padded);
        }
    }

    void compute(Scratch<T>& s, const Item& item, const Item& following) const {
        begin_rows(s, item);
        const int origin = item.first / TILE * TILE;
        for (int start = origin; start < item.last; start += TILE)
            for (int h = 0; h < item.heads; ++h) {
                // The next step's rows are located before this one is computed, so that they can be fetched meanwhile.
                if (start == origin && h == 0) point_at(s.tiles[0], s, item, item.head, start);
                if (h + 1 < item.heads)
                    point_at(s.tiles[1], s, item, item.head + h + 1, start);
                else if (start + TILE < item.last)
                    point_at(s.tiles[1], s, item, item.head, start + TILE);
                else
                    point_at(s.tiles[1], s, following, following.head, following.first / TILE * TILE);
                if (shape.dim % LANES) stage(s.tiles[0], s);
                step(s, item, s.tiles[0], s.tiles[1], h * item.rows, start);
                std::swap(s.tiles[0], s.tiles[1]);
            }
        end_rows(s, item);
    }

    // Work items of the batch. They are taken from the end, where the long ones are: prefills come after decodes, and a
    // sequence's last rows see the most keys.
    struct Items {
        std::vector<long> first;  // first[i] .. first[i + 1]: items of sequence i
        long heads_wanted;        // heads per item, if the rows leave room: many threads want many small items
    };

    int q_len(long seq) const { return batch.cu_seqlens_q[seq + 1] - batch.cu_seqlens_q[seq]; }

    int heads_of(const Items& items, long rows) const {
        return rows ? std::clamp<long>(std::min(BLOCK_ROWS / rows, items.heads_wanted), 1, shape.kv_heads) : 1;
    }

    Items plan(int threads) const {
        Items items{std::vector<long>(batch.num_seqs + 1), 0};
        long blocks = 0;
        for (long i = 0; i < batch.num_seqs; ++i) blocks += ceil_div((long)q_len(i) * shape.group, BLOCK_ROWS);
        items.heads_wanted = blocks * shape.kv_heads / (2 * threads);
        for (long i = 0; i < batch.num_seqs; ++i) {
            const long rows = (long)q_len(i) * shape.group, slices = ceil_div(shape.kv_heads, heads_of(items, rows));
            items.first[i + 1] = items.first[i] + ceil_div(rows, BLOCK_ROWS) * slices;
        }
        return items;
    }

    // Item number i; an empty one for i < 0.
    Item item_at(const Items& items, long i) const {
        if (i < 0) return Item{};
        const long seq = std::upper_bound(items.first.begin(), items.first.end(), i) - items.first.begin() - 1;
        const long rows = (long)q_len(seq) * shape.group;
        const int heads = heads_of(items, rows), slices = ceil_div(shape.kv_heads, heads);
        const long within = i - items.first[seq];
        Item item;
        item.table = batch.block_tables + seq * batch.table_width;
        item.q_start = batch.cu_seqlens_q[seq];
        item.head = within % slices * heads;
        item.heads = std::min(heads, shape.kv_heads - item.head);
        item.row = within / slices * BLOCK_ROWS;
        item.rows = std::min<long>(rows - item.row, BLOCK_ROWS);
        item.context = batch.seq_lens[seq] - q_len(seq);
        item.first = first_key(item, 0);
        item.last = last_key(item, item.rows - 1);
        return item;
    }

    void run(int threads) const {
        const Items items = plan(threads);
        const long width = (long)shape.kv_heads * shape.group * shape.dim, used = batch.cu_seqlens_q[batch.num_seqs];
        std::fill(out + used * width, out + batch.tokens * width, T{});
        std::atomic<long> left{items.first.back()};
#pragma omp parallel num_threads(threads) if (threads > 1 && items.first.back() > 1)
        {
            Scratch<T> scratch(shape.dim);
            auto claim = [&] { return item_at(items, left.fetch_sub(1) - 1); };
            for (Item item = claim(), following; item.rows > 0; item = following) {
                following = claim();  // one ahead, so that its first tile can be fetched in time
                compute(scratch, item, following);
            }
        }
    }
};

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void paged_attention_##SUFFIX(                                                                         \
        const T* q, const T* kv, T* out, const float* sinks, const int* cu_seqlens_q, const int* seq_lens,             \
        const int* block_tables, long num_seqs, long table_width, long tokens, int kv_heads, int group, int dim,       \
        int block_size, int layers, int parts, int layer, float scale, float softcap, int window, int threads) {       \
        Batch batch{cu_seqlens_q, seq_lens, block_tables, num_seqs, table_width, tokens};                              \
        Shape shape{kv_heads, group, dim, block_size, layers, parts, layer, scale, softcap, window};                   \
        Attention<T>{q, kv, out, sinks, batch, shape}.run(threads);                                                    \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

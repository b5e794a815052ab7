// experts: y = sum over j of weight_j down_s(act(gate_s(x)) up_s(x)), s = slot_j, over all rows in one parallel region.
//
// Storage of a slot, one contiguous row: panels of gate and up, [32 gate | 32 up] outputs each, so that the activation
// needs no other panel; panels of 64 outputs of down; then, with biases, those of both in fp32 in the panels' order.
// Pairs (row, choice) are sorted by slot and cut into groups of rows of one slot. Work items are first all
// (group, panel of gate and up), then all (group, panel of down): threads claim them in this order, and an item of the
// second kind waits until the first kind of its group is done, which is nearly always long ago. Tiles (tiles.h) want
// their rows at equal distances: the rows of x are copied into the pairs' order first.
#include "activation.h"
#include "tiles.h"

#include <atomic>
#include <sched.h>
#include <vector>

struct ExpertShape {
    long hidden, inner, num_slots, row_bytes;
    int activation, bias;
    float alpha, limit;
};

namespace {

constexpr int VECTORS = 4, PANEL = VECTORS * LANES, HALF = PANEL / 2;
constexpr int ROWS = 6;          // 6 rows x 4 vectors of outputs in registers
constexpr int BLOCK_ROWS = 192;  // most rows of a group: they stay in the L2 cache while its panels pass
constexpr long PARALLEL_FROM = 1 << 16;  // multiply-adds
constexpr int PAD = 32;  // elements between rows of scratch memory: a power of two apart, they share a cache set

// Where the parts of a slot's row are, in floats.
template <class T>
struct Layout {
    long gate_up_panels, down_panels, gate_up_size, down_size;  // panels, floats of one
    explicit Layout(const ExpertShape& s)
        : gate_up_panels(ceil_div(s.inner, HALF)),
          down_panels(ceil_div(s.hidden, PANEL)),
          gate_up_size(words<T>(s.hidden) * PANEL),
          down_size(words<T>(s.inner) * PANEL) {}
    long down() const { return gate_up_panels * gate_up_size; }
    long gate_up_bias() const { return down() + down_panels * down_size; }
    long down_bias() const { return gate_up_bias() + gate_up_panels * PANEL; }
    long end(bool bias) const { return bias ? down_bias() + down_panels * PANEL : gate_up_bias(); }
};

struct Pair {
    long row, index;  // row of x; number among all pairs in row-major order
};
struct Group {
    const float* weights;
    long first, last;  // sorted pairs
};

struct Plan {
    std::vector<Pair> pairs;        // by slot, then by row
    std::vector<Group> groups;
    std::vector<long> first_index;  // of each row, then the number of pairs
};

// False if a slot is out of range.
bool make_plan(Plan& plan, const ExpertShape& s, const int* slots, const unsigned char* storage, long rows,
               long top_k) {
    std::vector<long> begin(s.num_slots + 1);
    plan.first_index.resize(rows + 1);
    for (long row = 0, index = 0; row < rows; ++row) {
        for (long j = 0; j < top_k; ++j) {
            const int slot = slots[row * top_k + j];
            if (slot >= s.num_slots) return false;
            if (slot >= 0) ++begin[slot + 1], ++index;
        }
        plan.first_index[row + 1] = index;
    }
    for (long slot = 0; slot < s.num_slots; ++slot) {
        const long count = begin[slot + 1], first = begin[slot], blocks = ceil_div(count, BLOCK_ROWS);
        begin[slot + 1] += first;
        for (long b = 0; b < blocks; ++b)
            plan.groups.push_back({(const float*)(storage + slot * s.row_bytes), first + count * b / blocks,
                                   first + count * (b + 1) / blocks});
    }
    plan.pairs.resize(begin[s.num_slots]);
    for (long row = 0, index = 0; row < rows; ++row)
        for (long j = 0; j < top_k; ++j) {
            const int slot = slots[row * top_k + j];
            if (slot >= 0) plan.pairs[begin[slot]++] = {row, index++};
        }
    return true;
}

INLINE vec activate(const ExpertShape& s, vec gate, vec up) {
    if (s.activation == 0) return silu(gate) * up;
    if (s.activation == 1) return gelu_tanh(gate) * up;
    return swiglu_clamped(gate, up, s.alpha, s.limit);
}

// One panel times the rows of one group.
struct Item {
    const Group* group;
    const float* weights;
    long g, panel;  // number of the group; of the panel in its kind
    bool down;
};

template <class T>
struct Experts {
    const ExpertShape& shape;
    const Plan& plan;
    const Layout<T> layout;
    const T* x;
    T *gathered, *inner, *outputs;  // of the sorted pairs (M, D + PAD), (M, I + PAD); in row-major order (M, D)
    const bool by_tiles;
    const long gathered_stride = shape.hidden + PAD, inner_stride = shape.inner + PAD;

    long num_first() const { return plan.groups.size() * layout.gate_up_panels; }
    long num_items() const { return num_first() + plan.groups.size() * layout.down_panels; }

    Item item_at(long i) const {
        const bool down = i >= num_first();
        if (down) i -= num_first();
        const long panels = down ? layout.down_panels : layout.gate_up_panels, g = i / panels, panel = i % panels;
        const Group& group = plan.groups[g];
        const long at = down ? layout.down() + panel * layout.down_size : panel * layout.gate_up_size;
        return {&group, group.weights + at, g, panel, down};
    }

    void gather(long pair) const {
        memcpy(gathered + pair * gathered_stride, x + plan.pairs[pair].row * shape.hidden, shape.hidden * sizeof(T));
    }

    void run(std::atomic<long>& claimed, std::vector<std::atomic<int>>& done) const {
        const long items = num_items();
        Tiles tiles;
        // One ahead, so that a thread knows which panel to fetch next.
        for (long i = claimed.fetch_add(1), following; i < items; i = following) {
            following = claimed.fetch_add(1);
            const Item item = item_at(i);
            const float* next = following < items ? item_at(following).weights : nullptr;
            const long num_words = words<T>(item.down ? shape.inner : shape.hidden);
            if (item.down) wait_for(done[item.g], layout.gate_up_panels);
            const long first = item.group->first, last = item.group->last;
            if (by_tiles)
                in_tiles<VECTORS>(tiles, first, last, num_words, item.weights, next,
                                  [&](int rows, long from, const Fetch& fetch) { tile_rows(item, rows, from, fetch); });
            else
                in_groups<ROWS, VECTORS>(
                    first, last, num_words, item.weights, next,
                    [&](auto rows, long from, const Fetch& fetch) { vector_rows<rows.value>(item, from, fetch); });
            if (!item.down) done[item.g].fetch_add(1, std::memory_order_release);
        }
    }

    template <int R>
    void vector_rows(const Item& item, long from, const Fetch& fetch) const {
        const T* row[R];
        UNROLL for (int r = 0; r < R; ++r)
            row[r] = item.down ? inner + (from + r) * inner_stride : x + plan.pairs[from + r].row * shape.hidden;
        vec acc[R][VECTORS] = {};
        multiply<T, R, VECTORS, PANEL>(acc, row, item.weights, words<T>(item.down ? shape.inner : shape.hidden), fetch);
        vec sums[R][VECTORS];  // in memory, so that the activation is a loop and not unrolled
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < VECTORS; ++v) sums[r][v] = acc[r][v];
        finish(item, R, from, (const float*)sums);
    }

    void tile_rows(const Item& item, int rows, long from, const Fetch& fetch) const {
#if PHALANX_TILES
        if constexpr (sizeof(T) == 2) {
            alignas(64) float sums[GROUP_ROWS * PANEL];
            const long stride = item.down ? inner_stride : gathered_stride, second = rows - TILE_ROWS;
            const long num_words = words<T>(item.down ? shape.inner : shape.hidden);
            const T* row = (item.down ? inner : gathered) + from * stride;
            if (rows <= TILE_ROWS) {
                multiply_tiles<1, 4, PANEL>(sums, PANEL, row, stride, 0, item.weights, num_words, fetch);
            } else {  // the sums of all four vectors would not fit
                multiply_tiles<2, 2, PANEL>(sums, PANEL, row, stride, second, item.weights, num_words, fetch);
                multiply_tiles<2, 2, PANEL>(sums + HALF, PANEL, row, stride, second, item.weights + HALF, num_words,
                                            {item.weights, item.weights, num_words, 0});
            }
            finish(item, rows, from, sums);
        }
#endif
    }

    // Bias, activation and the way to memory; sums (rows, PANEL).
    void finish(const Item& item, int rows, long from, const float* sums) const {
        const float* bias =
            item.group->weights + (item.down ? layout.down_bias() : layout.gate_up_bias()) + item.panel * PANEL;
        for (int r = 0; r < rows; ++r, sums += PANEL) {
            for (int v = 0; v < (item.down ? VECTORS : VECTORS / 2); ++v) {
                const long at = item.panel * (item.down ? PANEL : HALF) + v * LANES;
                const long left = (item.down ? shape.hidden : shape.inner) - at;
                if (left <= 0) break;
                vec sum = load(sums + v * LANES);
                if (shape.bias) sum += load(bias + v * LANES);
                if (item.down) {
                    store_part(outputs + plan.pairs[from + r].index * shape.hidden + at, sum, left);
                    continue;
                }
                vec up = load(sums + HALF + v * LANES);
                if (shape.bias) up += load(bias + HALF + v * LANES);
                store_part(inner + (from + r) * inner_stride + at, activate(shape, sum, up), left);
            }
        }
    }

    // Items are claimed in order and the first kind waits for nothing: whoever holds the missing one will finish it.
    static void wait_for(const std::atomic<int>& done, long panels) {
        for (int spins = 0; done.load(std::memory_order_acquire) < panels;)
            if (++spins > 1000) sched_yield();
    }

    void combine_row(const int* slots, const float* weights, float* out, long top_k, long row) const {
        for (long i = 0; i < shape.hidden; i += LANES) {
            const int left = shape.hidden - i;
            vec total{};
            for (long j = 0, index = plan.first_index[row]; j < top_k; ++j)
                if (slots[row * top_k + j] >= 0)
                    total += weights[row * top_k + j] * load_part(outputs + index++ * shape.hidden + i, left);
            store_part(out + row * shape.hidden + i, total, left);
        }
    }
};

template <class T>
long experts(const ExpertShape& shape, const T* x, const int* slots, const float* weights, const unsigned char* storage,
             T* gathered, T* inner, T* outputs, float* out, long rows, long top_k, int threads) {
    Plan plan;
    if (!make_plan(plan, shape, slots, storage, rows, top_k)) return -1;
    const long num_pairs = plan.pairs.size();
    const bool by_tiles = sizeof(T) == 2 && fits_tiles(words<T>(shape.hidden)) && fits_tiles(words<T>(shape.inner));
    const Experts<T> layer{shape, plan, Layout<T>(shape), x, gathered, inner, outputs, by_tiles};
    std::atomic<long> claimed{0};
    std::vector<std::atomic<int>> done(plan.groups.size());
#pragma omp parallel num_threads(threads) if (threads > 1 && num_pairs * shape.hidden * shape.inner > PARALLEL_FROM)
    {
        if (by_tiles) {
#pragma omp for schedule(static)
            for (long pair = 0; pair < num_pairs; ++pair) layer.gather(pair);
        }
        layer.run(claimed, done);
        if (out) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
            for (long row = 0; row < rows; ++row) layer.combine_row(slots, weights, out, top_k, row);
        }
    }
    return num_pairs;
}

template <class T>
void pack(const ExpertShape& s, float* to, const T* gate_up, const T* down, const float* gate_up_bias,
          const float* down_bias, int threads) {
    const Layout<T> layout(s);
    const auto gate_up_output = [&](long panel, int c) {  // its row of gate_up, or -1
        const long i = panel * HALF + c % HALF;
        return i >= s.inner ? -1 : c < HALF ? i : s.inner + i;
    };
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < layout.gate_up_panels + layout.down_panels; ++panel) {
        if (panel < layout.gate_up_panels) {
            pack_panel<T>(to + panel * layout.gate_up_size, words<T>(s.hidden), PANEL, [&](int c) {
                const long output = gate_up_output(panel, c);
                return output < 0 ? nullptr : gate_up + output * s.hidden;
            });
            continue;
        }
        const long p = panel - layout.gate_up_panels;
        pack_panel<T>(to + layout.down() + p * layout.down_size, words<T>(s.inner), PANEL, [&](int c) {
            const long output = p * PANEL + c;
            return output < s.hidden ? down + output * s.inner : nullptr;
        });
    }
    if (!s.bias) return;
    for (long i = 0; i < layout.gate_up_panels * PANEL; ++i) {
        const long output = gate_up_output(i / PANEL, i % PANEL);
        to[layout.gate_up_bias() + i] = output < 0 ? 0 : gate_up_bias[output];
    }
    for (long i = 0; i < layout.down_panels * PANEL; ++i) to[layout.down_bias() + i] = i < s.hidden ? down_bias[i] : 0;
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API long experts_row_bytes_##SUFFIX(const ExpertShape* shape) {                                            \
        return Layout<T>(*shape).end(shape->bias) * 4;                                                                 \
    }                                                                                                                  \
    PHALANX_API void experts_pack_##SUFFIX(const ExpertShape* shape, float* row, const T* gate_up, const T* down,      \
                                           const float* gate_up_bias, const float* down_bias, int threads) {           \
        pack(*shape, row, gate_up, down, gate_up_bias, down_bias, threads);                                            \
    }                                                                                                                  \
    PHALANX_API long experts_##SUFFIX(const ExpertShape* shape, const T* x, const int* slots, const float* weights,    \
                                      const unsigned char* storage, T* gathered, T* inner, T* outputs, float* out,     \
                                      long rows, long top_k, int threads) {                                            \
        return experts(*shape, x, slots, weights, storage, gathered, inner, outputs, out, rows, top_k, threads);       \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

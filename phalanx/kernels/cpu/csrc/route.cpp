// moe_route: the k experts of a row by k passes over integer keys. A row is a few registers long, so that is quicker
// than any sort.
#include "vec.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <vector>

namespace {

constexpr long PARALLEL_FROM = 16384;  // logits; below, starting a team costs more than it saves
enum Score { SOFTMAX, SIGMOID, SQRTSOFTPLUS, NONE };
enum GroupScore { MAX, TOP2_SUM };
enum Normalise { AS_IS, SUM, MAX_SUM, SOFTMAX_K };

struct Rule {
    int num_experts, top_k, score, num_groups, top_groups, group_score;
    float group_mask;
    int normalise;
    float eps, min_sum, scale;
};

// Of one thread; rows are padded to whole vectors.
struct Scratch {
    explicit Scratch(const Rule& rule) : padded(ceil_div(rule.num_experts, LANES) * LANES) {
        scores.resize(padded);
        selection.resize(padded);
        keys.resize(padded);
        groups.resize(rule.num_groups);
        chosen.resize(rule.num_groups);
    }
    long padded;
    std::vector<float> scores, selection, groups;
    std::vector<int32_t> keys, chosen;
};

template <class T>
void read(const T* row, float* out, int n) {
    for (int i = 0; i < n; i += LANES) {
        const int part = n - i < LANES ? n - i : LANES;
        store(out + i, iota() < part ? load_part(row + i, part) : broadcast(-INFINITY));
    }
}

void softmax(float* x, long padded) {
    vec high = broadcast(-INFINITY), total{};
    for (long i = 0; i < padded; i += LANES) high = max(high, load(x + i));
    const float shift = largest(high);
    for (long i = 0; i < padded; i += LANES) {
        const vec e = exp(load(x + i) - shift);
        total += e;
        store(x + i, e);
    }
    const float all = sum(total);
    for (long i = 0; i < padded; i += LANES) store(x + i, load(x + i) / all);
}

void score(float* x, long padded, int kind) {
    if (kind == SOFTMAX) return softmax(x, padded);
    if (kind == SIGMOID)
        for (long i = 0; i < padded; i += LANES) store(x + i, sigmoid(load(x + i)));
    if (kind == SQRTSOFTPLUS)
        for (long i = 0; i < padded; ++i) x[i] = std::sqrt(x[i] > 20.0f ? x[i] : std::log1p(std::exp(x[i])));
}

// The `count` largest of n values, best first, equal ones by lower index. Integer keys sort like the floats, -0 as +0;
// a NaN is below all, and INT_MIN below that marks what is taken and what pads the row.
void best(const float* values, int n, int count, int32_t* keys, int32_t* out) {
    for (int i = 0; i < n; i += LANES) {
        const vec x = load_part(values + i, n - i < LANES ? n - i : LANES) + 0.0f;
        const ivec bits = (ivec)x;
        ivec key = x == x ? bits ^ ((bits >> 31) & INT_MAX) : ivec{} + (INT_MIN + 1);
        key = iota() < n - i ? key : ivec{} + INT_MIN;
        memcpy(keys + i, &key, sizeof key);
    }
    for (int k = 0; k < count; ++k) {
        ivec high = ivec{} + INT_MIN, at{};
        for (int i = 0; i < n; i += LANES) {
            ivec key;
            memcpy(&key, keys + i, sizeof key);
            at = key > high ? iota() + i : at;
            high = key > high ? key : high;
        }
        int lane = 0;
        for (int i = 1; i < LANES; ++i)
            if (high[i] > high[lane] || (high[i] == high[lane] && at[i] < at[lane])) lane = i;
        out[k] = at[lane];
        keys[at[lane]] = INT_MIN;
    }
}

float group_score(const float* group, int size, int kind) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < size; ++i) {
        const float x = group[i];
        second = x > first ? first : (x > second ? x : second);
        first = x > first ? x : first;
    }
    return kind == MAX ? first : first + second;
}

void mask_groups(float* selection, const Rule& rule, Scratch& scratch) {
    const int size = rule.num_experts / rule.num_groups;
    for (int g = 0; g < rule.num_groups; ++g)
        scratch.groups[g] = group_score(selection + g * size, size, rule.group_score);
    best(scratch.groups.data(), rule.num_groups, rule.top_groups, scratch.keys.data(), scratch.chosen.data());
    const auto kept_end = scratch.chosen.begin() + rule.top_groups;
    for (int g = 0; g < rule.num_groups; ++g)
        if (std::find(scratch.chosen.begin(), kept_end, g) == kept_end)
            std::fill_n(selection + g * size, size, rule.group_mask);
}

void normalise(float* weights, const Rule& rule) {
    float total = 0.0f;
    if (rule.normalise == SOFTMAX_K) {
        const float high = *std::max_element(weights, weights + rule.top_k);
        for (int k = 0; k < rule.top_k; ++k) weights[k] = std::exp(weights[k] - high);
    }
    for (int k = 0; k < rule.top_k; ++k) total += weights[k];
    if (rule.normalise == SUM) total += rule.eps;
    if (rule.normalise == MAX_SUM) total = total < rule.min_sum ? rule.min_sum : total;
    if (rule.normalise == AS_IS) total = 1.0f;
    for (int k = 0; k < rule.top_k; ++k) weights[k] = weights[k] / total * rule.scale;
}

template <class T>
void route_row(const T* logits, const float* bias, int32_t* ids, T* out, const Rule& rule, Scratch& scratch) {
    float *scores = scratch.scores.data(), *selection = scores;
    read(logits, scores, rule.num_experts);
    score(scores, scratch.padded, rule.score);
    if (bias) {  // it selects and never weights
        selection = scratch.selection.data();
        for (int e = 0; e < rule.num_experts; ++e) selection[e] = scores[e] + bias[e];
    }
    if (rule.num_groups > 1) mask_groups(selection, rule, scratch);
    best(selection, rule.num_experts, rule.top_k, scratch.keys.data(), ids);
    float* weights = scratch.selection.data();  // done with
    for (int k = 0; k < rule.top_k; ++k) weights[k] = scores[ids[k]];
    normalise(weights, rule);
    for (int k = 0; k < rule.top_k; k += LANES) {
        const int part = rule.top_k - k < LANES ? rule.top_k - k : LANES;
        store_part(out + k, load(weights + k), part);
    }
}

template <class T>
void moe_route(const T* logits, const float* bias, int32_t* ids, T* weights, long rows, const Rule& rule, int threads) {
    const bool parallel = threads > 1 && rows > 1 && rows * rule.num_experts >= PARALLEL_FROM;
#pragma omp parallel num_threads(threads) if (parallel)
    {
        Scratch scratch(rule);
#pragma omp for
        for (long row = 0; row < rows; ++row)
            route_row(logits + row * rule.num_experts, bias, ids + row * rule.top_k, weights + row * rule.top_k, rule,
                      scratch);
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    PHALANX_API void moe_route_##SUFFIX(const T* logits, const float* bias, int32_t* ids, T* weights, long rows,       \
                                        int num_experts, int top_k, int score, int num_groups, int top_groups,         \
                                        int group_score, float group_mask, int normalise, float eps, float min_sum,    \
                                        float scale, int threads) {                                                    \
        const Rule rule{num_experts, top_k, score, num_groups, top_groups, group_score, group_mask, normalise, eps,    \
                        min_sum, scale};                                                                               \
        moe_route(logits, bias, ids, weights, rows, rule, threads);                                                    \
    }
EXPORT(float, fp32)
EXPORT(bf16, bf16)

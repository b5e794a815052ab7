// sample: one row at a time. A row's survivors are a compact list in id order; each filter shortens it, and noise is
// drawn only for what is left.
#include "vec.h"

#include <atomic>
#include <cmath>
#include <vector>

namespace {

constexpr float MAX_NOISE = 16.64f;     // -log(-log(1 - 2^-24)) = 16.636: a token further behind cannot win
constexpr uint32_t PURPOSE_SAMPLE = 0;  // philox.py: Purpose

struct Settings {
    float temperature, top_p, min_p;
    int top_k;
    uint32_t position, choice;
    uint64_t seed;
};

// High and low halves of the 64-bit products x m.
INLINE void multiply(uvec x, uint32_t m, uvec& high, uvec& low) {
#ifdef __AVX512F__
    const __m512i factor = _mm512_set1_epi32(m), odd_lanes = _mm512_srli_epi64((__m512i)x, 32);
    const __m512i even = _mm512_mul_epu32((__m512i)x, factor), odd = _mm512_mul_epu32(odd_lanes, factor);
    high = (uvec)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low = (uvec)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#else
    for (int i = 0; i < LANES; ++i) {
        const uint64_t product = (uint64_t)x[i] * m;
        high[i] = product >> 32, low[i] = (uint32_t)product;
    }
#endif
}

// Gumbel noise of 16 token ids; philox.py says what each word is.
INLINE vec gumbel(uvec token_ids, const Settings& s) {
    uvec c0 = token_ids, c1 = uvec{} + s.position, c2 = uvec{} + s.choice, c3 = uvec{} + PURPOSE_SAMPLE;
    uint32_t k0 = (uint32_t)s.seed, k1 = (uint32_t)(s.seed >> 32);
    UNROLL for (int round = 0; round < 10; ++round) {
        uvec high0, low0, high1, low1;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const vec unit = (__builtin_convertvector((ivec)(c0 >> 9), vec) + 0.5f) * 0x1p-23f;  // inside (0, 1)
    return -log(-log(unit));
}

// The largest logit and the first id that has it; -1 if it is not finite or the row has a NaN.
long find_top(const float* logits, long vocab, float& top) {
    vec best = broadcast(-INFINITY);
    ivec nan{};
    for (long i = 0; i < vocab; i += LANES) {
        const int n = vocab - i < LANES ? vocab - i : LANES;
        const vec x = iota() < n ? load_part(logits + i, n) : best;
        nan |= x != x;
        best = max(best, x);
    }
    top = largest(best);
    for (int i = 0; i < LANES; ++i)
        if (nan[i]) return -1;
    if (std::isinf(top)) return -1;
    long id = 0;
    while (logits[id] != top) ++id;
    return id;
}

// Sampling of one row; the buffers are reused by all rows of a thread.
class Row {
  public:
    explicit Row(long vocab) : ids_(vocab + LANES), z_(vocab + LANES), weights_(vocab), keys_(vocab), members_(vocab) {}

    long sample(const float* logits, long vocab, const Settings& s) {
        float top;
        const long first = find_top(logits, vocab, top);
        if (first < 0 || !(s.temperature > 0)) return first;
        count_ = vocab;
        for (long i = 0; i < vocab; i += LANES) {
            const int n = vocab - i < LANES ? vocab - i : LANES;
            store(z_.data() + i, (load_part(logits + i, n) - top) / s.temperature);
            const ivec ids = iota() + (int)i;
            memcpy(ids_.data() + i, &ids, sizeof ids);
        }
        if (s.top_k > 0 && s.top_k < vocab) {
            for (long i = 0; i < count_; ++i) weights_[i] = 1;
            keep_prefix(logits, s.top_k);
        }
        if (s.top_p < 1) {
            weigh();
            double mass = 0;
            for (long i = 0; i < count_; ++i) mass += weights_[i];
            keep_prefix(logits, s.top_p * mass);
        }
        if (s.min_p > 0) {
            weigh();
            keep([&](long i) { return weights_[i] >= s.min_p; });
        }
        return draw(s);
    }

  private:
    long count_ = 0;
    std::vector<int> ids_;       // of the survivors, ascending
    std::vector<float> z_;       // (logit - largest) / temperature
    std::vector<float> weights_; // scratch of the filters, as the rest
    std::vector<uint32_t> keys_;
    std::vector<int> members_;

    struct Bin {
        double mass;
        long count;
    };

    void weigh() {
        for (long i = 0; i < count_; i += LANES) {
            const int n = count_ - i < LANES ? count_ - i : LANES;
            store_part(weights_.data() + i, exp(load(z_.data() + i)), n);
        }
    }

    template <class Wanted>
    void keep(const Wanted& wanted) {
        long kept = 0;
        for (long i = 0; i < count_; ++i) {
            ids_[kept] = ids_[i], z_[kept] = z_[i];
            kept += wanted(i);
        }
        count_ = kept;
    }

    // Keep the shortest prefix, in the order (logit descending, id ascending), whose weights sum to `mass` or more; at
    // least one token. A radix descent: only tokens of the bin in which the border lies are looked at again.
    void keep_prefix(const float* logits, double mass) {
        for (long i = 0; i < count_; ++i) {
            uint32_t bits;
            memcpy(&bits, logits + ids_[i], sizeof bits);
            if (bits == 0x80000000u) bits = 0;                             // -0 equals +0
            keys_[i] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;    // unsigned order = float order
            members_[i] = (int)i;
        }
        long members = count_;
        double before = 0;
        for (const int shift : {21, 10, 0}) {
            Bin bins[2048] = {};
            for (long m = 0; m < members; ++m) {
                Bin& bin = bins[(keys_[members_[m]] >> shift) & 2047];
                bin.mass += weights_[members_[m]], ++bin.count;
            }
            uint32_t border = 0;
            for (int bin = 2047; bin >= 0; --bin) {
                if (!bins[bin].count) continue;
                border = bin;
                if (before + bins[bin].mass >= mass) break;
                before += bins[bin].mass;
            }
            long kept = 0;
            for (long m = 0; m < members; ++m) {
                const int member = members_[m];
                members_[kept] = member;
                kept += ((keys_[member] >> shift) & 2047) == border;
            }
            members = kept;
        }
        long last = 0;  // the members are now equal: the border is the first that completes the mass
        for (; last < members - 1; ++last)
            if ((before += weights_[members_[last]]) >= mass) break;
        const long border = members_[last];
        const uint32_t key = keys_[border];
        keep([&](long i) { return keys_[i] > key || (keys_[i] == key && i <= border); });
    }

    // The survivor with the largest z + noise.
    long draw(const Settings& s) {
        for (int i = 0; i < LANES; ++i) z_[count_ + i] = -INFINITY;
        float best = -INFINITY;
        long winner = ids_[0];
        for (long i = 0; i < count_; i += LANES) {
            const vec z = load(z_.data() + i);
            if (largest(z) + MAX_NOISE < best) continue;
            uvec ids;
            memcpy(&ids, ids_.data() + i, sizeof ids);
            const vec noisy = z + gumbel(ids, s);
            const float highest = largest(noisy);
            if (!(highest > best)) continue;
            best = highest;
            for (int lane = LANES - 1; lane >= 0; --lane)
                if (noisy[lane] == best) winner = ids[lane];
        }
        return winner;
    }
};

}  // namespace

PHALANX_API void sample(const float* logits, const float* temperature, const int* top_k, const float* top_p,
                        const float* min_p, const int64_t* seeds, const int* positions, const int* choices,
                        int64_t* tokens, long rows, long vocab, int threads) {
    std::atomic<long> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        Row row(vocab);
        for (long i; (i = next.fetch_add(1)) < rows;) {
            const Settings settings{temperature[i],           top_p[i],              min_p[i],          top_k[i],
                                    (uint32_t)positions[i], (uint32_t)choices[i], (uint64_t)seeds[i]};
            tokens[i] = row.sample(logits + i * vocab, vocab, settings);
        }
    }
}

// The seal of a row on the move: its words are summed while they are copied, at the speed of memory.
#include "vec.h"

namespace {

// Word i times 2i + 1, modulo 2^64.
INLINE uint64_t weighted(uint64_t word, long i) { return word * (uint64_t)(2 * i + 1); }

}  // namespace

PHALANX_API uint64_t row_checksum(const uint64_t* row, long words) {
    uint64_t total = 0;
    for (long i = 0; i < words; ++i) total += weighted(row[i], i);
    return total;
}

PHALANX_API uint64_t row_copy(const uint64_t* __restrict row, uint64_t* __restrict out, long words) {
    uint64_t total = 0;
    for (long i = 0; i < words; ++i) {
        out[i] = row[i];
        total += weighted(row[i], i);
    }
    return total;
}

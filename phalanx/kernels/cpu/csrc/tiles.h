// bf16 products by the matrix unit of recent Intel CPUs (AMX), of panels as in panel.h: a 32-bit word of k is a pair of
// bf16, so 16 words x 16 outputs of a panel are a tile as they lie. Up to 16 rows at a time; a tile of fewer rows gives
// each of them the same bits, so that decode and prefill agree. They differ from those of `multiply` (another order over
// k), so a weight is always multiplied in one of the two ways.
//
// Source: Intel Architecture Instruction Set Extensions Reference (TDPBF16PS); kernel's Documentation/arch/x86/xstate.rst
#pragma once
#include "panel.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define PHALANX_TILES 1
#else
#define PHALANX_TILES 0
#endif

constexpr int TILE_ROWS = 16, TILE_WORDS = 16, GROUP_ROWS = 2 * TILE_ROWS;

// Whether this process may use the tiles for rows of so many words: the kernel saves their state only if asked to.
INLINE bool fits_tiles(long num_words) {
#if PHALANX_TILES
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool is_allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return is_allowed && num_words % TILE_WORDS == 0;
#else
    return false;
#endif
}

// A thread's tile registers: 0 ... 5 sums, 6 rows, 7 weights. Given back when it goes, or every switch saves 8 KiB.
class Tiles {
    int rows = 0;

  public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
#if PHALANX_TILES
    ~Tiles() {
        if (rows) _tile_release();
    }
    void configure(int wanted) {
        if (wanted == rows) return;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t num_rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.num_rows[tile] = tile == 7 ? TILE_WORDS : wanted;
        }
        asm volatile("" ::"r"(&config) : "memory");  // g++ 12 believes that it reads eight bytes
        _tile_loadconfig(&config);
        rows = wanted;
    }
#endif
};

#if PHALANX_TILES
// One word's step of two tiles of rows, or one, and vector v of the panel. The tiles' numbers must be literals.
#define PHALANX_TILE_STEP(v, top, bottom)                              \
    if constexpr (V > v) {                                             \
        _tile_loadd(7, panel + w * WIDTH + v * LANES, WIDTH * 4);      \
        if (R == 2 || v == 0) _tile_loadd(6, x + 2 * w, stride * 2);   \
        _tile_dpbf16ps(top, 6, 7);                                     \
        if constexpr (R == 2) {                                        \
            _tile_loadd(6, x + second * stride + 2 * w, stride * 2);   \
            _tile_dpbf16ps(bottom, 6, 7);                              \
        }                                                              \
    }
#define PHALANX_TILE_STORE(v, top, bottom)                                                                           \
    if constexpr (V > v) {                                                                                           \
        _tile_stored(top, sums + v * LANES, sums_stride * 4);                                                        \
        if constexpr (R == 2) _tile_stored(bottom, sums + second * sums_stride + v * LANES, sums_stride * 4);        \
    }

// sums (rows, sums_stride): R tiles of rows of x, `stride` elements apart, times the first V vectors of a panel of WIDTH
// outputs, V <= 3 of two tiles and <= 4 of one. The second tile begins at row `second`, within the first one or behind it.
template <int R, int V, int WIDTH>
INLINE void multiply_tiles(float* sums, long sums_stride, const bf16* x, long stride, long second, const float* panel,
                           long num_words, const Fetch& fetch) {
    static_assert(V <= (R == 2 ? 3 : 4));
    asm volatile("" ::: "memory");  // the tile instructions do not say that they read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if constexpr (R == 2) {
        _tile_zero(4);
        _tile_zero(5);
    }
    for (long w = 0; w < num_words; w += TILE_WORDS) {
        const float* ahead = (w < fetch.turn ? fetch.first : fetch.then) + w * fetch.lines * LANES;
        for (int i = 0; i < fetch.lines * TILE_WORDS; ++i) __builtin_prefetch(ahead + i * LANES);
        PHALANX_TILE_STEP(0, 0, 3)
        PHALANX_TILE_STEP(1, 1, 4)
        PHALANX_TILE_STEP(2, 2, 5)
        PHALANX_TILE_STEP(3, 3, 3)
    }
    PHALANX_TILE_STORE(0, 0, 3)
    PHALANX_TILE_STORE(1, 1, 4)
    PHALANX_TILE_STORE(2, 2, 5)
    PHALANX_TILE_STORE(3, 3, 3)
    asm volatile("" ::: "memory");
}
#undef PHALANX_TILE_STEP
#undef PHALANX_TILE_STORE
#endif

// Rows [first, last) of one panel, at most 32 at a time: body(rows, from, fetch). The last ones may begin among those
// before them: such rows are computed twice, which costs less than tiles of another size.
template <int VECTORS, class Body>
INLINE void in_tiles(Tiles& tiles, long first, long last, long num_words, const float* panel, const float* next,
                     const Body& body) {
#if PHALANX_TILES
    const long rows = std::min<long>(GROUP_ROWS, last - first), groups = ceil_div(last - first, GROUP_ROWS);
    tiles.configure(int(std::min<long>(rows, TILE_ROWS)));
    for (long g = 0; g < groups; ++g)
        body(int(rows), std::min(first + g * GROUP_ROWS, last - rows),
             fetch_plan<VECTORS>(g, groups, num_words, panel, next ? next : panel));
#endif
}

"""Triton kernels of `moe_ffn`. A leading underscore: machines without Triton look for implementations here too."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def mark_tiles(slot, counts, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS: tl.constexpr, BM: tl.constexpr):
    """Name the tiles of a slot, given the number of pairs of all; returns where its first one begins.

    `sorted_pairs` of the unused end of its last tile is `num_pairs`; `tile_slot` of unused tiles is -1.
    """
    bins = tl.arange(0, BINS)
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(bins < slot, tiles, 0), 0)
    own_tiles = tl.sum(tl.where(bins == slot, tiles, 0), 0)
    count = tl.sum(tl.where(bins == slot, counts, 0), 0)
    row = tl.arange(0, BM)
    for tile in range(0, own_tiles):
        tl.store(tile_slot + first_tile + tile, slot)
        empty = tile * BM + row >= count
        tl.store(sorted_pairs + (first_tile + tile) * BM + row, tl.zeros([BM], tl.int32) + num_pairs, mask=empty)
    if slot == 0:
        for tile in range(tl.sum(tiles, 0), num_tiles):
            tl.store(tile_slot + tile, -1)
    return first_tile * BM


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def align_few(
    slots, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per slot: its pairs, in order, at the start of its own tiles; no race, so always the same order.

    Every program counts all slots, which is cheaper than a second launch while there are few pairs.
    """
    slot = tl.program_id(0)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(slots + at, mask=at < num_pairs, other=-1)
        counts += tl.histogram(tl.maximum(ids, 0), BINS, mask=ids >= 0)
    place = mark_tiles(slot, counts, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS, BM)
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        hit = tl.load(slots + at, mask=at < num_pairs, other=-1) == slot
        tl.store(sorted_pairs + place + tl.cumsum(hit.to(tl.int32), 0) - 1, at, mask=hit)
        place += tl.sum(hit.to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def count_pairs(slots, counts, totals, num_pairs, num_chunks, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[slot, chunk] and totals[slot], which begin as zeros; sums of integers do not depend on their order."""
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(slots + at, mask=at < num_pairs, other=-1)
    found = tl.histogram(tl.maximum(ids, 0), BINS, mask=ids >= 0)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * num_chunks + chunk, found)
    tl.atomic_add(totals + bins, found, mask=found > 0)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "num_chunks"])
def place_slots(
    counts, totals, sorted_pairs, tile_slot, num_pairs, num_tiles, num_chunks,
    BINS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """counts[slot, chunk] becomes the place of the first pair of the slot in the chunk."""
    slot = tl.program_id(0)
    all_counts = tl.load(totals + tl.arange(0, BINS))
    place = mark_tiles(slot, all_counts, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS, BM)
    for start in range(0, num_chunks, WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        own = counts + slot * num_chunks + chunk
        count = tl.load(own, mask=chunk < num_chunks, other=0)
        tl.store(own, place + tl.cumsum(count, 0) - count, mask=chunk < num_chunks)
        place += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def place_pairs(slots, places, sorted_pairs, num_pairs, num_chunks, CHUNK: tl.constexpr):
    """Every pair after those of its slot that come before it in the chunk."""
    chunk = tl.program_id(0)
    within = tl.arange(0, CHUNK)
    at = chunk * CHUNK + within
    ids = tl.load(slots + at, mask=at < num_pairs, other=-1)
    earlier = (ids[:, None] == ids[None, :]) & (within[None, :] < within[:, None])
    place = tl.load(places + ids * num_chunks + chunk, mask=ids >= 0, other=0)
    tl.store(sorted_pairs + place + tl.sum(earlier.to(tl.int32), 1), at, mask=ids >= 0)


@triton.jit
def tile_of(num_tiles, blocks, GROUP: tl.constexpr):
    """(tile, column block) of a program: GROUP tiles pass over all columns, so that both operands stay in the L2."""
    program = tl.program_id(0)
    group = program // (GROUP * blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    within = program % (GROUP * blocks)
    return group * GROUP + within % size, within // size


@triton.jit
def gated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The activation in fp32; tanh as a sigmoid, which the interpreter has too."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    if ACTIVATION == "gelu_tanh":
        return gate * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate)) * up
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1) * gate * tl.sigmoid(alpha * gate)


@triton.jit
def weight_tile(weight, slot, first, column, start, k, slot_stride, ROWS, DEPTH: tl.constexpr, TMA: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """(BK, BN): columns of a slot's matrix, whose rows of DEPTH begin at `first`; 0 past DEPTH.

    With TMA, `weight` is a descriptor of (slots, rows, DEPTH): the copy engine finds addresses and bounds, and columns
    past ROWS hold whatever rows follow; nobody stores what comes of them.
    """
    if TMA:
        tile = weight.load([slot, first + column, start]).reshape(BN, BK).T
    else:
        columns = column + tl.arange(0, BN)
        at = weight + slot.to(tl.int64) * slot_stride + (first + columns)[None, :] * DEPTH + (start + k)[:, None]
        tile = tl.load(at, mask=(columns < ROWS)[None, :] & (start + k < DEPTH)[:, None], other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def gate_up_act(
    x, weight, bias, sorted_pairs, tile_slot, inner, num_pairs, num_tiles, slot_stride, alpha, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """inner[tile * BM + i] = act(gate) * up of the tile's rows; gathers x, so that no permuted copy of it exists."""
    tile, block = tile_of(num_tiles, tl.cdiv(INNER, BN), GROUP)
    slot = tl.load(tile_slot + tile)
    if slot < 0:
        return
    at = tile * BM + tl.arange(0, BM)
    pair = tl.load(sorted_pairs + at)
    column = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + (pair // TOP_K).to(tl.int64)[:, None] * HIDDEN + k[None, :]
    row_mask, column_mask = (pair < num_pairs)[:, None], (column < INNER)[None, :]
    gate = tl.zeros([BM, BN], dtype=tl.float32)
    up = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, HIDDEN, BK):
        rows = tl.load(x_at + start, mask=row_mask & (start + k < HIDDEN)[None, :], other=0.0)
        gate_weight = weight_tile(weight, slot, 0, block * BN, start, k, slot_stride, INNER, HIDDEN, TMA, BN, BK)
        up_weight = weight_tile(weight, slot, INNER, block * BN, start, k, slot_stride, INNER, HIDDEN, TMA, BN, BK)
        gate = tl.dot(rows, gate_weight, gate, input_precision="ieee")
        up = tl.dot(rows, up_weight, up, input_precision="ieee")
    if BIAS:
        bias_at = bias + slot.to(tl.int64) * slot_stride + column
        gate += tl.load(bias_at, mask=column < INNER, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_at + INNER, mask=column < INNER, other=0.0).to(tl.float32)[None, :]
    y = gated(gate, up, alpha, limit, ACTIVATION).to(inner.dtype.element_ty)
    tl.store(inner + at.to(tl.int64)[:, None] * INNER + column[None, :], y, mask=column_mask & row_mask)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def down(
    inner, weight, bias, sorted_pairs, tile_slot, pairs, num_pairs, num_tiles, slot_stride,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """pairs[pair] = inner[its place] @ down.T, in pairs' dtype; pairs without a slot are not written."""
    tile, block = tile_of(num_tiles, tl.cdiv(HIDDEN, BN), GROUP)
    slot = tl.load(tile_slot + tile)
    if slot < 0:
        return
    at = tile * BM + tl.arange(0, BM)
    pair = tl.load(sorted_pairs + at)
    column = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inner_at = inner + at.to(tl.int64)[:, None] * INNER + k[None, :]
    row_mask, column_mask = (pair < num_pairs)[:, None], (column < HIDDEN)[None, :]
    y = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, INNER, BK):
        rows = tl.load(inner_at + start, mask=row_mask & (start + k < INNER)[None, :], other=0.0)
        columns = weight_tile(weight, slot, 0, block * BN, start, k, slot_stride, HIDDEN, INNER, TMA, BN, BK)
        y = tl.dot(rows, columns, y, input_precision="ieee")
    if BIAS:
        bias_at = bias + slot.to(tl.int64) * slot_stride + column
        y += tl.load(bias_at, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    y_at = pairs + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(y_at, y.to(pairs.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def combine(pairs, slots, weights, out, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr):
    """out[row] = sum of weight * pair over the choices that have a slot; fp32, ascending j."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], dtype=tl.float32)
    for j in range(0, TOP_K):
        valid = tl.load(slots + row * TOP_K + j) >= 0
        weight = tl.load(weights + row * TOP_K + j, mask=valid, other=0.0)
        y = tl.load(pairs + (row * TOP_K + j) * HIDDEN + column, mask=valid & (column < HIDDEN), other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out + row * HIDDEN + column, total, mask=column < HIDDEN)

"""Triton kernels of `moe_ffn`. A leading underscore: machines without Triton look for implementations here too."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def moe_align(
    slots, sorted_pairs, tile_slot, num_pairs, num_tiles, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per slot: its pairs, in order, at the start of its own tiles; no atomics, so always the same order.

    Every program counts all slots, which is cheaper than a second launch. `sorted_pairs` of the unused end of a last
    tile is `num_pairs`; `tile_slot` of unused tiles is -1.
    """
    slot = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(slots + at, mask=at < num_pairs, other=-1)
        counts += tl.histogram(tl.maximum(ids, 0), BINS, mask=ids >= 0)
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(bins < slot, tiles, 0), 0)
    own_tiles = tl.sum(tl.where(bins == slot, tiles, 0), 0)
    count = tl.sum(tl.where(bins == slot, counts, 0), 0)

    seen = 0
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        hit = tl.load(slots + at, mask=at < num_pairs, other=-1) == slot
        place = seen + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(sorted_pairs + first_tile * BM + place, at, mask=hit)
        seen += tl.sum(hit.to(tl.int32), 0)
    row = tl.arange(0, BM)
    for tile in range(0, own_tiles):
        tl.store(tile_slot + first_tile + tile, slot)
        empty = tile * BM + row >= count
        tl.store(sorted_pairs + (first_tile + tile) * BM + row, tl.zeros([BM], tl.int32) + num_pairs, mask=empty)
    if slot == 0:
        for tile in range(tl.sum(tiles, 0), num_tiles):
            tl.store(tile_slot + tile, -1)


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


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def gate_up_act(
    x, weight, bias, sorted_pairs, tile_slot, inner, num_pairs, num_tiles, slot_stride, alpha, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
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
    gate_at = weight + slot.to(tl.int64) * slot_stride + column[None, :] * HIDDEN + k[:, None]
    row_mask, column_mask = (pair < num_pairs)[:, None], (column < INNER)[None, :]
    gate = tl.zeros([BM, BN], dtype=tl.float32)
    up = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, HIDDEN, BK):
        left = HIDDEN - start
        rows = tl.load(x_at + start, mask=row_mask & (k < left)[None, :], other=0.0)
        mask = column_mask & (k < left)[:, None]
        gate_weight = tl.load(gate_at + start, mask=mask, other=0.0)
        up_weight = tl.load(gate_at + start + INNER * HIDDEN, mask=mask, other=0.0)
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
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr,
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
    weight_at = weight + slot.to(tl.int64) * slot_stride + column[None, :] * INNER + k[:, None]
    row_mask, column_mask = (pair < num_pairs)[:, None], (column < HIDDEN)[None, :]
    y = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, INNER, BK):
        left = INNER - start
        rows = tl.load(inner_at + start, mask=row_mask & (k < left)[None, :], other=0.0)
        columns = tl.load(weight_at + start, mask=column_mask & (k < left)[:, None], other=0.0)
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

"""Triton kernels of attention over tokens in three places, in INT8 but for those computed again. Imported only where a GPU runs
them, or interpreted.

A token's row, of one layer, is levels [lane, key or value, key head, channel], then ranges of values [lane, key head, 2] in 16
bit: ``token_bytes`` in all. Two launches: ``bear`` stores the newborn token, so that ``attend`` finds every token where it lies.
"""

import triton
import triton.language as tl

from runtime.graph.quantised_kernels import fold_levels, fold_native, levels_of, range_of, score_levels


@triton.jit
def _row_of(row, places):
    """The step's number and place in the table; where the recomputed and the fetched tokens end; the newborn one's position."""
    now = tl.load(row)
    place = places + 7 * now
    recomputed = tl.load(place + 1).to(tl.int32)
    off = recomputed + tl.load(place + 2).to(tl.int32)
    return now, place, recomputed, off, off + tl.load(place).to(tl.int32) - 1


@triton.jit(do_not_specialize=["width", "layer", "layers", "kept_from"])
def bear(
    k_rows,  # [lane, key head, channel], lanes ``kv_stride`` apart, of the newborn token
    v_rows,
    block,  # slots of all layers, then staging
    block_half,  # the same memory as 16-bit floats
    on_host,  # the layer's rows in pinned memory, from position ``kept_from`` on
    key_ranges,  # [lane, key head, group, 2, channel]
    waiting,  # [lane, key head, group token, channel] in the compute type: the open group's keys
    slots_of,  # [row, number], rows ``width`` apart: slots of the tokens in HBM, the oldest first
    places,  # [row, 7]: see ``runtime.graph.streamed``
    row,  # [1]
    kv_stride,
    token_bytes,
    heads,
    groups,
    width,
    layer,
    layers,
    kept_from,
    ON_HOST: tl.constexpr,  # whether any token is ever there
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store one key head's newborn token; freeze the group that it completes, wherever its tokens are by now."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, member = tl.arange(0, PADDED), tl.arange(0, GROUP)
    inside = channel < CHANNELS
    now, place, recomputed, off, position = _row_of(row, places)
    waits = position % GROUP
    frozen = position - waits
    own_row = lane * kv_stride + head * CHANNELS + channel
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32)
    lane_head = lane * heads + head
    waiting += lane_head * GROUP * CHANNELS
    tl.store(waiting + waits * CHANNELS + channel, k_own, mask=inside)

    entries = heads * CHANNELS
    of_head = lane * 2 * entries + head * CHANNELS
    slot_bytes = layers.to(tl.int64) * token_bytes
    own = layer * token_bytes + tl.load(place + 3) * slot_bytes
    v_low, v_step = range_of(
        tl.min(tl.where(inside, v_own, float("inf")), 0), tl.max(tl.where(inside, v_own, float("-inf")), 0)
    )
    v_levels = levels_of(v_own, v_low, v_step).to(tl.uint8)
    tl.store(block + own + of_head + entries + channel, v_levels, mask=inside)
    own_range = block_half + (own + tl.num_programs(0) * 2 * entries) // 2 + 2 * lane_head
    tl.store(own_range, v_low.to(tl.float16))
    tl.store(own_range + 1, v_step.to(tl.float16))

    if waits == GROUP - 1:
        older = (member < waits)[:, None] & inside[None, :]
        k = tl.load(waiting + member[:, None] * CHANNELS + channel[None, :], mask=older, other=0.0)
        k = tl.where((member < waits)[:, None], k, k_own[None, :]).to(tl.float32)
        k_low, k_step = range_of(tl.min(k, 0), tl.max(k, 0))
        new_range = key_ranges + (lane_head * groups + frozen // GROUP) * 2 * CHANNELS + channel
        tl.store(new_range, k_low.to(tl.float16), mask=inside)
        tl.store(new_range + CHANNELS, k_step.to(tl.float16), mask=inside)
        levels = levels_of(k, k_low[None, :], k_step[None, :]).to(tl.uint8)
        item = frozen + member
        near = item >= off
        slot = tl.load(slots_of + now * width + item - off, mask=near, other=0).to(tl.int64)
        at = (layer * token_bytes + slot * slot_bytes + of_head)[:, None] + channel[None, :]
        tl.store(block + at, levels, mask=near[:, None] & inside[None, :])
        if ON_HOST:
            far = (item >= recomputed) & (item < off)
            at = ((item - kept_from).to(tl.int64) * token_bytes + of_head)[:, None] + channel[None, :]
            tl.store(on_host + at, levels, mask=far[:, None] & inside[None, :])


@triton.jit
def _rows_at(item, there, recomputed, off, slots_of, fetched_at, layer_at, slot_bytes, token_bytes):
    """Where in the block rows of the tokens ``item`` begin that are not computed again: fetched, or in their slots."""
    slot = tl.load(slots_of + item - off, mask=there & (item >= off), other=0).to(tl.int64)
    brought = fetched_at + (item - recomputed).to(tl.int64) * token_bytes
    return tl.where(item < off, brought, layer_at + slot * slot_bytes)


@triton.jit(do_not_specialize=["width", "layer", "layers"])
def attend(
    q_rows,  # [lane, head, channel], lanes ``q_stride`` apart
    block,  # from here to ``row`` as in ``bear``
    block_half,
    block_native,  # the same memory in the compute type: tokens computed again, [token, lane, key or value, key head, channel]
    key_ranges,
    waiting,
    slots_of,
    places,
    row,
    padding,  # [lane]
    attended,  # [lane, head, channel]
    scale,
    q_stride,
    token_bytes,
    heads,
    key_heads,
    groups,
    width,
    layer,
    layers,
    BUFFERS: tl.constexpr,
    FROM_FRONT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,  # bytes of an entry in the compute type
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens that a loop takes at once, of one group
):
    """One query head over all its lane's tokens, each read once.

    Of a group that the newborn token has just completed, what was fetched came without levels of its keys: those still wait.
    ``FROM_FRONT``: a lane's recomputed rows begin with its first token that is no padding.
    """
    head, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)  # heads first: their rows are neighbours
    key_head = head // (heads // key_heads)
    channel, member = tl.arange(0, PADDED), tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    now, place, recomputed, off, position = _row_of(row, places)
    cached = position + 1
    waits = position % GROUP
    frozen = position - waits
    closes = waits == GROUP - 1
    first_real = tl.load(padding + lane)
    buffer = (now * layers + layer) % BUFFERS
    # whole units of bytes, so that rows are read as vectors
    fetched_at = (tl.load(place + 5) + buffer * tl.load(place + 6)) // UNIT * UNIT
    lanes, entries = tl.num_programs(1).to(tl.int64), key_heads * CHANNELS
    lane_head = lane * key_heads + key_head
    of_head = lane * 2 * entries + key_head * CHANNELS
    again_rows = block_native + tl.load(place + 4) // UNIT * (UNIT // WIDTH) + of_head
    of_ranges = lanes * 2 * entries // 2 + 2 * lane_head  # of a row in 16 bit
    layer_at, slot_bytes = (layer * token_bytes).to(tl.int64), layers.to(tl.int64) * token_bytes
    slots_of += now * width
    key_ranges += lane_head * groups * 2 * CHANNELS + channel
    waiting += lane_head * GROUP * CHANNELS
    at_query = lane * q_stride + head * CHANNELS + channel
    q = tl.load(q_rows + at_query, mask=inside, other=0.0).to(tl.float32) * scale
    query = q[None, :]  # once: Triton 3.6 cannot compile several loops that each make it
    total = tl.sum(q, 0) * 0.0
    mixed = q * 0.0
    peak = total - 1e30  # below every score, and a number, so that blocks of padding alone leave none out

    for first in range(first_real // BLOCK * BLOCK, recomputed, BLOCK):
        item = first + member
        there = (item >= first_real) & (item < recomputed)
        number = item - first_real if FROM_FRONT else item
        at = (number.to(tl.int64) * (lanes * 2 * entries))[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(again_rows + at, mask=mask, other=0.0)
        v = tl.load(again_rows + at + entries, mask=mask, other=0.0)
        score = tl.where(there, tl.sum(query * k.to(tl.float32), 1), float("-inf"))
        peak, total, mixed = fold_native(peak, total, mixed, score, v)

    start = tl.maximum(recomputed, first_real)
    end = tl.where(closes, cached, frozen)
    for first in range(start // BLOCK * BLOCK, end, BLOCK):
        at = key_ranges + first // GROUP * 2 * CHANNELS
        low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
        item = first + member
        there = (item >= start) & (item < end) & ((item < frozen) | (item >= off))
        rows = _rows_at(item, there, recomputed, off, slots_of, fetched_at, layer_at, slot_bytes, token_bytes)
        at, mask = (rows + of_head)[:, None] + channel[None, :], there[:, None] & inside[None, :]
        k = tl.load(block + at, mask=mask, other=0)
        v = tl.load(block + at + entries, mask=mask, other=0)
        low_v = tl.load(block_half + rows // 2 + of_ranges, mask=there, other=0.0)
        step_v = tl.load(block_half + rows // 2 + of_ranges + 1, mask=there, other=0.0)
        score = tl.where(there, score_levels(q, low, step, k), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    start = tl.maximum(start, frozen)
    end = tl.where(closes, off, cached)
    for first in range(start // BLOCK * BLOCK, end, BLOCK):
        item = first + member
        there = (item >= start) & (item < end)
        rows = _rows_at(item, there, recomputed, off, slots_of, fetched_at, layer_at, slot_bytes, token_bytes)
        at, mask = (rows + of_head + entries)[:, None] + channel[None, :], there[:, None] & inside[None, :]
        k = tl.load(waiting + (item % GROUP * CHANNELS)[:, None] + channel[None, :], mask=mask, other=0.0)
        v = tl.load(block + at, mask=mask, other=0)
        low_v = tl.load(block_half + rows // 2 + of_ranges, mask=there, other=0.0)
        step_v = tl.load(block_half + rows // 2 + of_ranges + 1, mask=there, other=0.0)
        score = tl.where(there, tl.sum(query * k.to(tl.float32), 1), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + (lane * heads + head) * CHANNELS + channel, out, mask=inside)

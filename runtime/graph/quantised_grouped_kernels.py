"""Triton kernels of dense attention over INT8 levels where a group of query heads shares a key head, for lanes in step.

Imported only where a GPU runs them. Where levels lie, near and far, is as in ``quantised_dense_kernels``. Three launches:
``bear`` stores the newborn token, so that ``attend`` finds every token where it lies, whichever of its programs reads it;
``grouped_kernels.merge`` puts parts together.

Levels are multiplied as they are, less ``MIDDLE``: exact in 16 bit, and half as large, so that what rounding the other
factor costs is half as much. Steps go into that factor and lows are added in float32.
"""

import triton
import triton.language as tl

from runtime.graph.quantised_dense_kernels import store_newborn

MIDDLE: tl.constexpr = tl.constexpr(128)  # of the levels


@triton.jit
def bear(
    k_rows,  # [lane, head, channel], lanes ``kv_stride`` apart, of the newborn token
    v_rows,
    keys,  # from here to ``counts`` as in ``quantised_dense_kernels.attend``
    values,
    value_ranges,
    far_keys,
    far_values,
    far_value_ranges,
    key_ranges,
    waiting_keys,
    left_behind,
    counts,
    kv_stride,
    heads,
    capacity,
    far_capacity,
    groups,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FREEZE: tl.constexpr,
    WIDTH: tl.constexpr,
    FAR: tl.constexpr,
):
    """Store one key head's newborn token; freeze the group that it completes."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * kv_stride + head * CHANNELS + channel
    lane_head = lane * heads + head
    store_newborn(
        tl.load(k_rows + own_row, mask=inside, other=0.0),
        tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32),
        keys + lane_head * capacity * CHANNELS,
        values + lane_head * capacity * CHANNELS,
        value_ranges + lane_head * 2 * capacity,
        far_keys + lane_head * far_capacity * CHANNELS,
        far_values + lane_head * far_capacity * CHANNELS,
        far_value_ranges + lane_head * 2 * far_capacity,
        key_ranges + lane_head * groups * 2 * CHANNELS + channel,
        waiting_keys + lane_head * GROUP * CHANNELS,
        left_behind + lane_head * GROUP * WIDTH * CHANNELS,
        tl.load(counts) - 1,
        capacity,
        far_capacity,
        GROUP,
        CHANNELS,
        PADDED,
        FREEZE,
        WIDTH,
        FAR,
    )


@triton.jit
def attend(
    q_rows,  # [lane, query head, channel], lanes ``q_stride`` apart
    keys,  # from here to ``padding`` as in ``quantised_dense_kernels.attend``
    values,
    value_ranges,
    far_keys,
    far_values,
    far_value_ranges,
    key_ranges,
    waiting_keys,
    left_behind,
    counts,
    padding,
    mixed,  # [part, lane, query head, channel] in float32; peaks and totals [part, lane, query head]
    peaks,
    totals,
    scale,
    q_stride,
    heads,
    capacity,
    far_capacity,
    groups,
    SHARED: tl.constexpr,  # query heads of a key head
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens that a loop takes at once, of one group
    PARTS: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The queries of one key head over a part of its lane's tokens, the newborn one among them: parts take blocks in turn."""
    lane, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, channel, member = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    tile = (row < SHARED)[:, None] & inside[None, :]  # queries fill the first rows of it
    query = head * SHARED + row
    q = tl.load(q_rows + lane * q_stride + query[:, None] * CHANNELS + channel[None, :], mask=tile, other=0.0)
    items = tl.load(counts)
    first_real = tl.load(padding + lane)
    waiting = items % GROUP
    frozen = items - waiting
    first_block = first_real // BLOCK
    lane_head = lane * heads + head
    keys += lane_head * capacity * CHANNELS
    values += lane_head * capacity * CHANNELS
    value_ranges += lane_head * 2 * capacity
    far_keys += lane_head * far_capacity * CHANNELS
    far_values += lane_head * far_capacity * CHANNELS
    far_value_ranges += lane_head * 2 * far_capacity
    key_ranges += lane_head * groups * 2 * CHANNELS + channel
    waiting_keys += lane_head * GROUP * CHANNELS
    left_behind += lane_head * GROUP * WIDTH * CHANNELS

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    near_end = tl.minimum(frozen, capacity) if FAR else frozen
    for block in range(first_block + part, (near_end + BLOCK - 1) // BLOCK, PARTS):
        item = block * BLOCK + member
        there = (item >= first_real) & (item < near_end)
        at = item[:, None] * CHANNELS + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=mask, other=0)
        v = tl.load(values + at, mask=mask, other=0)
        low_v = tl.load(value_ranges + item, mask=there, other=0.0).to(tl.float32)
        step_v = tl.load(value_ranges + capacity + item, mask=there, other=0.0).to(tl.float32)
        ranges = key_ranges + block * BLOCK // GROUP * 2 * CHANNELS
        score = _score_levels(q, ranges, inside, k, CHANNELS, PRECISION) * scale
        peak, total, out = _mix_levels(score, there, v, low_v, step_v, q.dtype, peak, total, out, PRECISION)

    late = PARTS - 1 - part  # the last parts are those that may have had a block less
    if FAR:
        kept = tl.maximum(
            capacity, frozen - GROUP + waiting
        )  # from here on no newborn key has taken the row left behind
        far_block = tl.maximum(capacity // BLOCK, first_block)
        for block in range(far_block + part, (tl.minimum(kept, frozen) + BLOCK - 1) // BLOCK, PARTS):
            item = block * BLOCK + member
            there = (item >= capacity) & (item >= first_real) & (item < kept) & (item < frozen)
            beyond = item - capacity
            at = beyond[:, None] * CHANNELS + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(far_keys + at, mask=mask, other=0)
            v = tl.load(far_values + at, mask=mask, other=0)
            low_v = tl.load(far_value_ranges + beyond, mask=there, other=0.0).to(tl.float32)
            step_v = tl.load(far_value_ranges + far_capacity + beyond, mask=there, other=0.0).to(tl.float32)
            ranges = key_ranges + block * BLOCK // GROUP * 2 * CHANNELS
            score = _score_levels(q, ranges, inside, k, CHANNELS, PRECISION) * scale
            peak, total, out = _mix_levels(score, there, v, low_v, step_v, q.dtype, peak, total, out, PRECISION)
        kept_block = tl.maximum(kept // BLOCK, first_block)
        for block in tl.range(kept_block + late, frozen // BLOCK, PARTS, num_stages=1):
            item = block * BLOCK + member
            there = (item >= kept) & (item >= first_real)
            beyond = item - capacity
            at = (item % GROUP * WIDTH * CHANNELS)[:, None] + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(left_behind + at, mask=mask, other=0)
            v = tl.load(left_behind + at + CHANNELS, mask=mask, other=0)
            low_v = tl.load(far_value_ranges + beyond, mask=there, other=0.0).to(tl.float32)
            step_v = tl.load(far_value_ranges + far_capacity + beyond, mask=there, other=0.0).to(tl.float32)
            ranges = key_ranges + block * BLOCK // GROUP * 2 * CHANNELS
            score = _score_levels(q, ranges, inside, k, CHANNELS, PRECISION) * scale
            peak, total, out = _mix_levels(score, there, v, low_v, step_v, q.dtype, peak, total, out, PRECISION)

    open_block = tl.maximum(frozen // BLOCK, first_block)
    for block in tl.range(open_block + late, (items + BLOCK - 1) // BLOCK, PARTS, num_stages=1):
        item = block * BLOCK + member
        there = (item >= first_real) & (item < items)
        at, mask = (item % GROUP * CHANNELS)[:, None] + channel[None, :], there[:, None] & inside[None, :]
        k = tl.load(waiting_keys + at, mask=mask, other=0.0)
        here = there & (item < capacity)
        at, mask = item[:, None] * CHANNELS + channel[None, :], here[:, None] & inside[None, :]
        v = tl.load(values + at, mask=mask, other=0)
        low_v = tl.load(value_ranges + item, mask=here, other=0.0).to(tl.float32)
        step_v = tl.load(value_ranges + capacity + item, mask=here, other=0.0).to(tl.float32)
        if FAR:  # where one is read, the other is 0
            beyond, away = item - capacity, there & (item >= capacity)
            at, mask = beyond[:, None] * CHANNELS + channel[None, :], away[:, None] & inside[None, :]
            v = v | tl.load(far_values + at, mask=mask, other=0)
            low_v += tl.load(far_value_ranges + beyond, mask=away, other=0.0).to(tl.float32)
            step_v += tl.load(far_value_ranges + far_capacity + beyond, mask=away, other=0.0).to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        peak, total, out = _mix_levels(score, there, v, low_v, step_v, q.dtype, peak, total, out, PRECISION)

    part_query = (part * tl.num_programs(0).to(tl.int64) + lane) * heads * SHARED + query
    tl.store(peaks + part_query, peak, mask=row < SHARED)
    tl.store(totals + part_query, total, mask=row < SHARED)
    tl.store(mixed + part_query[:, None] * CHANNELS + channel[None, :], out, mask=tile)


@triton.jit
def _score_levels(q, ranges, inside, k, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """[row, token], not scaled, of a group's levels ``k`` [token, channel] whose channels have ``ranges``."""
    step = tl.load(ranges + CHANNELS, mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(ranges, mask=inside, other=0.0).to(tl.float32) + MIDDLE * step
    wide = q.to(tl.float32)
    stepped = (wide * step[None, :]).to(q.dtype)
    levels = k.to(q.dtype) - MIDDLE
    return tl.dot(stepped, tl.trans(levels), input_precision=PRECISION) + tl.sum(wide * middle[None, :], 1)[:, None]


@triton.jit
def _mix_levels(score, there, v, low, step, kind: tl.constexpr, peak, total, out, PRECISION: tl.constexpr):
    """A group of tokens more, of values ``v`` * ``step`` + ``low``, the latter two [token].

    The weights that are multiplied with levels are relative to the largest step: in fp16 they keep what weights alone do.
    """
    score = tl.where(there[None, :], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but padding so far
    share = tl.exp(score - safe[:, None])
    shrink = tl.exp(peak - safe)
    total = total * shrink + tl.sum(share, 1)
    largest = tl.max(step, 0)
    relative = step / tl.where(largest > 0, largest, 1.0)
    levels = v.to(kind) - MIDDLE
    more = tl.dot((share * relative[None, :]).to(kind), levels, input_precision=PRECISION) * largest
    more += tl.sum(share * (low + MIDDLE * step)[None, :], 1)[:, None]
    return higher, total, out * shrink[:, None] + more

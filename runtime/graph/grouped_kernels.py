"""Triton kernels of decode attention where a group of query heads shares a key head. Imported only where a GPU runs them.

Keys and values lie as [lane, head, slot, channel]. Each program takes one key head's part of a lane's slots, so that few
lanes with long contexts still fill the GPU; ``merge`` puts the parts together.
"""

import triton
import triton.language as tl

from runtime.graph.kernels import row_starts


@triton.jit
def attend(
    q_rows,  # [lane, query head, channel], lanes ``row_stride`` apart; keys and values of the newborn token likewise
    k_rows,
    v_rows,
    keys,
    values,
    slots,  # [lane, width]: what each lane attends to, its newborn token last; -1: padding. Unused where not LISTED
    counts,  # [lane] items, or one for all lanes (``count_stride`` 0)
    padding,  # [lane]
    mixed,  # [part, lane, query head, channel] in float32; peaks and totals [part, lane, query head]
    peaks,
    totals,
    far_keys,  # as ``kernels.attend`` has them; likewise the next three
    far_values,
    staged_keys,
    staged_values,
    scores,  # [lane, query head, width], before the softmax, where WEIGHED
    scale,
    q_stride,
    kv_stride,
    count_stride,
    heads,
    capacity,
    far_capacity,
    staged_rows,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHED: tl.constexpr,
    FAR: tl.constexpr,
    STAGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key head's group of queries over a part of its lane's slots; part 0 stores the newborn token's row."""
    lane, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    lanes = tl.num_programs(0).to(tl.int64)
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)  # a group fills the first rows of a tile
    inside = channel < CHANNELS
    tile = (row < GROUP)[:, None] & inside[None, :]
    query = head * GROUP + row
    q = tl.load(q_rows + lane * q_stride + query[:, None] * CHANNELS + channel[None, :], mask=tile, other=0.0)
    items = tl.load(counts + lane * count_stride) - 1
    first_real = tl.load(padding + lane)
    base = (lane * heads + head) * capacity * CHANNELS
    far_base = (lane * heads + head) * far_capacity * CHANNELS
    lane_query = (lane * heads * GROUP + query) * width

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    if part == 0:
        own_slot = items
        if LISTED:
            own_slot = tl.load(slots + lane * width + items)
        own_row = lane * kv_stride + head * CHANNELS + channel
        k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
        v_own = tl.load(v_rows + own_row, mask=inside, other=0.0)
        near = inside & (own_slot < capacity)
        tl.store(keys + base + own_slot * CHANNELS + channel, k_own, mask=near)
        tl.store(values + base + own_slot * CHANNELS + channel, v_own, mask=near)
        if FAR:
            far = inside & (own_slot >= capacity)
            tl.store(far_keys + far_base + (own_slot - capacity) * CHANNELS + channel, k_own, mask=far)
            tl.store(far_values + far_base + (own_slot - capacity) * CHANNELS + channel, v_own, mask=far)
        peak = tl.sum(q.to(tl.float32) * k_own.to(tl.float32)[None, :], 1) * scale
        total += 1.0
        out += v_own.to(tl.float32)[None, :]
        if WEIGHED:
            tl.store(scores + lane_query + items, peak, mask=row < GROUP)

    near_items = tl.minimum(items, capacity) if FAR else items
    length = (near_items + PARTS - 1) // PARTS
    last = tl.minimum(near_items, (part + 1) * length)
    for first in range(part * length, last, BLOCK):
        item = first + tl.arange(0, BLOCK)
        if LISTED:
            slot = tl.load(slots + lane * width + item, mask=item < last, other=-1)
            there = slot >= 0
        else:
            slot = item
            there = (item < last) & (item >= first_real)
        mask = there[:, None] & inside[None, :]
        if STAGED:
            staged, host = (
                (lane * heads + head) * staged_rows * CHANNELS,
                (lane * far_capacity * heads + head) * CHANNELS,
            )
            k_row, v_row = keys + base, values + base
            k_row = row_starts(
                k_row, staged_keys + staged, far_keys + host, slot, capacity, staged_rows, heads, CHANNELS
            )
            v_row = row_starts(
                v_row, staged_values + staged, far_values + host, slot, capacity, staged_rows, heads, CHANNELS
            )
            k = tl.load(k_row[:, None] + channel[None, :], mask=mask, other=0.0)
            v = tl.load(v_row[:, None] + channel[None, :], mask=mask, other=0.0)
        else:
            at = base + slot.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
        score, peak, total, out = mix(q, k, v, there, scale, peak, total, out, PRECISION)
        if WEIGHED:
            listed = (row < GROUP)[:, None] & (item < last)[None, :]
            tl.store(scores + lane_query[:, None] + item[None, :], score, mask=listed)
    if FAR:
        far_length = (tl.maximum(items - capacity, 0) + PARTS - 1) // PARTS
        far_last = tl.minimum(items, capacity + (part + 1) * far_length)
        for first in range(capacity + part * far_length, far_last, BLOCK):
            item = first + tl.arange(0, BLOCK)
            there = (item < far_last) & (item >= first_real)
            at = far_base + (item - capacity).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(far_keys + at, mask=mask, other=0.0)
            v = tl.load(far_values + at, mask=mask, other=0.0)
            score, peak, total, out = mix(q, k, v, there, scale, peak, total, out, PRECISION)

    part_query = (part * lanes + lane) * heads * GROUP + query
    tl.store(peaks + part_query, peak, mask=row < GROUP)
    tl.store(totals + part_query, total, mask=row < GROUP)
    tl.store(mixed + part_query[:, None] * CHANNELS + channel[None, :], out, mask=tile)


@triton.jit
def mix(q, k, v, there, scale, peak, total, out, PRECISION: tl.constexpr):
    """A block of tokens more. Rows of a tile that hold no query do no harm: they are never stored."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    score = tl.where(there[None, :], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but padding so far
    share = tl.exp(score - safe[:, None])
    shrink = tl.exp(peak - safe)
    total = total * shrink + tl.sum(share, 1)
    more = tl.dot(share.to(v.dtype), v, input_precision=PRECISION)
    return score, higher, total, out * shrink[:, None] + more


@triton.jit
def merge(
    mixed,
    peaks,
    totals,
    attended,  # [lane, query head, channel]
    peak_out,  # [lane, query head], where WEIGHED
    total_out,
    lane_queries,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """The parts of one query head together."""
    query = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, PADDED_PARTS), tl.arange(0, PADDED)
    at = part * lane_queries.to(tl.int64) + query
    peak = tl.load(peaks + at, mask=part < PARTS, other=float("-inf"))
    total = tl.load(totals + at, mask=part < PARTS, other=0.0)
    highest = tl.max(peak, 0)
    shrink = tl.exp(peak - highest)
    tile = (part < PARTS)[:, None] & (channel < CHANNELS)[None, :]
    rows = tl.load(mixed + at[:, None] * CHANNELS + channel[None, :], mask=tile, other=0.0)
    sum_all = tl.sum(total * shrink, 0)
    out = tl.sum(rows * shrink[:, None], 0) / sum_all
    tl.store(attended + query * CHANNELS + channel, out.to(attended.dtype.element_ty), mask=channel < CHANNELS)
    if WEIGHED:
        tl.store(peak_out + query, highest)
        tl.store(total_out + query, sum_all)

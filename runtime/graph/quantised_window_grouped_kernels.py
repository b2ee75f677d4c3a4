"""Triton kernels of sparse window attention over INT8 levels where a group of query heads shares a key head.

Imported only where a GPU runs them. What tensors hold is as in ``quantised_window_kernels``. Three launches: ``bear`` stores
newborn tokens, ``attend`` goes over the lists in parts, ``grouped_kernels.merge`` puts those together.
"""

import triton
import triton.language as tl

from runtime.graph.grouped_kernels import mix
from runtime.graph.quantised_window_kernels import bear as store_newborn
from runtime.graph.quantised_window_kernels import take_ranges, take_rows


@triton.jit
def bear(
    k_rows,  # [lane, head, channel], lanes ``row_stride`` apart, of the newborn token
    v_rows,
    keys,  # from here to ``waiting_keys`` as ``attend``'s
    values,
    value_ranges,
    far_keys,
    key_ranges,
    waiting_keys,
    slots,
    items_of,
    homes,
    cached,
    followed,
    row_stride,
    heads,
    capacity,
    far_capacity,
    width,
    groups,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FREEZE: tl.constexpr,
):
    """One key head's newborn token, and the group that it completes, before several programs attend to them."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * row_stride + head * CHANNELS + channel
    lane_head = lane * heads + head
    _, _, moved = store_newborn(
        tl.load(k_rows + own_row, mask=inside, other=0.0),
        tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32),
        tl.load(slots + lane * width + tl.load(items_of + lane) - 1),
        tl.load(cached) - 1,
        keys + lane_head * capacity * CHANNELS,
        values + lane_head * capacity * CHANNELS,
        value_ranges + lane_head * capacity * 2,
        far_keys + (lane * far_capacity * heads + head) * CHANNELS,
        key_ranges + lane_head * groups * 2 * CHANNELS,
        waiting_keys + lane_head * GROUP * CHANNELS,
        homes + lane * GROUP,
        capacity,
        heads * CHANNELS,
        GROUP,
        CHANNELS,
        PADDED,
        FREEZE,
    )
    tl.store(followed + lane, moved, mask=head == 0)


@triton.jit
def attend(
    q_rows,  # [lane, query head, channel], lanes ``q_stride`` apart
    keys,  # from here to ``cached`` as ``attend``'s
    values,
    value_ranges,
    far_keys,
    far_values,
    far_ranges,
    staged_keys,
    staged_values,
    staged_ranges,
    key_ranges,
    waiting_keys,
    slots,
    items_of,
    tokens,
    cached,
    mixed,  # [part, lane, query head, channel] in float32; peaks and totals [part, lane, query head]
    peaks,
    totals,
    scores,  # [lane, query head, width]
    scale,
    q_stride,
    heads,
    capacity,
    far_capacity,
    staged_rows,
    width,
    groups,
    SHARED: tl.constexpr,  # query heads of a key head
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key head's queries over a part of its lane's list, as ``grouped_kernels.attend``, widened to the compute type."""
    lane, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = channel < CHANNELS
    tile = (row < SHARED)[:, None] & inside[None, :]
    query = head * SHARED + row
    q = tl.load(q_rows + lane * q_stride + query[:, None] * CHANNELS + channel[None, :], mask=tile, other=0.0)
    items, many = tl.load(items_of + lane), tl.load(cached)
    opened = many // GROUP * GROUP
    lane_head = lane * heads + head
    keys += lane_head * capacity * CHANNELS
    values += lane_head * capacity * CHANNELS
    value_ranges += lane_head * capacity * 2
    key_ranges += lane_head * groups * 2 * CHANNELS
    waiting_keys += lane_head * GROUP * CHANNELS
    if STAGED:
        far_head = lane * far_capacity * heads + head
        far_keys += far_head * CHANNELS
        far_values += far_head * CHANNELS
        far_ranges += far_head * 2
        staged_keys += lane_head * staged_rows * CHANNELS
        staged_values += lane_head * staged_rows * CHANNELS
        staged_ranges += lane_head * staged_rows * 2
    lane_query = (lane * heads * SHARED + query) * width

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    length = (items + PARTS - 1) // PARTS
    last = tl.minimum(items, (part + 1) * length)
    for first in range(part * length, last, BLOCK):
        item = first + tl.arange(0, BLOCK)
        slot = tl.load(slots + lane * width + item, mask=item < last, other=-1)
        token = tl.load(tokens + lane * width + item, mask=item < last, other=0)
        there = slot >= 0
        waiting = token >= opened
        if STAGED:  # gathered before the newborn token completed its group
            waiting = waiting | ((token >= (many - 1) // GROUP * GROUP) & (slot >= capacity))
        waits = (there & waiting)[:, None] & inside[None, :]
        frozen = (there & (waiting == 0))[:, None] & inside[None, :]
        everything = there[:, None] & inside[None, :]
        # fmt: off
        levels = take_rows(
            keys, staged_keys, far_keys, slot, channel, frozen, capacity, staged_rows, heads, CHANNELS, STAGED,
        ).to(tl.float32)
        v = take_rows(
            values, staged_values, far_values, slot, channel, everything, capacity, staged_rows, heads, CHANNELS, STAGED,
        ).to(tl.float32)
        low_v, step_v = take_ranges(
            value_ranges, staged_ranges, far_ranges, slot, there, capacity, staged_rows, heads, STAGED,
        )
        # fmt: on
        ranges = key_ranges + (token // GROUP)[:, None] * (2 * CHANNELS) + channel[None, :]
        low = tl.load(ranges, mask=frozen, other=0.0).to(tl.float32)
        step = tl.load(ranges + CHANNELS, mask=frozen, other=0.0).to(tl.float32)
        native = tl.load(waiting_keys + (token % GROUP)[:, None] * CHANNELS + channel[None, :], mask=waits, other=0.0)
        k = native + (levels * step + low).to(q.dtype)  # where one is read, the other is 0
        v = (v * step_v.to(tl.float32)[:, None] + low_v.to(tl.float32)[:, None]).to(q.dtype)
        score, peak, total, out = mix(q, k, v, there, scale, peak, total, out, PRECISION)
        listed = (row < SHARED)[:, None] & (item < last)[None, :]
        tl.store(scores + lane_query[:, None] + item[None, :], score, mask=listed)

    part_query = (part * tl.num_programs(0).to(tl.int64) + lane) * heads * SHARED + query
    tl.store(peaks + part_query, peak, mask=row < SHARED)
    tl.store(totals + part_query, total, mask=row < SHARED)
    tl.store(mixed + part_query[:, None] * CHANNELS + channel[None, :], out, mask=tile)

"""Triton kernel of dense attention over INT8 levels in HBM and in pinned memory, for lanes in step.

Imported only where a GPU runs it. A token's slot is its position; slots from ``capacity`` on lie on the host.
"""

import triton
import triton.language as tl

from runtime.graph.quantised_kernels import fold_levels, levels_of, range_of, score_levels


@triton.jit
def attend(
    q_rows,  # [lane, head, channel], lanes ``row_stride`` apart; keys and values of the newborn token likewise
    k_rows,
    v_rows,
    keys,  # [lane, head, slot, channel] levels
    values,
    value_ranges,  # [lane, head, 2, slot]: least and step
    far_keys,  # the same three in pinned memory: slots from ``capacity`` on
    far_values,
    far_value_ranges,
    key_ranges,  # [lane, head, group, 2, channel]
    waiting_keys,  # [lane, head, group token, channel] in the compute type: the open group's
    left_behind,  # the same memory as bytes: key levels, then value levels, of the last frozen group
    counts,  # [1]
    padding,  # [lane]
    attended,  # [lane, head, channel]
    scale,
    row_stride,
    heads,
    capacity,
    far_capacity,
    groups,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    FREEZE: tl.constexpr,  # keys that are frozen at once
    WIDTH: tl.constexpr,  # bytes of a key in the compute type
    FAR: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One query head over its lane's tokens. Keys wait in the compute type until the newborn token completes their group.

    Then the group is frozen, and its levels stay behind in the rows where its keys waited: until a newborn key takes a
    row, what is there need not be fetched from the host.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    items = tl.load(counts) - 1
    first_real = tl.load(padding + lane)
    waiting = items % GROUP
    frozen = items - waiting
    closes = waiting == GROUP - 1
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * row_stride + head * CHANNELS + channel
    q = tl.load(q_rows + own_row, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32)
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

    k_wide, v_wide = store_newborn(
        k_own,
        v_own,
        keys,
        values,
        value_ranges,
        far_keys,
        far_values,
        far_value_ranges,
        key_ranges,
        waiting_keys,
        left_behind,
        items,
        capacity,
        far_capacity,
        GROUP,
        CHANNELS,
        PADDED,
        FREEZE,
        WIDTH,
        FAR,
    )
    end = frozen
    behind = frozen - GROUP + waiting + 1  # of the last frozen group, the first whose row no newborn key has taken
    if closes:
        tl.debug_barrier()  # levels and ranges are read below by other threads
        behind, end, waiting = frozen, items, 0
    score_own = tl.sum(q * k_wide, 0)
    peak, total, mixed = score_own, score_own * 0.0 + 1.0, v_wide

    near_end = tl.minimum(end, capacity) if FAR else end
    for first in range(first_real // BLOCK * BLOCK, near_end, BLOCK):
        at = key_ranges + first // GROUP * 2 * CHANNELS
        low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
        item = first + tl.arange(0, BLOCK)
        there = (item >= first_real) & (item < near_end)
        at = item[:, None] * CHANNELS + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=mask, other=0)
        v = tl.load(values + at, mask=mask, other=0)
        low_v = tl.load(value_ranges + item, mask=there, other=0.0)
        step_v = tl.load(value_ranges + capacity + item, mask=there, other=0.0)
        score = tl.where(there, score_levels(q, low, step, k), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    if FAR:
        kept = tl.maximum(capacity, behind)
        for first in range(tl.maximum(capacity, first_real) // BLOCK * BLOCK, tl.minimum(kept, end), BLOCK):
            at = key_ranges + first // GROUP * 2 * CHANNELS
            low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            step = tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
            item = first + tl.arange(0, BLOCK)
            there = (item >= capacity) & (item >= first_real) & (item < kept) & (item < end)
            beyond = item - capacity
            at = beyond[:, None] * CHANNELS + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(far_keys + at, mask=mask, other=0)
            v = tl.load(far_values + at, mask=mask, other=0)
            low_v = tl.load(far_value_ranges + beyond, mask=there, other=0.0)
            step_v = tl.load(far_value_ranges + far_capacity + beyond, mask=there, other=0.0)
            score = tl.where(there, score_levels(q, low, step, k), float("-inf"))
            peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)
        for first in range(tl.maximum(kept, first_real) // BLOCK * BLOCK, end, BLOCK):
            at = key_ranges + first // GROUP * 2 * CHANNELS
            low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            step = tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
            item = first + tl.arange(0, BLOCK)
            there = (item >= kept) & (item >= first_real) & (item < end)
            at = (item % GROUP * WIDTH * CHANNELS)[:, None] + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(left_behind + at, mask=mask, other=0)
            v = tl.load(left_behind + at + CHANNELS, mask=mask, other=0)
            beyond = item - capacity
            low_v = tl.load(far_value_ranges + beyond, mask=there, other=0.0)
            step_v = tl.load(far_value_ranges + far_capacity + beyond, mask=there, other=0.0)
            score = tl.where(there, score_levels(q, low, step, k), float("-inf"))
            peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    for first in range(0, waiting, BLOCK):
        member = first + tl.arange(0, BLOCK)
        item = frozen + member
        there = (member < waiting) & (item >= first_real)
        mask = there[:, None] & inside[None, :]
        k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        here = there & (item < capacity)
        at, mask = item[:, None] * CHANNELS + channel[None, :], here[:, None] & inside[None, :]
        v = tl.load(values + at, mask=mask, other=0)
        low_v = tl.load(value_ranges + item, mask=here, other=0.0)
        step_v = tl.load(value_ranges + capacity + item, mask=here, other=0.0)
        if FAR:  # where one is read, the other is 0
            beyond, away = item - capacity, there & (item >= capacity)
            at, mask = beyond[:, None] * CHANNELS + channel[None, :], away[:, None] & inside[None, :]
            v = v | tl.load(far_values + at, mask=mask, other=0)
            low_v += tl.load(far_value_ranges + beyond, mask=away, other=0.0)
            step_v += tl.load(far_value_ranges + far_capacity + beyond, mask=away, other=0.0)
        score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + lane_head * CHANNELS + channel, out, mask=inside)


@triton.jit
def store_newborn(
    k_own,  # [channel]
    v_own,  # [channel] in float32
    keys,  # these and the following: the lane's head's
    values,
    value_ranges,
    far_keys,
    far_values,
    far_value_ranges,
    key_ranges,  # [channel], at the first group's
    waiting_keys,
    left_behind,
    items,  # tokens before the newborn one
    capacity,
    far_capacity,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FREEZE: tl.constexpr,
    WIDTH: tl.constexpr,
    FAR: tl.constexpr,
):
    """Store one head's newborn token; freeze the group that it completes. Its key and value, as attention reads them."""
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    waiting = items % GROUP
    frozen = items - waiting

    # the newborn value
    v_low, v_step = range_of(
        tl.min(tl.where(inside, v_own, float("inf")), 0), tl.max(tl.where(inside, v_own, float("-inf")), 0)
    )
    v_levels = levels_of(v_own, v_low, v_step)
    near = items < capacity
    tl.store(values + items * CHANNELS + channel, v_levels.to(tl.uint8), mask=inside & near)
    tl.store(value_ranges + items, v_low.to(tl.float16), mask=near)
    tl.store(value_ranges + capacity + items, v_step.to(tl.float16), mask=near)
    if FAR:
        own_far = items - capacity
        tl.store(far_values + own_far * CHANNELS + channel, v_levels.to(tl.uint8), mask=inside & (own_far >= 0))
        tl.store(far_value_ranges + own_far, v_low.to(tl.float16), mask=own_far >= 0)
        tl.store(far_value_ranges + far_capacity + own_far, v_step.to(tl.float16), mask=own_far >= 0)

    # the newborn key: it waits, or its group is frozen with it
    k_wide = k_own.to(tl.float32)
    if waiting == GROUP - 1:
        least, most = k_wide, k_wide
        for first in range(0, waiting, FREEZE):
            member = first + tl.arange(0, FREEZE)
            mask = (member < waiting)[:, None] & inside[None, :]
            k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
            k = k.to(tl.float32)
            least = tl.minimum(least, tl.min(tl.where(mask, k, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(mask, k, float("-inf")), 0))
        k_low, k_step = range_of(least, most)
        new_range = key_ranges + frozen // GROUP * 2 * CHANNELS
        tl.store(new_range, k_low.to(tl.float16), mask=inside)
        tl.store(new_range + CHANNELS, k_step.to(tl.float16), mask=inside)
        own_levels = levels_of(k_wide, k_low, k_step)
        k_wide = own_levels * k_step + k_low
        own_stored = own_levels.to(tl.uint8)
        tl.store(keys + items * CHANNELS + channel, own_stored, mask=inside & near)
        if FAR:
            own_place = left_behind + waiting * WIDTH * CHANNELS + channel
            tl.store(far_keys + own_far * CHANNELS + channel, own_stored, mask=inside & (own_far >= 0))
            tl.store(own_place, own_stored, mask=inside)
            tl.store(own_place + CHANNELS, v_levels.to(tl.uint8), mask=inside)
        for first in range(0, waiting, FREEZE):
            member = first + tl.arange(0, FREEZE)
            item, waits = frozen + member, member < waiting
            mask = waits[:, None] & inside[None, :]
            k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
            levels = levels_of(k.to(tl.float32), k_low[None, :], k_step[None, :]).to(tl.uint8)
            here = mask & (item < capacity)[:, None]
            tl.store(keys + item[:, None] * CHANNELS + channel[None, :], levels, mask=here)
            if FAR:
                away = mask & (item >= capacity)[:, None]
                far_at = (item - capacity)[:, None] * CHANNELS + channel[None, :]
                tl.store(far_keys + far_at, levels, mask=away)
                v = tl.load(far_values + far_at, mask=away, other=0)
                tl.debug_barrier()  # every thread has read the keys that are overwritten now
                to = left_behind + (member * WIDTH * CHANNELS)[:, None] + channel[None, :]
                tl.store(to, levels, mask=away)
                tl.store(to + CHANNELS, v, mask=away)
    else:
        tl.store(waiting_keys + waiting * CHANNELS + channel, k_own, mask=inside)
    return k_wide, v_levels * v_step + v_low

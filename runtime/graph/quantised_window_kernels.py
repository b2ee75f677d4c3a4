"""Triton kernels of sparse window attention over INT8 levels. Imported only where a GPU runs them.

A *row* is a lane of a layer. Keys of the open group wait in the compute type, each in the row of its place in the group.
"""

import triton
import triton.language as tl

from runtime.graph.kernels import change_places, row_starts
from runtime.graph.quantised_kernels import fold_levels, levels_of, range_of


@triton.jit
def attend(
    q_rows,  # [lane, head, channel], lanes ``row_stride`` apart; keys and values of the newborn token likewise
    k_rows,
    v_rows,
    keys,  # [lane, head, slot, channel] levels
    values,
    value_ranges,  # [lane, head, slot, 2]: least and step
    far_keys,  # [lane, slot, head, channel] levels in pinned memory: slots from ``capacity`` on
    far_values,  # where STAGED; likewise the next four
    far_ranges,
    staged_keys,  # [lane, head, row, channel]: slots from ``capacity`` on, and those beyond are in pinned memory
    staged_values,
    staged_ranges,
    key_ranges,  # [lane, head, group, 2, channel]
    waiting_keys,  # [lane, head, group token, channel]
    slots,  # [lane, width]: what each lane attends to, its newborn token last; -1: padding
    items_of,  # [lane]
    tokens,  # [lane, width]: positions of what ``slots`` lists
    turns,  # [lane, group token]: where in the list a token of the open group comes, -1: nowhere
    homes,  # [lane, group token]: its slot, -1: dead
    cached,  # [1]
    attended,  # [lane, head, channel]
    scores,  # [lane, head, width], before the softmax; peaks and sums: [lane, head]
    peaks,
    sums,
    followed,  # [lane]: keys that were frozen on the host
    scale,
    row_stride,
    heads,
    capacity,
    far_capacity,
    staged_rows,
    width,
    groups,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    FREEZE: tl.constexpr,  # keys that are frozen at once
    STAGED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One query head over its lane's list: stores the newborn token, freezes the group that it completes, reads the rest.

    Where STAGED, rows were gathered before that group had levels: of what is not in HBM its keys are taken as they waited.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    newborn = tl.load(cached) - 1
    items = tl.load(items_of + lane) - 1
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * row_stride + head * CHANNELS + channel
    q = tl.load(q_rows + own_row, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32)
    lane_head = lane * heads + head
    keys += lane_head * capacity * CHANNELS
    values += lane_head * capacity * CHANNELS
    value_ranges += lane_head * capacity * 2
    key_ranges += lane_head * groups * 2 * CHANNELS
    waiting_keys += lane_head * GROUP * CHANNELS
    slots += lane * width
    tokens += lane * width
    turns += lane * GROUP
    homes += lane * GROUP
    scores += lane_head * width

    far_head = lane * far_capacity * heads + head
    far_keys += far_head * CHANNELS
    if STAGED:
        far_values += far_head * CHANNELS
        far_ranges += far_head * 2
        staged_keys += lane_head * staged_rows * CHANNELS
        staged_values += lane_head * staged_rows * CHANNELS
        staged_ranges += lane_head * staged_rows * 2
    k_wide, v_wide, moved = bear(
        k_own,
        v_own,
        tl.load(slots + items),
        newborn,
        keys,
        values,
        value_ranges,
        far_keys,
        key_ranges,
        waiting_keys,
        homes,
        capacity,
        heads * CHANNELS,
        GROUP,
        CHANNELS,
        PADDED,
        FREEZE,
    )
    tl.store(followed + lane, moved, mask=head == 0)
    tl.debug_barrier()  # levels and ranges are read below by other threads
    waiting = (newborn + 1) % GROUP  # the newborn token's key among them
    opened = newborn + 1 - waiting
    others = (
        newborn % GROUP if STAGED else waiting - 1
    )  # keys that wait, or did before this step, the newborn one's aside
    own = tl.sum(q * k_wide, 0)
    peak, total, mixed = own, own * 0.0 + 1.0, v_wide

    for first in range(0, items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        slot = tl.load(slots + item, mask=item < items, other=-1)
        token = tl.load(tokens + item, mask=item < items, other=opened)
        frozen = token < opened
        if STAGED:
            frozen = frozen & ((token < newborn - others) | (slot < capacity))
        there = frozen & (slot >= 0)
        mask = there[:, None] & inside[None, :]
        # fmt: off
        k = take_rows(
            keys, staged_keys, far_keys, slot, channel, mask, capacity, staged_rows, heads, CHANNELS, STAGED,
        )
        v = take_rows(
            values, staged_values, far_values, slot, channel, mask, capacity, staged_rows, heads, CHANNELS, STAGED,
        )
        low_v, step_v = take_ranges(
            value_ranges, staged_ranges, far_ranges, slot, there, capacity, staged_rows, heads, STAGED,
        )
        # fmt: on
        ranges = key_ranges + (token // GROUP)[:, None] * (2 * CHANNELS) + channel[None, :]
        low = tl.load(ranges, mask=mask, other=0.0).to(tl.float32)
        step = tl.load(ranges + CHANNELS, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(q[None, :] * (k.to(tl.float32) * step + low), 1)
        score = tl.where(there, score, float("-inf"))
        tl.store(scores + item, score, mask=frozen)
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    for first in range(0, others, BLOCK):
        member = first + tl.arange(0, BLOCK)
        turn = tl.load(turns + member, mask=member < others, other=-1)
        slot = tl.load(slots + turn, mask=turn >= 0, other=-1)
        if STAGED:
            turn = tl.where((waiting > 0) | (slot >= capacity), turn, -1)  # others of a group just frozen are done
            slot = tl.where(turn >= 0, slot, -1)
        there = slot >= 0
        mask = there[:, None] & inside[None, :]
        k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        # fmt: off
        v = take_rows(
            values, staged_values, far_values, slot, channel, mask, capacity, staged_rows, heads, CHANNELS, STAGED,
        )
        low_v, step_v = take_ranges(
            value_ranges, staged_ranges, far_ranges, slot, there, capacity, staged_rows, heads, STAGED,
        )
        # fmt: on
        score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        tl.store(scores + turn, score, mask=turn >= 0)
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    tl.store(scores + items, own)
    tl.store(peaks + lane_head, peak)
    tl.store(sums + lane_head, total)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + lane_head * CHANNELS + channel, out, mask=inside)


@triton.jit
def take_rows(
    near,  # of one head: [slot, channel]
    staged,  # [row, channel]
    far,  # [slot, channel] in pinned memory, as many heads apart
    slot,
    channel,
    mask,
    capacity,
    staged_rows,
    heads,
    CHANNELS: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Levels of ``slot``, wherever they lie."""
    if STAGED:
        row = row_starts(near, staged, far, slot, capacity, staged_rows, heads, CHANNELS)
        levels = tl.load(row[:, None] + channel[None, :], mask=mask, other=0)
    else:
        levels = tl.load(near + slot[:, None] * CHANNELS + channel[None, :], mask=mask, other=0)
    return levels


@triton.jit
def take_ranges(near, staged, far, slot, there, capacity, staged_rows, heads, STAGED: tl.constexpr):
    """Least and step of their values."""
    at = near + slot * 2
    if STAGED:
        at = row_starts(near, staged, far, slot, capacity, staged_rows, heads, 2)
    return tl.load(at, mask=there, other=0.0), tl.load(at + 1, mask=there, other=0.0)


@triton.jit
def bear(
    k_own,  # [channel]; values in float32
    v_own,
    own_slot,
    newborn,
    keys,  # [slot, channel] levels
    values,
    value_ranges,
    far_keys,
    key_ranges,
    waiting_keys,
    homes,
    capacity,
    far_stride,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FREEZE: tl.constexpr,
):
    """Store one head's newborn token; freeze the group that it completes. Gives key and value as they are stored, in
    float32, and how many keys were frozen on the host.
    """
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    low, step = range_of(
        tl.min(tl.where(inside, v_own, float("inf")), 0), tl.max(tl.where(inside, v_own, float("-inf")), 0)
    )
    levels = levels_of(v_own, low, step)
    tl.store(values + own_slot * CHANNELS + channel, levels.to(tl.uint8), mask=inside)
    tl.store(value_ranges + own_slot * 2, low.to(tl.float16))
    tl.store(value_ranges + own_slot * 2 + 1, step.to(tl.float16))
    waiting = newborn % GROUP
    tl.store(waiting_keys + waiting * CHANNELS + channel, k_own, mask=inside)
    k_wide, moved = k_own.to(tl.float32), newborn * 0
    if waiting == GROUP - 1:
        tl.debug_barrier()  # the newborn key is read with the others
        ranges = key_ranges + newborn // GROUP * 2 * CHANNELS
        k_low, k_step, moved = freeze(
            waiting_keys, ranges, homes, keys, far_keys, capacity, far_stride, GROUP, CHANNELS, PADDED, FREEZE
        )
        k_wide = levels_of(k_wide, k_low, k_step) * k_step + k_low
    return k_wide, levels * step + low, moved


@triton.jit
def freeze(
    waiting_keys,  # [group token, channel], all of them there
    ranges,  # [2, channel]
    homes,  # [group token]: slots, -1: dead
    keys,  # [slot, channel] levels
    far_keys,  # the same in pinned memory, slots ``far_stride`` apart: those from ``capacity`` on
    capacity,
    far_stride,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    FREEZE: tl.constexpr,
):
    """One head's group: ranges by all its keys, the dead ones' too, levels of those that live; how many are on the host."""
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    least = tl.full([PADDED], float("inf"), tl.float32)
    most = tl.full([PADDED], float("-inf"), tl.float32)
    for first in range(0, GROUP, FREEZE):
        member = first + tl.arange(0, FREEZE)
        k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=inside[None, :], other=0.0)
        least = tl.minimum(least, tl.min(k.to(tl.float32), 0))
        most = tl.maximum(most, tl.max(k.to(tl.float32), 0))
    low, step = range_of(least, most)
    tl.store(ranges + channel, low.to(tl.float16), mask=inside)
    tl.store(ranges + CHANNELS + channel, step.to(tl.float16), mask=inside)
    moved = tl.full([], 0, tl.int32)
    for first in range(0, GROUP, FREEZE):
        member = first + tl.arange(0, FREEZE)
        slot = tl.load(homes + member)
        k = tl.load(waiting_keys + member[:, None] * CHANNELS + channel[None, :], mask=inside[None, :], other=0.0)
        levels = levels_of(k.to(tl.float32), low[None, :], step[None, :]).to(tl.uint8)
        near, far = (slot >= 0) & (slot < capacity), slot >= capacity
        here = keys + slot[:, None] * CHANNELS + channel[None, :]
        tl.store(here, levels, mask=near[:, None] & inside[None, :])
        away = far_keys + (slot - capacity).to(tl.int64)[:, None] * far_stride + channel[None, :]
        tl.store(away, levels, mask=far[:, None] & inside[None, :])
        moved += tl.sum(far.to(tl.int32), 0)
    return low, step, moved


@triton.jit(do_not_specialize=["first_row"])
def name(
    ranks,  # [row, entry], as ``kernels.settle`` leaves them
    position,
    place,
    tokens,  # [row, width]: positions of what the lists name
    turns,  # [row, group token]: of the newborn token's group, places in the list
    homes,  # [row, group token]: and slots
    newborn,  # [1]: its position
    first_row,
    entries,
    width,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """What a step needs to know of its lists beside slots."""
    row = first_row + tl.program_id(0).to(tl.int64)
    member = tl.arange(0, GROUP)
    tl.store(turns + row * GROUP + member, member * 0 - 1)
    tl.store(homes + row * GROUP + member, member * 0 - 1)
    tl.debug_barrier()  # some are overwritten by other threads
    entry = tl.arange(0, ENTRIES)
    inside = entry < entries
    at = row * entries + entry
    rank = tl.load(ranks + at, mask=inside, other=-1)
    token = tl.load(position + at, mask=inside, other=-1)
    slot = tl.load(place + at, mask=inside, other=0)
    tl.store(tokens + row * width + rank, token, mask=rank >= 0)
    opened = tl.load(newborn) // GROUP * GROUP
    waits = token >= opened
    tl.store(turns + row * GROUP + token - opened, rank, mask=waits)
    tl.store(homes + row * GROUP + token - opened, slot, mask=waits)


@triton.jit
def exchange(
    moves,  # as ``kernels.exchange``'s
    move_counts,
    keys,  # [lane, head, slot, channel] levels
    values,
    value_ranges,  # [lane, head, slot], both numbers in one
    host_keys,  # the same in pinned memory, slots before heads
    host_values,
    host_value_ranges,
    lanes,
    heads,
    hbm_slots,
    host_slots,
    entries,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """As ``kernels.exchange``; of keys that wait, what was in their slots goes with their values."""
    channel = tl.arange(0, PADDED)
    for lane in range(tl.program_id(0).to(tl.int64), lanes, tl.num_programs(0)):
        for move in range(tl.load(move_counts + lane)):
            what = moves + (lane * entries + move) * 4
            near, far = tl.load(what), tl.load(what + 1)
            returns, leaves = tl.load(what + 2) > 0, tl.load(what + 3) > 0
            for first in range(0, heads, HEADS):
                head = first + tl.arange(0, HEADS)
                some = head < heads
                inside = some[:, None] & (channel < CHANNELS)[None, :]
                here = (lane * heads + head) * hbm_slots + near
                there = (lane * host_slots + far) * heads + head
                near_at = here[:, None] * CHANNELS + channel[None, :]
                far_at = there[:, None] * CHANNELS + channel[None, :]
                range_out = tl.load(value_ranges + here, mask=some & leaves, other=0)
                range_in = tl.load(host_value_ranges + there, mask=some & returns, other=0)
                change_places(keys, values, near_at, host_keys, host_values, far_at, inside & leaves, inside & returns)
                tl.store(host_value_ranges + there, range_out, mask=some & leaves)
                tl.store(value_ranges + here, range_in, mask=some & returns)

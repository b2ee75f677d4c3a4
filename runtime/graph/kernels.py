"""Triton kernels of a decode step. Imported only where a GPU runs them: machines without one may lack Triton.

A lane is a sequence. Keys and values lie as [lane, head, slot, channel], so that a head's rows are neighbours.
"""

import triton
import triton.language as tl

from runtime.graph.choosing_kernels import bury, wanted_next


@triton.jit
def attend(
    q_rows,  # [lane, head, channel], lanes ``row_stride`` apart; keys and values of the newborn token likewise
    k_rows,
    v_rows,
    keys,
    values,
    slots,  # [lane, width]: what each lane attends to, its newborn token last; -1: padding. Unused where not LISTED
    counts,  # [lane] items, or one for all lanes (``count_stride`` 0)
    padding,  # [lane]
    attended,  # [lane, head, channel]
    far_keys,  # in pinned memory: slots from ``capacity`` on, where FAR [lane, head, slot, channel]
    far_values,
    staged_keys,  # where STAGED, [lane, head, row, channel]: slots from ``capacity`` on; those beyond are in pinned memory,
    staged_values,  # there [lane, slot, head, channel]
    scores,  # [lane, head, width], before the softmax; with their peaks and sums, [lane, head], where WEIGHED
    peaks,
    sums,
    scale,
    row_stride,
    count_stride,
    heads,
    capacity,
    far_capacity,
    staged_rows,
    width,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHED: tl.constexpr,
    FAR: tl.constexpr,
    STAGED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One query head over its lane's slots: stores the newborn token's row, reads every other row once."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * row_stride + head * CHANNELS + channel
    items = tl.load(counts + lane * count_stride) - 1
    own_slot = items
    if LISTED:
        own_slot = tl.load(slots + lane * width + items)
    first_real = tl.load(padding + lane)
    if CHAINED:  # starts with nothing before it running: early programs would crowd the few SMs that are free by then
        tl.extra.cuda.gdc_launch_dependents()
    q = tl.load(q_rows + own_row, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0)
    lane_head = lane * heads + head
    base = lane_head * capacity * CHANNELS
    far_base = lane_head * far_capacity * CHANNELS
    near = inside & (own_slot < capacity)
    tl.store(keys + base + own_slot * CHANNELS + channel, k_own, mask=near)
    tl.store(values + base + own_slot * CHANNELS + channel, v_own, mask=near)
    if FAR:
        far = inside & (own_slot >= capacity)
        tl.store(far_keys + far_base + (own_slot - capacity) * CHANNELS + channel, k_own, mask=far)
        tl.store(far_values + far_base + (own_slot - capacity) * CHANNELS + channel, v_own, mask=far)
    own = tl.sum(q * k_own.to(tl.float32), 0)
    peak, total, mixed = own, own * 0.0 + 1.0, v_own.to(tl.float32)
    near_items = tl.minimum(items, capacity) if FAR else items
    for first in range(0, near_items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        if LISTED:
            slot = tl.load(slots + lane * width + item, mask=item < items, other=-1)
            there = slot >= 0
        else:
            slot = item
            there = (item < near_items) & (item >= first_real)
        mask = there[:, None] & inside[None, :]
        if STAGED:
            staged, host = lane_head * staged_rows * CHANNELS, (lane * far_capacity * heads + head) * CHANNELS
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
            at = base + slot[:, None] * CHANNELS + channel[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
        score = tl.sum(q[None, :] * k.to(tl.float32), 1)
        score = tl.where(there, score, float("-inf"))
        if WEIGHED:
            tl.store(scores + lane_head * width + item, score, mask=item < items)
        higher = tl.maximum(peak, tl.max(score, 0))
        share = tl.exp(score - higher)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(share, 0)
        mixed = mixed * shrink + tl.sum(share[:, None] * v.to(tl.float32), 0)
        peak = higher
    if FAR:
        for first in range(capacity, items, BLOCK):
            item = first + tl.arange(0, BLOCK)
            there = (item < items) & (item >= first_real)
            at = far_base + (item - capacity)[:, None] * CHANNELS + channel[None, :]
            mask = there[:, None] & inside[None, :]
            k = tl.load(far_keys + at, mask=mask, other=0.0)
            v = tl.load(far_values + at, mask=mask, other=0.0)
            score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 0))
            share = tl.exp(score - higher)
            shrink = tl.exp(peak - higher)
            total = total * shrink + tl.sum(share, 0)
            mixed = mixed * shrink + tl.sum(share[:, None] * v.to(tl.float32), 0)
            peak = higher
    if WEIGHED:
        tl.store(scores + lane_head * width + items, own)
        tl.store(peaks + lane_head, peak)
        tl.store(sums + lane_head, total)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + lane_head * CHANNELS + channel, out, mask=inside)


@triton.jit
def row_starts(near, staged, host, slot, capacity, staged_rows, heads, CHANNELS: tl.constexpr):
    """Where the rows of a head's ``slot`` begin: of HBM, among those that were fetched or, beyond these, on the host."""
    beyond = slot.to(tl.int64) - capacity
    fetched = staged + beyond * CHANNELS
    away = host + (beyond - staged_rows) * heads * CHANNELS
    return tl.where(beyond < 0, near + slot.to(tl.int64) * CHANNELS, tl.where(beyond < staged_rows, fetched, away))


@triton.jit(do_not_specialize=["width", "queries", "entries"])
def settle(
    scores,
    peaks,
    sums,
    ranks,  # [lane, entry]: place in the lane's list, -1 where not attended
    slots,
    counts,
    position,  # [lane, entry]: the token that an entry stands for, -1: none
    last,  # [lane, entry]: the row that last attended to it
    place,  # [lane, entry]: its slot; from ``hbm_slots`` on they lie on the host
    ring,  # [lane, query position mod ``queries``, entry]: weights, heads summed
    padding,
    row,
    table,  # [5, rows + 1]: cached, local, selected, newly dead, history
    moves,  # [lane, entry, 4]: HBM slot, host slot, whether to read the host, whether to write it
    move_counts,
    heads,
    width,
    queries,
    entries,
    rows,
    hbm_slots,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """After a step's attention: what the next one attends to, who dies, where the next token goes, what must move.

    Compiled for any number of entries alike: for multiples of 16, told as such, it took an H200 53 us where others took 29.
    """
    lane = tl.program_id(0).to(tl.int64)
    now = tl.load(row)
    cached = tl.load(table + now)
    near = tl.load(table + rows + now + 1)
    far = tl.load(table + 2 * rows + now + 1)
    dying = tl.load(table + 3 * rows + now + 1)
    history = tl.load(table + 4 * rows + now + 1)
    entry = tl.arange(0, ENTRIES)
    inside = entry < entries
    mine = lane * entries + entry
    held = tl.load(ranks + mine, mask=inside, other=-1)
    pos = tl.load(position + mine, mask=inside, other=-1)
    seen = tl.load(last + mine, mask=inside, other=-1)
    where_ = tl.load(place + mine, mask=inside, other=0)
    real = pos >= tl.load(padding + lane)
    most: tl.constexpr = 2147483647

    # fmt: off
    wanted = wanted_next(
        scores, peaks, sums, ring, lane, entry, inside, held, pos, real,
        cached, near, far, history, heads, width, queries, entries, ENTRIES, CHUNK,
    )
    # fmt: on
    seen = tl.where(wanted, now + 1, seen)

    # the one attended to the longest ago dies, the next token takes a free entry, in HBM if there is one
    pos = bury(pos, seen, dying)
    vacant = tl.where(inside & (pos < 0), tl.where(where_ >= hbm_slots, 65536, 0) + entry, most)
    born = (vacant == tl.min(vacant, 0)) & (vacant < most)
    pos = tl.where(born, cached, pos)
    seen = tl.where(born, now + 1, seen)
    wanted = wanted | born

    # what is wanted and lies on the host changes places with what HBM needs least
    returning = wanted & (where_ >= hbm_slots)
    moving = tl.sum(returning.to(tl.int32), 0)
    for move in range(moving):
        comes = entry == tl.min(tl.where(returning, entry, most), 0)
        spare = inside & (where_ < hbm_slots) & (wanted == 0)
        rank = tl.where(spare, tl.where(pos < 0, entry - 1073741824, seen * 65536 + pos), most)
        goes = spare & (rank == tl.min(rank, 0))
        on_host = tl.sum(tl.where(comes, where_, 0), 0)
        in_hbm = tl.sum(tl.where(goes, where_, 0), 0)
        where_ = tl.where(comes, in_hbm, tl.where(goes, on_host, where_))
        to = moves + (lane * entries + move) * 4
        tl.store(to, in_hbm)
        tl.store(to + 1, on_host - hbm_slots)
        tl.store(to + 2, tl.sum((comes & (born == 0)).to(tl.int32), 0))
        tl.store(to + 3, tl.sum((goes & (pos >= 0)).to(tl.int32), 0))
        returning = returning & (comes == 0)
    tl.store(move_counts + lane, moving)

    # the next step's list, its newborn token last
    others = wanted & (born == 0)
    items = tl.sum(others.to(tl.int32), 0)
    rank = tl.where(born, items, tl.where(others, tl.cumsum(others.to(tl.int32), 0) - 1, -1))
    real = pos >= tl.load(padding + lane)
    tl.store(slots + lane * width + rank, tl.where(real, where_, -1), mask=wanted)
    tl.store(counts + lane, items + 1)
    tl.store(ranks + mine, rank, mask=inside)
    tl.store(position + mine, pos, mask=inside)
    tl.store(last + mine, seen, mask=inside)
    tl.store(place + mine, where_, mask=inside)


@triton.jit
def exchange(
    moves,
    move_counts,
    keys,
    values,
    host_keys,  # [lane, slot, head, channel] in pinned memory: a token's heads are neighbours
    host_values,
    lanes,
    heads,
    hbm_slots,
    host_slots,
    entries,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Tokens change places between HBM and the host; each program moves those of every so-many-th lane, one after the other:
    few programs leave the link's queue, and the SMs, to others.
    """
    channel = tl.arange(0, PADDED)
    for lane in range(tl.program_id(0).to(tl.int64), lanes, tl.num_programs(0)):
        for move in range(tl.load(move_counts + lane)):
            what = moves + (lane * entries + move) * 4
            near, far = tl.load(what), tl.load(what + 1)
            returns, leaves = tl.load(what + 2) > 0, tl.load(what + 3) > 0
            for first in range(0, heads, HEADS):
                head = first + tl.arange(0, HEADS)
                inside = (head < heads)[:, None] & (channel < CHANNELS)[None, :]
                here = ((lane * heads + head) * hbm_slots + near)[:, None] * CHANNELS + channel[None, :]
                there = ((lane * host_slots + far) * heads + head)[:, None] * CHANNELS + channel[None, :]
                change_places(keys, values, here, host_keys, host_values, there, inside & leaves, inside & returns)


@triton.jit
def change_places(keys, values, here, host_keys, host_values, there, leaves, returns):
    """What ``leaves`` goes from ``here`` in HBM to ``there`` on the host, what ``returns`` the other way: all read before any is
    written.
    """
    k_out, v_out = tl.load(keys + here, mask=leaves, other=0), tl.load(values + here, mask=leaves, other=0)
    k_in, v_in = tl.load(host_keys + there, mask=returns, other=0), tl.load(host_values + there, mask=returns, other=0)
    tl.store(host_keys + there, k_out, mask=leaves)
    tl.store(host_values + there, v_out, mask=leaves)
    tl.store(keys + here, k_in, mask=returns)
    tl.store(values + here, v_in, mask=returns)

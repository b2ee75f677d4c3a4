"""Triton kernels over pages. Imported only where a GPU runs them: machines without one may lack Triton.

A (page, head) is a block [2, page token, channel]: keys, then values. A lane's row of ``state`` says what it does in this
step: tokens with the newborn one (0: nothing), sequence, padding, then its pages in order. Where a group of query heads
shares a key head, each of its programs reads the same pages; what more than one stores is the same.
"""

import triton
import triton.language as tl

from runtime.graph.quantised_kernels import fold_levels, fold_native, levels_of, near_fp8, range_of, score_levels


@triton.jit
def attend(
    q_rows,  # [lane, query head, channel], lanes ``q_stride`` apart; [lane, head, channel] of the newborn token likewise
    k_rows,
    v_rows,
    blocks,  # [page, head, 2, page token, channel] in the compute type, or in FP8 where EIGHT_BIT
    state,  # [lane, columns]
    attended,  # [lane, query head, channel]
    scale,
    q_stride,
    kv_stride,
    columns,
    heads,
    TABLE: tl.constexpr,  # first column of the pages
    PAGE: tl.constexpr,
    GROUPED: tl.constexpr,  # query heads of a key head
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One query head over its lane's pages: stores the newborn token's row, reads every other row once."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    lane, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = query // GROUPED
    row = state + lane * columns
    items = tl.load(row) - 1
    if items < 0:
        return
    first_real, table = tl.load(row + 2), row + TABLE
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * kv_stride + head * CHANNELS + channel
    q = tl.load(q_rows + lane * q_stride + query * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0).to(tl.float32)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0).to(tl.float32)
    if EIGHT_BIT:
        k_own, v_own = near_fp8(k_own), near_fp8(v_own)
    k_kept, v_kept = k_own.to(blocks.dtype.element_ty), v_own.to(blocks.dtype.element_ty)
    block: tl.constexpr = 2 * PAGE * CHANNELS
    own = (tl.load(table + items // PAGE).to(tl.int64) * heads + head) * block + items % PAGE * CHANNELS + channel
    tl.store(blocks + own, k_kept, mask=inside)
    tl.store(blocks + own + PAGE * CHANNELS, v_kept, mask=inside)
    score_own = tl.sum(q * k_kept.to(tl.float32), 0)
    peak, total, mixed = score_own, score_own * 0.0 + 1.0, v_kept.to(tl.float32)
    for first in range(first_real // BLOCK * BLOCK, items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        there = (item < items) & (item >= first_real)
        page = tl.load(table + item // PAGE, mask=there, other=0).to(tl.int64)
        at = ((page * heads + head) * block + item % PAGE * CHANNELS)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(blocks + at, mask=mask, other=0.0)
        v = tl.load(blocks + at + PAGE * CHANNELS, mask=mask, other=0.0)
        score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        peak, total, mixed = fold_native(peak, total, mixed, score, v)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + (lane * heads * GROUPED + query) * CHANNELS + channel, out, mask=inside)


@triton.jit
def attend_int8(
    q_rows,
    k_rows,
    v_rows,
    blocks,  # [page, head, 2, page token, channel] levels
    native,  # the same memory as the compute type: the pages of open groups, PER tokens a (page, head)
    key_ranges,  # [page, head, 2, QUARTER]: least and step of some channels; a group's pages hold a share each
    value_ranges,  # [page, head, 2, page token]
    state,
    attended,
    scale,
    q_stride,
    kv_stride,
    columns,
    heads,
    open_column,  # of ``state``: first of the pages that hold the open group's keys
    TABLE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    QUARTER: tl.constexpr,
    PER: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    FREEZE: tl.constexpr,  # keys that are frozen at once
    CHAINED: tl.constexpr,
):
    """As ``attend``. Keys wait in the compute type until the newborn token completes their group, which is then frozen."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    lane, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = query // GROUPED
    row = state + lane * columns
    items = tl.load(row) - 1
    if items < 0:
        return
    first_real, table, open_table = tl.load(row + 2), row + TABLE, row + open_column
    waiting = items % GROUP  # keys of the open group, without the newborn one
    frozen = items - waiting
    closes = waiting == GROUP - 1
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    own_row = lane * kv_stride + head * CHANNELS + channel
    q = tl.load(q_rows + lane * q_stride + query * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own_row, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own_row, mask=inside, other=0.0)
    block: tl.constexpr = 2 * PAGE * CHANNELS
    whole: tl.constexpr = PER * CHANNELS

    # the newborn value
    own_block = tl.load(table + items // PAGE).to(tl.int64) * heads + head
    v_low, v_step = range_of(
        tl.min(tl.where(inside, v_own.to(tl.float32), float("inf")), 0),
        tl.max(tl.where(inside, v_own.to(tl.float32), float("-inf")), 0),
    )
    v_levels = levels_of(v_own.to(tl.float32), v_low, v_step)
    own = blocks + own_block * block + items % PAGE * CHANNELS + channel
    tl.store(own + PAGE * CHANNELS, v_levels.to(tl.uint8), mask=inside)
    tl.store(value_ranges + own_block * 2 * PAGE + items % PAGE, v_low.to(tl.float16))
    tl.store(value_ranges + own_block * 2 * PAGE + PAGE + items % PAGE, v_step.to(tl.float16))

    # the newborn key: it waits, or its group is frozen with it
    k_wide, end = k_own.to(tl.float32), frozen
    if closes:
        least, most = k_wide, k_wide
        for first in range(0, waiting, FREEZE):
            member = first + tl.arange(0, FREEZE)
            page = tl.load(open_table + member // PER, mask=member < waiting, other=0).to(tl.int64)
            at = ((page * heads + head) * whole + member % PER * CHANNELS)[:, None] + channel[None, :]
            mask = (member < waiting)[:, None] & inside[None, :]
            k = tl.load(native + at, mask=mask, other=0.0).to(tl.float32)
            least = tl.minimum(least, tl.min(tl.where(mask, k, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(mask, k, float("-inf")), 0))
        k_low, k_step = range_of(least, most)
        holder = tl.load(table + frozen // PAGE + channel // QUARTER, mask=inside, other=0).to(tl.int64)
        to = key_ranges + (holder * heads + head) * 2 * QUARTER + channel % QUARTER
        tl.store(to, k_low.to(tl.float16), mask=inside)
        tl.store(to + QUARTER, k_step.to(tl.float16), mask=inside)
        own_levels = levels_of(k_wide, k_low, k_step)
        tl.store(own, own_levels.to(tl.uint8), mask=inside)
        k_wide = own_levels * k_step + k_low
        for first in range(0, waiting, FREEZE):
            member = first + tl.arange(0, FREEZE)
            page = tl.load(open_table + member // PER, mask=member < waiting, other=0).to(tl.int64)
            at = ((page * heads + head) * whole + member % PER * CHANNELS)[:, None] + channel[None, :]
            mask = (member < waiting)[:, None] & inside[None, :]
            k = tl.load(native + at, mask=mask, other=0.0).to(tl.float32)
            levels = levels_of(k, k_low[None, :], k_step[None, :])
            item = frozen + member
            page = tl.load(table + item // PAGE, mask=member < waiting, other=0).to(tl.int64)
            at = ((page * heads + head) * block + item % PAGE * CHANNELS)[:, None] + channel[None, :]
            tl.store(blocks + at, levels.to(tl.uint8), mask=mask)
        tl.debug_barrier()  # levels and ranges are read below by other threads
        end, waiting = items, 0
    else:
        page = tl.load(open_table + waiting // PER).to(tl.int64)
        tl.store(native + (page * heads + head) * whole + waiting % PER * CHANNELS + channel, k_own, mask=inside)
    score_own = tl.sum(q * k_wide, 0)
    peak, total, mixed = score_own, score_own * 0.0 + 1.0, v_levels * v_step + v_low

    for first in range(first_real // BLOCK * BLOCK, end, BLOCK):
        holder = tl.load(table + first // GROUP * (GROUP // PAGE) + channel // QUARTER, mask=inside, other=0)
        at = key_ranges + (holder.to(tl.int64) * heads + head) * 2 * QUARTER + channel % QUARTER
        low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(at + QUARTER, mask=inside, other=0.0).to(tl.float32)
        item = first + tl.arange(0, BLOCK)
        there = (item >= first_real) & (item < end)
        member = tl.load(table + item // PAGE, mask=there, other=0).to(tl.int64) * heads + head
        at = (member * block + item % PAGE * CHANNELS)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(blocks + at, mask=mask, other=0)
        v = tl.load(blocks + at + PAGE * CHANNELS, mask=mask, other=0)
        at = value_ranges + member * 2 * PAGE + item % PAGE
        low_v, step_v = tl.load(at, mask=there, other=0.0), tl.load(at + PAGE, mask=there, other=0.0)
        score = tl.where(there, score_levels(q, low, step, k), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)

    for first in range(0, waiting, BLOCK):
        member = first + tl.arange(0, BLOCK)
        item = frozen + member
        there = (member < waiting) & (item >= first_real)
        page = tl.load(open_table + member // PER, mask=there, other=0).to(tl.int64)
        at = ((page * heads + head) * whole + member % PER * CHANNELS)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(native + at, mask=mask, other=0.0)
        place = tl.load(table + item // PAGE, mask=there, other=0).to(tl.int64) * heads + head
        at = (place * block + item % PAGE * CHANNELS)[:, None] + channel[None, :]
        v = tl.load(blocks + at + PAGE * CHANNELS, mask=mask, other=0)
        at = value_ranges + place * 2 * PAGE + item % PAGE
        low_v, step_v = tl.load(at, mask=there, other=0.0), tl.load(at + PAGE, mask=there, other=0.0)
        score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        peak, total, mixed = fold_levels(peak, total, mixed, score, v, low_v, step_v)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + (lane * heads * GROUPED + query) * CHANNELS + channel, out, mask=inside)


@triton.jit
def carry(source, target, pairs, source_pages, target_pages, words, BLOCK: tl.constexpr):
    """A part of a page in a layer [layer, page, word]: ``pairs`` [entry, 2] are pages read and written, one side the host's."""
    pair, layer = pairs + 2 * tl.program_id(0), tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    moved = tl.load(source + (layer * source_pages + tl.load(pair)) * words + word, mask=word < words)
    tl.store(target + (layer * target_pages + tl.load(pair + 1)) * words + word, moved, mask=word < words)

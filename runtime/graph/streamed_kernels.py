"""Triton kernel of attention over tokens in three places. Imported only where a GPU runs it, or interpreted.

Everywhere a token's row is [lane, key or value, key head, channel], and a token's rows of all lanes are neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def _add(q, peak, total, mixed, rows, value_offset, there, mask):
    """Add the tokens at ``rows`` to a softmax whose highest score, sum and weighted values are known so far."""
    k = tl.load(rows, mask=mask, other=0.0)
    v = tl.load(rows + value_offset, mask=mask, other=0.0)
    score = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 0))
    share = tl.exp(score - higher)
    shrink = tl.exp(peak - higher)
    mixed = mixed * shrink + tl.sum(share[:, None] * v.to(tl.float32), 0)
    return higher, total * shrink + tl.sum(share, 0), mixed


@triton.jit(do_not_specialize=["width", "layer", "layers"])
def attend(
    q_rows,  # [lane, head, channel], lanes ``q_stride`` apart
    k_rows,  # of the newborn token: [lane, key head, channel], lanes ``k_stride`` apart
    v_rows,
    held_rows,  # slots, ``held_stride`` apart
    held_positions,  # [row, slot], rows ``width`` apart
    block,  # where all of it lies, staging too: recomputed tokens, the oldest, and the ring of those fetched, the next ones
    places,  # [row, 7]: see ``runtime.graph.streamed``
    row,  # [1]
    padding,  # [lane]
    attended,  # [lane, head, channel]
    scale,
    q_stride,
    k_stride,
    held_stride,
    heads,
    key_heads,
    width,
    layer,
    layers,
    BUFFERS: tl.constexpr,
    FROM_FRONT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query head over all its lane's tokens. Stores the newborn token's row, reads every other row once.

    ``FROM_FRONT``: a lane's recomputed rows begin with its first token that is no padding.
    """
    head, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)  # heads first: their rows are neighbours
    group = heads // key_heads
    key_head = head // group
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    now = tl.load(row)
    place = places + 7 * now
    held = tl.load(place).to(tl.int32)
    recomputed = tl.load(place + 1).to(tl.int32)
    fetched = tl.load(place + 2).to(tl.int32)
    newborn = tl.load(place + 3).to(tl.int32)
    buffer = (now * layers + layer) % BUFFERS
    # whole units of elements, so that rows are read as vectors
    recomputed_rows = block + tl.load(place + 4) // UNIT * UNIT
    fetched_rows = block + (tl.load(place + 5) + buffer * tl.load(place + 6)) // UNIT * UNIT
    held_positions += now * width
    first_real = tl.load(padding + lane)
    own = lane * k_stride + key_head * CHANNELS + channel
    q = tl.load(q_rows + lane * q_stride + head * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32) * scale
    k_own = tl.load(k_rows + own, mask=inside, other=0.0)
    v_own = tl.load(v_rows + own, mask=inside, other=0.0)
    value_offset = key_heads * CHANNELS
    base = lane * (2 * value_offset) + key_head * CHANNELS
    stored = held_rows + base + newborn.to(tl.int64) * held_stride + channel
    mine = inside & (head % group == 0)
    tl.store(stored, k_own, mask=mine)
    tl.store(stored + value_offset, v_own, mask=mine)
    peak = tl.sum(q * k_own.to(tl.float32), 0)
    total, mixed = peak * 0.0 + 1.0, v_own.to(tl.float32)
    staged_stride = tl.num_programs(1).to(tl.int64) * (2 * value_offset)
    for first in range(0, recomputed + fetched, BLOCK):  # one loop: Triton 3.6 cannot compile three in a row
        item = first + tl.arange(0, BLOCK)
        there = (item < recomputed + fetched) & (item >= first_real)
        place_again = item - first_real if FROM_FRONT else item
        again = recomputed_rows + base + place_again.to(tl.int64) * staged_stride
        brought = fetched_rows + base + (item - recomputed).to(tl.int64) * staged_stride
        rows = tl.where(item < recomputed, again, brought)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        peak, total, mixed = _add(q, peak, total, mixed, rows, value_offset, there, mask)
    for first in range(0, held, BLOCK):
        item = first + tl.arange(0, BLOCK)
        there = (item < held) & (item != newborn)
        there = there & (tl.load(held_positions + item, mask=there, other=0) >= first_real)
        rows = (held_rows + base + item.to(tl.int64) * held_stride)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        peak, total, mixed = _add(q, peak, total, mixed, rows, value_offset, there, mask)
    out = (mixed / total).to(attended.dtype.element_ty)
    tl.store(attended + (lane * heads + head) * CHANNELS + channel, out, mask=inside)

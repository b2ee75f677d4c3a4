"""Triton kernels that take a prompt in under sparse window attention. Imported only where a GPU runs them.

A *row* is a lane of a layer. The rules are those of ``runtime.selectors.swa`` and ``runtime.ledger``, on the same numbers:
sums are whole, in units of 2^-40, so that what is equal there is equal here. What varies from pass to pass and from layer
to layer is not specialised: no kernel is compiled anew for it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_lane", "first_query", "queries"])
def mask(
    scores,  # [lane, query head, query, token]
    masked,  # the same in float32; may be ``scores``
    padding,
    first_lane,
    first_query,  # its position
    scale,
    heads,
    queries,
    tokens,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Scaled, and minus infinity where a query sees no token."""
    lane_head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)[:, None]
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)[None, :]
    there = (query < queries) & (token < tokens)
    at = (lane_head * queries + query) * tokens + token
    real = token >= tl.load(padding + first_lane + lane_head // heads)
    score = tl.load(scores + at, mask=there, other=0.0).to(tl.float32) * scale
    visible = (first_query + query >= token) & real
    tl.store(masked + at, tl.where(visible, score, float("-inf")), mask=there)


@triton.jit(do_not_specialize=["first_lane", "lanes"])
def weigh(
    weights,  # [lane, query, token], heads summed, as they are stored
    keys,  # [2, lane, token]: what the prompt's end and the first step choose by; 0: padding, -1: not to be chosen
    padding,
    first_lane,
    lanes,
    queries,
    tokens,
    history,  # queries that the prompt's end sums, and the first step
    next_history,
    older,  # tokens that are not the newest then
    next_older,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What the last queries paid each token."""
    lane = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    first_real = tl.load(padding + first_lane + lane)
    total, next_total = tl.zeros([TOKENS], tl.int64), tl.zeros([TOKENS], tl.int64)
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)
        asks = (query < queries) & (tokens - queries + query >= first_real)  # padding asks nothing: its weights are NaN
        at = (lane * queries + query)[:, None] * tokens + token[None, :]
        whole = _whole(tl.load(weights + at, mask=asks[:, None] & inside[None, :], other=0.0))
        back = (queries - query)[:, None]
        total += tl.sum(tl.where(back <= history, whole, 0), 0)
        next_total += tl.sum(tl.where(back <= next_history, whole, 0), 0)
    real = token >= first_real
    _store_key(keys + lane * tokens, total, token, real, older, inside)
    _store_key(keys + (lanes + lane) * tokens, next_total, token, real, next_older, inside)


@triton.jit
def _whole(paid):
    """In units of 2^-40, the nearest, of two the even one: past 1.5 * 2^52 a float64 has no fraction."""
    shift: tl.constexpr = 6755399441055744.0
    return ((paid.to(tl.float64) * 1099511627776.0 + shift) - shift).to(tl.int64)


@triton.jit
def _store_key(keys, total, token, real, older, inside):
    score = total.to(tl.float64).to(tl.int64)  # as scores are compared elsewhere
    tl.store(keys + token, tl.where(token < older, tl.where(real, score + 1, 0), -1), mask=inside)


@triton.jit(do_not_specialize=["first_lane", "first_row", "lanes"])
def choose_first(
    keys,  # ``weigh``'s
    ranks,  # [row, entry], as ``kernels.settle`` has them; likewise the next five
    slots,
    counts,
    position,
    last,
    place,
    padding,
    first_lane,
    first_row,
    lanes,
    tokens,
    entries,
    width,
    older,
    next_older,
    living,  # of the older tokens at the prompt's end
    selected,  # by the first step
    dying,  # of all tokens, before the first step
    attended,  # by the first step, besides its newborn token
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BITS: tl.constexpr,
):
    """What the first step attends to, which tokens live, and their entries: first those attended to, then the newborn one."""
    lane = tl.program_id(0).to(tl.int64)
    row = first_row + lane
    token = tl.arange(0, TOKENS)
    wanted, seen, turn = survivors(keys, lane, lanes, token, tokens, older, next_older, living, selected, BITS)
    alive = (token < tokens) & (turn >= dying)

    first, others = alive & wanted, alive & (wanted == 0)
    entry = tl.where(first, place_among(first), attended + 1 + place_among(others))
    line = row * entries
    tl.store(position + line + entry, token, mask=alive)
    tl.store(last + line + entry, seen, mask=alive)
    real = token >= tl.load(padding + first_lane + lane)
    tl.store(slots + row * width + entry, tl.where(real, entry, -1), mask=first)
    tl.store(slots + row * width + attended, attended)
    tl.store(counts + row, attended + 1)
    every = tl.arange(0, ENTRIES)
    newborn, held = every == attended, every < entries
    unfilled = held & (newborn | (every > tokens - dying))
    tl.store(position + line + every, tl.where(newborn, tokens, -1), mask=unfilled)
    tl.store(last + line + every, tl.where(newborn, 1, -1), mask=unfilled)
    tl.store(ranks + line + every, tl.where(every <= attended, every, -1), mask=held)
    tl.store(place + line + every, every, mask=held)


@triton.jit
def survivors(keys, lane, lanes, token, tokens, older, next_older, living, selected, BITS: tl.constexpr):
    """Of a prompt's tokens: whether the first step attends to them, which row did last, and in which order they die."""
    inside = token < tokens
    key = tl.load(keys + lane * tokens + token, mask=inside, other=-1)
    candidates = (token >= older) | _best(key, living, BITS)
    key = tl.load(keys + (lanes + lane) * tokens + token, mask=inside & candidates, other=-1)
    wanted = inside & ((token >= next_older) | _best(key, selected, BITS))

    # those attended to the longest ago die, of equals the oldest
    seen = tl.where(wanted, 1, tl.where(token >= older, 0, -1))
    never, once = inside & (seen < 0), inside & (seen == 0)
    nevers, onces = tl.sum(never.to(tl.int32), 0), tl.sum(once.to(tl.int32), 0)
    later = tl.where(once, nevers + place_among(once), nevers + onces + place_among(wanted))
    turn = tl.where(never, place_among(never), later)
    return wanted, seen, turn


@triton.jit
def _best(key, count, BITS: tl.constexpr):
    """The ``count`` highest keys, of equals the oldest; of those below 0 none."""
    bound = tl.full([], 0, tl.int64)
    one = tl.full([], 1, tl.int64)
    for bit in range(BITS):
        raised = bound | (one << (BITS - 1 - bit))
        bound = tl.where(tl.sum((key >= raised).to(tl.int32), 0) >= count, raised, bound)
    chosen, tied = key > bound, key == bound
    rest = count - tl.sum(chosen.to(tl.int32), 0)
    return chosen | (tied & (place_among(tied) < rest))


@triton.jit
def place_among(members):
    """How many members come before each."""
    return tl.cumsum(members.to(tl.int32), 0) - 1


@triton.jit(do_not_specialize=["first_lane", "first_row"])
def remember(
    weights,  # ``weigh``'s
    ring,  # [row, query position mod ``remembered``, entry]
    position,
    padding,
    first_lane,
    first_row,
    queries,
    tokens,
    remembered,
    entries,
    filled,  # entries, the newborn token's among them
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """What the last queries paid the tokens that live."""
    lane = tl.program_id(0).to(tl.int64)
    row = first_row + lane
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    token = tl.load(position + row * entries + entry, mask=entry < filled, other=tokens)
    asked = tokens - queries + query
    asks = (query < queries) & (asked >= tl.load(padding + first_lane + lane))
    there = (query < queries)[:, None] & (token < tokens)[None, :]
    at = (lane * queries + query)[:, None] * tokens + token[None, :]
    paid = tl.load(weights + at, mask=there & asks[:, None], other=0.0)
    line = (row * remembered + asked % remembered) * entries
    tl.store(ring + line[:, None] + entry[None, :], paid, mask=there)


@triton.jit(do_not_specialize=["first_row"])
def keep(
    k_rows,  # [lane, token, head, channel], lanes, tokens and heads as far apart as the strides say
    v_rows,
    keys,  # [row, head, slot, channel]
    values,
    host_keys,  # [row, slot, head, channel] in pinned memory: slots from ``hbm_slots`` on
    host_values,
    position,
    place,
    first_row,
    k_lane,
    k_token,
    k_head,
    v_lane,
    v_token,
    v_head,
    heads,
    tokens,
    entries,
    filled,
    hbm_slots,
    host_slots,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One head's keys and values of the tokens that live."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = first_row + lane
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    token = tl.load(position + row * entries + entry, mask=entry < filled, other=tokens)
    channel = tl.arange(0, PADDED)
    slot = tl.load(place + row * entries + entry, mask=entry < filled, other=0)
    there = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    at = token.to(tl.int64)[:, None]
    k = tl.load(k_rows + lane * k_lane + at * k_token + head * k_head + channel[None, :], mask=there, other=0.0)
    v = tl.load(v_rows + lane * v_lane + at * v_token + head * v_head + channel[None, :], mask=there, other=0.0)
    near = there & (slot < hbm_slots)[:, None]
    here = ((row * heads + head) * hbm_slots + slot)[:, None] * CHANNELS + channel[None, :]
    tl.store(keys + here, k, mask=near)
    tl.store(values + here, v, mask=near)
    far = there & (slot >= hbm_slots)[:, None]
    away = ((row * host_slots + slot - hbm_slots) * heads + head)[:, None] * CHANNELS + channel[None, :]
    tl.store(host_keys + away, k, mask=far)
    tl.store(host_values + away, v, mask=far)

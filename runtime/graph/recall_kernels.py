"""Triton kernels of page digests with recall. Imported only where a GPU runs them.

A lane is a sequence, a page PAGE tokens. Digests lie as [lane, page, 2, head, channel]: the least and greatest key.
"""

import triton
import triton.language as tl


@triton.jit
def digest(
    k_rows,  # [lane, token, head, channel] of a prompt, heads and channels neighbours
    digests,
    padding,  # [lane]
    first_lane,  # of the rows
    lane_stride,
    token_stride,
    tokens,
    pages,
    width,  # heads times channels
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some channels of a page; where a page has no token yet, or padding alone, infinities that any key replaces."""
    row, page = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = first_lane + row
    entry = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < width
    token = page * PAGE + tl.arange(0, PAGE)
    real = (token < tokens) & (token >= tl.load(padding + lane))
    at = row * lane_stride + token.to(tl.int64)[:, None] * token_stride + entry[None, :]
    keys = tl.load(k_rows + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    low = tl.min(tl.where(real[:, None], keys, float("inf")), 0)
    high = tl.max(tl.where(real[:, None], keys, float("-inf")), 0)
    place = ((lane * pages + page) * 2) * width + entry
    tl.store(digests + place, low.to(digests.dtype.element_ty), mask=inside)
    tl.store(digests + place + width, high.to(digests.dtype.element_ty), mask=inside)


@triton.jit
def score(
    q_rows,  # [lane, query head, channel], lanes ``q_stride`` apart
    k_rows,  # [lane, head, channel], the newborn token's
    digests,
    scores,  # [lane, query head, page]
    peaks,  # [lane, query head]
    totals,
    padding,  # [lane]
    row,
    table,  # [6, row]: cached, older, selected, off HBM, first and end of what is written back
    scale,
    q_stride,
    kv_stride,
    heads,
    pages,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What one query can give the tokens of each page at most, before the softmax over pages; the newborn key is taken in.

    The queries of a group share digests and take the same key in: whoever comes first changes nothing for the others.
    """
    lane, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = query // GROUP
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    cached = tl.load(table + tl.load(row))
    first_real = tl.load(padding + lane)
    q = tl.load(q_rows + lane * q_stride + query * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32) * scale
    newborn = tl.load(k_rows + lane * kv_stride + head * CHANNELS + channel, mask=inside, other=0.0)
    page_width = 2 * heads * CHANNELS
    base = lane * pages * page_width + head * CHANNELS
    own = (cached - 1) // PAGE
    low_at = digests + base + own.to(tl.int64) * page_width + channel
    high_at = low_at + heads * CHANNELS
    own_low = tl.minimum(tl.load(low_at, mask=inside, other=0.0), newborn)
    own_high = tl.maximum(tl.load(high_at, mask=inside, other=0.0), newborn)
    tl.store(low_at, own_low, mask=inside)
    tl.store(high_at, own_high, mask=inside)
    own_bound = tl.sum(tl.maximum(q * own_low.to(tl.float32), q * own_high.to(tl.float32)), 0)

    line = (lane * heads * GROUP + query) * pages
    peak, total = own_bound, own_bound * 0.0 + 1.0
    tl.store(scores + line + own, own_bound)
    for first in range(first_real // PAGE, own, BLOCK):
        page = first + tl.arange(0, BLOCK)
        there = page < own
        at = base + page.to(tl.int64)[:, None] * page_width + channel[None, :]
        mask = there[:, None] & inside[None, :]
        low = tl.load(digests + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(digests + at + heads * CHANNELS, mask=mask, other=0.0).to(tl.float32)
        bound = tl.sum(tl.maximum(q[None, :] * low, q[None, :] * high), 1)
        bound = tl.where(there, bound, float("-inf"))
        tl.store(scores + line + page, bound, mask=there)
        higher = tl.maximum(peak, tl.max(bound, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(bound - higher), 0)
        peak = higher
    tl.store(peaks + lane * heads * GROUP + query, peak)
    tl.store(totals + lane * heads * GROUP + query, total)


@triton.jit
def choose(
    scores,
    peaks,
    totals,
    bias,  # [row, lane, page], added to the pages' scores, where BIASED
    taken,  # [lane, page]: how many of a page's older tokens are attended to, the oldest first; in: by the step before
    slot_of,  # [lane, position]: its slot in HBM, -1: none
    holds,  # [lane, slot]: the position in it, -1: none
    free,  # [lane, slot + 1]: scratch
    slots,  # [lane, width]: out, the slots attended to, the newborn token's last
    counts,  # [lane]: out
    fetches,  # [lane, width, 2]: out, position and slot of what must come from the host
    fetch_counts,  # [row, lane]: out
    padding,
    row,
    table,
    queries,
    pages,
    rows,
    positions,
    hbm_slots,
    width,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Which tokens a lane's step attends to, which slots they have, and which of them must be fetched into which slots."""
    lane = tl.program_id(0).to(tl.int64)
    lanes = tl.num_programs(0)
    now = tl.load(row)
    cached = tl.load(table + now)
    older = tl.load(table + rows + now)
    wanted_far = tl.load(table + 2 * rows + now)
    off = tl.load(table + 3 * rows + now)
    first_real = tl.load(padding + lane)

    # what held a slot until now; what only just leaves home has a copy if the step before attended to it
    slot = tl.arange(0, SLOTS)
    in_pool = slot < hbm_slots
    held = tl.load(holds + lane * hbm_slots + slot, mask=in_pool, other=-1)
    held_page = tl.maximum(held, 0) // PAGE
    held_rank = held - tl.maximum(held_page * PAGE, first_real)
    before_take = tl.load(taken + lane * pages + held_page, mask=held >= 0, other=0)
    before = tl.maximum(now - 1, 0)
    older_before, off_before = tl.load(table + rows + before), tl.load(table + 3 * rows + before)
    attended_before = (held >= older_before) | (held_rank < before_take)
    homeless = (held >= off_before) & (held < off) & (attended_before == 0)
    tl.debug_barrier()

    # a page's score: its share of the softmax over pages, summed over query heads
    page = tl.arange(0, PAGES)
    starts = tl.maximum(page * PAGE, first_real)
    candidates = tl.maximum(tl.minimum(page * PAGE + PAGE, older) - starts, 0)
    some = candidates > 0
    paid = tl.zeros([PAGES], tl.float32)
    for first in range(0, queries, HEADS):
        query = first + tl.arange(0, HEADS)
        lane_query = lane * queries + query
        peak = tl.load(peaks + lane_query, mask=query < queries, other=0.0)
        total = tl.load(totals + lane_query, mask=query < queries, other=1.0)
        both = (query < queries)[:, None] & some[None, :]
        at = lane_query[:, None] * pages + page[None, :]
        bound = tl.load(scores + at, mask=both, other=float("-inf"))
        paid += tl.sum(tl.exp(bound - peak[:, None]) / total[:, None], 0)
    if BIASED:
        paid += tl.load(bias + (now * lanes + lane) * pages + page, mask=some, other=0.0)

    # the best pages whole, of the last one a part
    key = tl.where(some, paid.to(tl.int32, bitcast=True) + 1, 0)
    far = tl.minimum(wanted_far, tl.sum(candidates, 0))
    bound = far * 0
    for bit in tl.static_range(31):
        raised = bound | (1 << (30 - bit))
        bound = tl.where(tl.sum(tl.where(key >= raised, candidates, 0), 0) >= far, raised, bound)
    whole = tl.where(key > bound, candidates, 0)
    tied = tl.where(key == bound, candidates, 0)
    rest = far - tl.sum(whole, 0) - (tl.cumsum(tied, 0) - tied)
    take = whole + tl.minimum(tl.maximum(rest, 0), tied)
    tl.store(taken + lane * pages + page, take, mask=page < pages)
    tl.debug_barrier()

    # slots of what is neither at home in HBM nor attended to become free
    held_take = tl.load(taken + lane * pages + held_page, mask=held >= 0, other=0)
    picked = (held < older) & (held_rank < held_take) & (held >= first_real)
    stays = (held >= off) | ((picked | (held >= older)) & (homeless == 0))
    leaves = in_pool & (held >= 0) & (stays == 0)
    tl.store(slot_of + lane * positions + held, -1, mask=leaves)
    vacant = in_pool & ((held < 0) | leaves)
    rank = tl.cumsum(vacant.to(tl.int32), 0) - 1
    tl.store(free + lane * hbm_slots + rank, slot, mask=vacant)
    tl.store(holds + lane * hbm_slots + slot, -1, mask=leaves)
    tl.debug_barrier()

    # the newborn token takes the first, what is missing the next ones
    born = tl.load(free + lane * hbm_slots)
    tl.store(slot_of + lane * positions + cached - 1, born)
    tl.store(holds + lane * hbm_slots + born, cached - 1)
    listed = far * 0
    fetched = far * 0
    for first in range(0, cached - 1, CHUNK):
        position = first + tl.arange(0, CHUNK)
        real = (position < cached - 1) & (position >= first_real)
        its_page = position // PAGE
        its_take = tl.load(taken + lane * pages + its_page, mask=real, other=0)
        chosen = (position < older) & (position - tl.maximum(its_page * PAGE, first_real) < its_take)
        wanted = real & (chosen | (position >= older))
        place = tl.load(slot_of + lane * positions + position, mask=wanted, other=0)
        missing = wanted & (place < 0)
        turn = fetched + tl.cumsum(missing.to(tl.int32), 0) - 1
        new = tl.load(free + lane * hbm_slots + 1 + turn, mask=missing, other=0)
        place = tl.where(missing, new, place)
        tl.store(slot_of + lane * positions + position, place, mask=missing)
        tl.store(holds + lane * hbm_slots + place, position, mask=missing)
        tl.store(fetches + (lane * width + turn) * 2, position, mask=missing)
        tl.store(fetches + (lane * width + turn) * 2 + 1, place, mask=missing)
        item = listed + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(slots + lane * width + item, place, mask=wanted)
        listed += tl.sum(wanted.to(tl.int32), 0)
        fetched += tl.sum(missing.to(tl.int32), 0)
    tl.store(slots + lane * width + listed, born)
    tl.store(counts + lane, listed + 1)
    tl.store(fetch_counts + now * lanes + lane, fetched)


@triton.jit
def fetch(
    fetches,
    fetch_counts,
    row,
    keys,  # [lane, head, slot, channel]
    values,
    host_keys,  # [lane, position, head, channel] in pinned memory: a token's heads are neighbours
    host_values,
    heads,
    hbm_slots,
    host_slots,
    width,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Bring what is missing from the host; each program some heads of every so-many-th token of a lane."""
    lane = tl.program_id(0).to(tl.int64)
    head, channel = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PADDED)
    inside = (head < heads)[:, None] & (channel < CHANNELS)[None, :]
    count = tl.load(fetch_counts + tl.load(row) * tl.num_programs(0) + lane)
    for turn in range(tl.program_id(2), count, tl.num_programs(2)):
        what = fetches + (lane * width + turn) * 2
        position, slot = tl.load(what).to(tl.int64), tl.load(what + 1).to(tl.int64)
        held = inside & (
            position < host_slots
        )  # before a prompt has been taken in, homes are not yet what they should be
        there = ((lane * host_slots + position) * heads + head)[:, None] * CHANNELS + channel[None, :]
        here = ((lane * heads + head) * hbm_slots + slot)[:, None] * CHANNELS + channel[None, :]
        k = tl.load(host_keys + there, mask=held, other=0.0)
        v = tl.load(host_values + there, mask=held, other=0.0)
        tl.store(keys + here, k, mask=held)
        tl.store(values + here, v, mask=held)


@triton.jit
def write_back(
    slot_of,
    row,
    table,
    keys,
    values,
    host_keys,
    host_values,
    lanes,
    heads,
    hbm_slots,
    host_slots,
    positions,
    rows,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Copy the tokens that this row sends to the host; each program those of every so-many-th lane, one after the other."""
    now, channel = tl.load(row), tl.arange(0, PADDED)
    first, last = tl.load(table + 4 * rows + now), tl.load(table + 5 * rows + now)
    for lane in range(tl.program_id(0).to(tl.int64), lanes, tl.num_programs(0)):
        for position in range(first, last):
            slot = tl.load(slot_of + lane * positions + position).to(tl.int64)
            for start in range(0, heads, HEADS):
                head = start + tl.arange(0, HEADS)
                mask = (head < heads)[:, None] & (channel < CHANNELS)[None, :] & (slot >= 0)
                here = ((lane * heads + head) * hbm_slots + slot)[:, None] * CHANNELS + channel[None, :]
                there = ((lane * host_slots + position) * heads + head)[:, None] * CHANNELS + channel[None, :]
                tl.store(host_keys + there, tl.load(keys + here, mask=mask, other=0.0), mask=mask)
                tl.store(host_values + there, tl.load(values + here, mask=mask, other=0.0), mask=mask)

"""Triton kernels of sparse window attention whose HBM holds the newest tokens. Imported only where a GPU runs them.

What is older lies on the host; of it a step attends to what was gathered into a *stage* in HBM before. An entry's slot on the
host has its own number, from ``hbm_slots`` on: there is nothing to look for when a token leaves. A list of what a step
attends to names slots of HBM, then rows of the stage, then, where that is full, slots of the host.
"""

import triton
import triton.language as tl

from runtime.graph.choosing_kernels import bury, wanted_next
from runtime.graph.window_kernels import place_among, survivors


@triton.jit(do_not_specialize=["first_lane", "first_row", "lanes"])
def choose_newest(
    keys,  # as ``window_kernels.choose_first`` has them; likewise what bears a name that it has, too
    ranks,
    slots,
    counts,
    position,
    last,
    place,
    sources,  # [row, stage row]: slots of the host
    staged,  # [row]: how many of them, and how many tokens the first step needs from the host
    fetched,
    padding,
    first_lane,
    first_row,
    lanes,
    tokens,
    entries,
    width,
    older,
    next_older,
    living,
    selected,
    dying,
    attended,
    dead,  # at the prompt's end
    kept,  # in HBM at the prompt's end
    next_kept,  # in HBM in the first step, besides its newborn token
    hbm_slots,
    stage_rows,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BITS: tl.constexpr,
):
    """What the first step attends to, which tokens live, and where: entries, and slots of HBM, are in order of age."""
    lane = tl.program_id(0).to(tl.int64)
    row = first_row + lane
    token = tl.arange(0, TOKENS)
    inside = token < tokens
    wanted, seen, turn = survivors(keys, lane, lanes, token, tokens, older, next_older, living, selected, BITS)
    alive = inside & (turn >= dying)
    home = _newest(_newest(inside & (turn >= dead), kept) & alive, next_kept)

    entry = place_among(alive)
    slot = tl.where(home, place_among(home), hbm_slots + entry)
    first = alive & wanted
    rank = tl.where(first, place_among(first), -1)
    found = _expect(first & (slot >= hbm_slots), slot, sources, staged, fetched, row, hbm_slots, stage_rows)
    line = row * entries
    tl.store(position + line + entry, token, mask=alive)
    tl.store(last + line + entry, seen, mask=alive)
    tl.store(place + line + entry, slot, mask=alive)
    tl.store(ranks + line + entry, rank, mask=alive)
    real = token >= tl.load(padding + first_lane + lane)
    tl.store(slots + row * width + rank, tl.where(real, found, -1), mask=first)

    newborn, newborn_slot = tokens - dying, tl.sum(home.to(tl.int32), 0)
    tl.store(slots + row * width + attended, newborn_slot)
    tl.store(counts + row, attended + 1)
    every = tl.arange(0, ENTRIES)
    unfilled, born = (every >= newborn) & (every < entries), every == newborn
    tl.store(position + line + every, tl.where(born, tokens, -1), mask=unfilled)
    tl.store(last + line + every, tl.where(born, 1, -1), mask=unfilled)
    tl.store(place + line + every, tl.where(born, newborn_slot, 0), mask=unfilled)
    tl.store(ranks + line + every, tl.where(born, attended, -1), mask=unfilled)


@triton.jit
def _newest(members, count):
    return members & (tl.sum(members.to(tl.int32), 0) - place_among(members) <= count)


@triton.jit
def _expect(comes, slot, sources, staged, fetched, row, hbm_slots, stage_rows):
    """Note what ``comes`` from the host; where attention will find every token."""
    turn, count = place_among(comes), tl.sum(comes.to(tl.int32), 0)
    is_staged = comes & (turn < stage_rows)
    tl.store(sources + row * stage_rows + turn, slot - hbm_slots, mask=is_staged)
    tl.store(staged + row, tl.minimum(count, stage_rows))
    tl.store(fetched + row, count)
    return tl.where(is_staged, hbm_slots + turn, tl.where(comes, slot + stage_rows, slot))


@triton.jit(do_not_specialize=["width", "queries", "entries"])  # as ``kernels.settle``
def settle(
    scores,  # as ``kernels.settle`` has them; likewise what bears a name that it has, too
    peaks,
    sums,
    ranks,
    slots,
    counts,
    position,
    last,
    place,
    ring,
    padding,
    row,
    table,
    kept,  # [rows + 1]: tokens in HBM
    moves,
    move_counts,
    sources,  # ``choose_newest``'s; likewise the next two
    staged,
    fetched,
    heads,
    width,
    queries,
    entries,
    rows,
    hbm_slots,
    host_slots,
    stage_rows,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """After a step's attention: what the next one attends to, who dies, who leaves HBM, where the next token goes."""
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
    first_real = tl.load(padding + lane)
    # fmt: off
    wanted = wanted_next(
        scores, peaks, sums, ring, lane, entry, inside, held, pos, pos >= first_real,
        cached, near, far, history, heads, width, queries, entries, ENTRIES, CHUNK,
    )
    # fmt: on
    seen = tl.where(wanted, now + 1, seen)
    pos = bury(pos, seen, dying)

    # the oldest leave HBM; after the last step, which nobody goes on from, the host may have no slot
    in_hbm = (pos >= 0) & (where_ < hbm_slots)
    leaving = tl.sum(in_hbm.to(tl.int32), 0) + 1 - tl.load(kept + now + 1)
    goes = in_hbm & (pos < _bound(in_hbm, pos, leaving)) & (entry < host_slots)
    to = moves + (lane * entries + place_among(goes)) * 4
    tl.store(to, where_, mask=goes)
    tl.store(to + 1, entry, mask=goes)
    tl.store(to + 2, 0, mask=goes)
    tl.store(to + 3, 1, mask=goes)
    tl.store(move_counts + lane, tl.sum(goes.to(tl.int32), 0))
    where_ = tl.where(goes, hbm_slots + entry, where_)

    # the next token takes the first free entry, and the first free slot of HBM
    vacant = inside & (pos < 0)
    born = vacant & (place_among(vacant) == 0)
    where_ = tl.where(born, _first_free((pos >= 0) & (where_ < hbm_slots), where_), where_)
    pos = tl.where(born, cached, pos)
    seen = tl.where(born, now + 1, seen)

    # the next step's list, its newborn token last
    items = tl.sum(wanted.to(tl.int32), 0)
    rank = tl.where(born, items, tl.where(wanted, place_among(wanted), -1))
    found = _expect(wanted & (where_ >= hbm_slots), where_, sources, staged, fetched, lane, hbm_slots, stage_rows)
    tl.store(slots + lane * width + rank, tl.where(pos >= first_real, found, -1), mask=wanted | born)
    tl.store(counts + lane, items + 1)
    tl.store(ranks + mine, rank, mask=inside)
    tl.store(position + mine, pos, mask=inside)
    tl.store(last + mine, seen, mask=inside)
    tl.store(place + mine, where_, mask=inside)


@triton.jit
def _bound(members, pos, count):
    """The highest position below which lie at most ``count`` members; 0 where that is none, or less."""
    limit = count * 0
    for bit in tl.static_range(16):
        raised = limit | (1 << (15 - bit))
        limit = tl.where(tl.sum((members & (pos < raised)).to(tl.int32), 0) <= count, raised, limit)
    return limit


@triton.jit
def _first_free(taken, slot):
    """The first slot that none of the ``taken`` has: as many lie below it as there are numbers."""
    free = tl.sum(taken.to(tl.int32), 0) * 0
    for bit in tl.static_range(16):
        raised = free | (1 << (15 - bit))
        below = tl.sum((taken & (slot < raised)).to(tl.int32), 0)
        free = tl.where(below == raised, raised, free)
    return free


@triton.jit
def gather(
    sources,  # ``choose_newest``'s, of one layer
    staged,
    host_keys,  # [lane, slot, head, channel] in pinned memory
    host_values,
    host_ranges,  # of values, both numbers in one, where RANGED: [lane, slot, head]
    keys,  # the stage, [lane, head, row, channel]
    values,
    ranges,  # [lane, head, row]
    lanes,
    parts,  # of a lane's rows
    heads,
    host_slots,
    stage_rows,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    RANGED: tl.constexpr,
):
    """Tokens of the host to the stage, heads of a token and TOKENS of a lane at once. Few programs take turns at all lanes:
    they leave the SMs to others, and have so much under way that the link is full.
    """
    of_token = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = of_token < heads * CHANNELS
    head, channel = of_token // CHANNELS, of_token % CHANNELS
    for piece in range(tl.program_id(0), lanes * parts, tl.num_programs(0)):
        lane, part = (piece // parts).to(tl.int64), piece % parts
        count = tl.load(staged + lane)
        for first in range(part * TOKENS, count, parts * TOKENS):
            row = first + tl.arange(0, TOKENS)
            slot = tl.load(sources + lane * stage_rows + row, mask=row < count, other=0)
            mask = (row < count)[:, None] & inside[None, :]
            there = ((lane * host_slots + slot) * heads * CHANNELS)[:, None] + of_token[None, :]
            here = ((lane * heads + head)[None, :] * stage_rows + row[:, None]) * CHANNELS + channel[None, :]
            k = tl.load(host_keys + there, mask=mask, other=0.0)
            v = tl.load(host_values + there, mask=mask, other=0.0)
            if RANGED:
                every = tl.arange(0, HEADS)
                some = (row < count)[:, None] & (every < heads)[None, :] & (tl.program_id(1) == 0)
                away = ((lane * host_slots + slot) * heads)[:, None] + every[None, :]
                both = tl.load(host_ranges + away, mask=some, other=0)
                tl.store(ranges + (lane * heads + every)[None, :] * stage_rows + row[:, None], both, mask=some)
            tl.store(keys + here, k, mask=mask)
            tl.store(values + here, v, mask=mask)

"""What choices of sparse window attention share, wherever its tokens lie. Imported only where a GPU runs Triton's kernels."""

import triton
import triton.language as tl


@triton.jit
def wanted_next(
    scores,  # as ``kernels.settle`` has them; likewise the other tensors
    peaks,
    sums,
    ring,
    lane,
    entry,
    inside,
    held,
    pos,
    real,
    cached,
    near,
    far,
    history,
    heads,
    width,
    queries,
    entries,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Which of a lane's entries the next step attends to; keeps what this one's query paid them."""
    # weights of this query, heads summed, then the sums of the last ``history`` queries
    chunk = tl.arange(0, CHUNK)
    paid = tl.zeros([ENTRIES], tl.float32)
    for first in range(0, heads, CHUNK):
        head = first + chunk
        lane_head = lane * heads + head
        peak = tl.load(peaks + lane_head, mask=head < heads, other=0.0)
        total = tl.load(sums + lane_head, mask=head < heads, other=1.0)
        listed = (head < heads)[:, None] & (held >= 0)[None, :]
        score = tl.load(scores + lane_head[:, None] * width + held[None, :], mask=listed, other=float("-inf"))
        paid += tl.sum(tl.exp(score - peak[:, None]) / total[:, None], 0)
    paid = paid.to(ring.dtype.element_ty)
    asked = cached - 1
    tl.store(ring + (lane * queries + asked % queries) * entries + entry, paid, mask=inside)
    score = paid.to(tl.float32)
    for first in range(1, history, CHUNK):
        back = first + chunk
        query = asked - back
        recent = (back < history)[:, None] & (query[:, None] >= pos[None, :]) & (pos >= 0)[None, :]
        line = (lane * queries + (query + queries) % queries) * entries
        score += tl.sum(tl.load(ring + line[:, None] + entry[None, :], mask=recent, other=0.0).to(tl.float32), 0)

    # the ``far`` highest of the older tokens, of equals the oldest: padding comes last
    alive = pos >= 0
    older = alive & (pos < cached + 1 - near)
    key = tl.where(older, tl.where(real, score.to(tl.int32, bitcast=True) + 1, 0), -1)
    bound = far * 0
    for bit in tl.static_range(31):
        raised = bound | (1 << (30 - bit))
        bound = tl.where(tl.sum((key >= raised).to(tl.int32), 0) >= far, raised, bound)
    chosen = key > bound
    rest = far - tl.sum(chosen.to(tl.int32), 0)
    tied = key == bound
    limit = far * 0
    for bit in tl.static_range(16):
        raised = limit | (1 << (15 - bit))
        limit = tl.where(tl.sum((tied & (pos < raised)).to(tl.int32), 0) <= rest, raised, limit)
    return chosen | (tied & (pos < limit)) | (alive & (pos >= cached + 1 - near))


@triton.jit
def bury(pos, seen, dying):
    """Positions [entry] without the one that was attended to the longest ago, if one is ``dying``."""
    most: tl.constexpr = 2147483647
    alive = pos >= 0
    order = tl.where(alive, seen * 65536 + pos, most)
    return tl.where(alive & (order == tl.min(order, 0)) & (dying > 0), -1, pos)

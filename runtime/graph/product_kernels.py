"""Triton kernels between attentions: products of few rows, residual sums and norms. Imported only where a GPU runs them.

Where CHAINED, a kernel is launched while the one before it still runs, and waits before it touches what that one writes;
since each waits before it ends, what came earlier has ended too.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x,
    added,  # [part, row, width]
    added_bias,
    scale,
    bias,
    normed,
    width,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED_BIAS: tl.constexpr,
    BIASED: tl.constexpr,
    CENTRED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """``x`` += the sum of ``added``, and its norm: by layer where CENTRED, else by root mean square; a program a row."""
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(x + at, mask=inside, other=0.0)
    if PARTS > 0:
        rows = tl.num_programs(0).to(tl.int64)
        more = tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            more += tl.load(added + part * rows * width + at, mask=inside, other=0.0).to(tl.float32)
        if ADDED_BIAS:
            more += tl.load(added_bias + column, mask=inside, other=0.0).to(tl.float32)
        row = (row.to(tl.float32) + more.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, row, mask=inside)
    wide = row.to(tl.float32)
    off = wide
    if CENTRED:
        off = tl.where(inside, wide - tl.sum(wide, 0) / width, 0.0)
    out = off * tl.rsqrt(tl.sum(off * off, 0) / width + eps)
    out = out * tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def product(
    x,  # [row, inner]
    weight,  # [column, inner]
    bias,  # [column]
    out,  # [row, column] with bias; [part, row, column] of float32 without, where RAW
    rows,
    columns,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    RAW: tl.constexpr,
    RELU: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """``x`` times ``weight`` transposed, for few rows: each program streams some of the weights' rows, or a part of them."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    length = inner // PARTS
    start = tl.program_id(1) * length
    lines = weight + column.to(tl.int64) * inner + start
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    step = tl.arange(0, INNER)
    x_at = x + row[:, None] * inner + (start + step)[None, :]
    w_at = lines[None, :] + step[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, length, INNER):
        left = tl.load(x_at, mask=row[:, None] < rows, other=0.0)
        total = tl.dot(left, tl.load(w_at), total)
        x_at += INNER
        w_at += INNER
    to = row[:, None] * columns + column[None, :]
    if RAW:
        tl.store(out + tl.program_id(1) * rows * columns + to, total, mask=row[:, None] < rows)
    else:
        total += tl.load(bias + column)[None, :].to(tl.float32)
        if RELU:
            total = tl.maximum(total, 0.0)
        tl.store(out + to, total.to(out.dtype.element_ty), mask=row[:, None] < rows)


@triton.jit
def place(
    rows,  # [lane, head, channel], query heads and then key heads, lanes ``stride`` apart; in place
    positions,  # [lane]
    frequencies,  # [DIMS / 2]
    query_norm,  # [channel], where NORMED
    key_norm,
    heads,
    queries,
    stride,
    eps,
    magnitude,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    DIMS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Rotate the first DIMS channels of a head by its lane's position, half against half; the norm of its channels before.

    A program takes HEADS of a lane, which turn by the same angles.
    """
    lane, head = tl.program_id(0).to(tl.int64), (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    held, turns = channel < CHANNELS, channel < DIMS
    inside = held & (head < heads)
    low = channel < DIMS // 2
    other = tl.where(turns, tl.where(low, channel + DIMS // 2, channel - DIMS // 2), channel)
    at = rows + lane * stride + head * CHANNELS
    x = tl.load(at + channel, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        shrink = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)[:, None]
        query_scale = tl.load(query_norm + channel, mask=held, other=0.0)
        key_scale = tl.load(key_norm + channel, mask=held, other=0.0)
        x = x * shrink * tl.where(head < queries, query_scale, key_scale).to(tl.float32)
        query_scale = tl.load(query_norm + other, mask=held, other=0.0)
        key_scale = tl.load(key_norm + other, mask=held, other=0.0)
        y = y * shrink * tl.where(head < queries, query_scale, key_scale).to(tl.float32)
    turn = tl.load(frequencies + tl.where(low, channel, channel - DIMS // 2), mask=turns, other=0.0)
    angle = tl.load(positions + lane).to(tl.float32) * turn
    turned = x * (tl.cos(angle) * magnitude) + tl.where(low, -y, y) * (tl.sin(angle) * magnitude)
    tl.debug_barrier()  # a channel's partner has been read before either is written
    tl.store(at + channel, tl.where(turns, turned, x).to(rows.dtype.element_ty), mask=inside)


@triton.jit
def gate(
    up,  # [row, 2 * width]: gate, then value
    out,  # [row, width], rows ``stride`` apart; may be the first half of ``up``
    width,
    stride,
    BLOCK: tl.constexpr,
):
    """The value times SiLU of its gate."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = up + row * 2 * width + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * stride + column, (g / (1.0 + tl.exp(-g)) * value).to(out.dtype.element_ty), mask=inside)

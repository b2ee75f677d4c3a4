"""Triton's kernel that widens matrices stored as integers. Imported only where a GPU runs it."""

import triton
import triton.language as tl


@triton.jit
def widen(
    stored,  # [row, group, 64 levels of 8 bit or 32 pairs of 4]
    ranges,  # [row, group, minimum and step]
    out,  # [row, column]
    groups,  # of all rows together
    columns,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,  # columns are a multiple of 64: what is stored lies as what comes out
    GROUPS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Levels times their group's step, above its minimum; a product of 8 and 11 bits is exact in float32."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    low = tl.load(ranges + 2 * group, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(ranges + 2 * group + 1, mask=inside, other=0.0).to(tl.float32)
    if BITS == 8:
        at = group[:, None] * 64 + tl.arange(0, 64)[None, :]
        levels = tl.load(stored + at, mask=inside[:, None], other=0).to(tl.float32)
    else:
        at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        pairs = tl.load(stored + at, mask=inside[:, None], other=0)
        levels = tl.interleave((pairs & 15).to(tl.float32), (pairs >> 4).to(tl.float32))
    wide = (low[:, None] + levels * step[:, None]).to(out.dtype.element_ty)
    entry = tl.arange(0, 64)
    if WHOLE:
        tl.store(out + group[:, None] * 64 + entry[None, :], wide, mask=inside[:, None])
    else:
        in_row = tl.cdiv(columns, 64)
        column = (group % in_row * 64)[:, None] + entry[None, :]
        to = (group // in_row * columns)[:, None] + column
        tl.store(out + to, wide, mask=inside[:, None] & (column < columns))

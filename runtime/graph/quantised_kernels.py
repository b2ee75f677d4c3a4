"""Triton's side of ``runtime.quantise``, and the running softmax over rows as they are stored.

Imported only where a GPU runs them. ``peak``, ``total`` and ``mixed`` [channel] are the highest score so far, the sum of
the weights relative to it, and the values mixed by them.
"""

import triton
import triton.language as tl


@triton.jit
def fold_native(peak, total, mixed, score, v):
    """Take in ``score`` [token] (-inf: not attended to) and values ``v`` [token, channel]."""
    higher = tl.maximum(peak, tl.max(score, 0))
    share = tl.exp(score - higher)
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.sum(share, 0)
    mixed = mixed * shrink + tl.sum(share[:, None] * v.to(tl.float32), 0)
    return higher, total, mixed


@triton.jit
def fold_levels(peak, total, mixed, score, levels, low, step):
    """As ``fold_native``, for values ``levels`` * ``step`` + ``low``, the latter two [token]."""
    higher = tl.maximum(peak, tl.max(score, 0))
    share = tl.exp(score - higher)
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.sum(share, 0)
    scaled = share * step.to(tl.float32)
    mixed = mixed * shrink + tl.sum(scaled[:, None] * levels.to(tl.float32), 0)
    return higher, total, mixed + tl.sum(share * low.to(tl.float32), 0)


@triton.jit
def score_levels(q, low, step, k):
    """[token], of levels ``k`` [token, channel] whose channels have ranges of their own."""
    return tl.sum((q * step)[None, :] * k.to(tl.float32), 1) + tl.sum(q * low, 0)


@triton.jit
def range_of(least, most):
    """Minimum and step of 8 bits as they are stored, rounded to 16-bit floats."""
    step = tl.div_rn(most - least, 255.0)
    return least.to(tl.float16).to(tl.float32), step.to(tl.float16).to(tl.float32)


@triton.jit
def levels_of(x, low, step):
    """0 to 255 as floats, halves to the even one as ``torch.round``: adding 1.5 * 2^23 leaves no bits for a fraction."""
    level = tl.div_rn(x - low, tl.where(step > 0, step, 1.0))
    level = (level + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(level, 0.0), 255.0)


@triton.jit
def near_fp8(x):
    """The nearest number that float8_e4m3fn has, of two the even one: cast to it, nothing is left to round."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 524287 + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)  # 3 bits of fraction
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # below 2^-6 steps are of 2^-9

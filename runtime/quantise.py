"""KV formats: how keys and values become stored planes and back.

Integer keys are scaled by channel over groups of consecutive positions, frozen once a group is complete; until then its
keys wait in the compute type. Values are scaled by token and head. Scale and minimum are 16-bit floats. With x in
[low, high] and s = (high - low) / (2^bits - 1), an entry comes back within s / 2 and the rounding of s and low, which is
at most 2^-11 of (|low| + high - low), whatever earlier groups held.
"""

import torch
from torch import Tensor

from sim.kv import GROUP_TOKENS, KvFormat

Planes = dict[str, tuple[tuple[int, int], torch.dtype]]  # name: (heads, width), type
_SCALE = torch.float16
_FP8_MAX = 448.0  # largest finite float8_e4m3fn


def plane_shapes(kv_format: KvFormat, heads: int, head_dim: int, dtype: torch.dtype) -> Planes:
    """Stored planes of one token's key and value, all heads.

    Raises ValueError for a format that this torch or this head width cannot store.
    """
    if kv_format is KvFormat.NATIVE:
        return {"k": ((heads, head_dim), dtype), "v": ((heads, head_dim), dtype)}
    if kv_format is KvFormat.FP8:
        require_fp8()
        return {"k": ((heads, head_dim), torch.uint8), "v": ((heads, head_dim), torch.uint8)}
    if kv_format is KvFormat.INT4 and head_dim % 2:
        raise ValueError(f"kv_format=int4, needs an even head width, got {head_dim}: use int8")
    width = head_dim if kv_format is KvFormat.INT8 else head_dim // 2
    payload = (heads, width), torch.uint8
    return {"k": payload, "v": payload, "v_range": ((heads, 2), _SCALE)}


def require_fp8() -> None:
    """Raise ValueError where this torch has no FP8 type."""
    if not hasattr(torch, "float8_e4m3fn"):
        raise ValueError(f"kv_format=fp8, torch {torch.__version__} has no float8_e4m3fn: use int8 or a newer torch")


def key_range(keys: Tensor, bits: int) -> Tensor:
    """Minimum and step of each channel over the tokens of a group: [lane, token, head, channel] to [lane, 2, head, channel]."""
    return spread(keys.amin(1), keys.amax(1), bits, dim=1)


def encode_values(values: Tensor, kv_format: KvFormat) -> dict[str, Tensor]:
    """Values [lane, token, head, channel] as stored planes."""
    if kv_format is KvFormat.NATIVE:
        return {"v": values}
    if kv_format is KvFormat.FP8:
        return {"v": _to_fp8(values)}
    bits = bits_of(kv_format)
    ranges = spread(values.amin(-1), values.amax(-1), bits, dim=-1)  # [lane, token, head, 2]
    return {"v": to_integer(values, ranges[..., :1], ranges[..., 1:], bits), "v_range": ranges}


def decode_values(rows: dict[str, Tensor], kv_format: KvFormat, dtype: torch.dtype) -> Tensor:
    """What ``encode_values`` stored, in ``dtype``."""
    if kv_format is KvFormat.NATIVE:
        return rows["v"]
    if kv_format is KvFormat.FP8:
        return _from_fp8(rows["v"], dtype)
    ranges = rows["v_range"]
    return from_integer(rows["v"], ranges[..., :1], ranges[..., 1:], bits_of(kv_format), dtype)


def encode_keys(keys: Tensor, kv_format: KvFormat, ranges: Tensor | None) -> Tensor:
    """Keys [lane, token, head, channel] as stored; integers by ``ranges`` [lane, token, head, 2, channel], clipped to them."""
    if kv_format is KvFormat.NATIVE:
        return keys
    if kv_format is KvFormat.FP8:
        return _to_fp8(keys)
    assert ranges is not None
    return to_integer(keys, ranges[..., 0, :], ranges[..., 1, :], bits_of(kv_format))


def frozen_groups(keys: Tensor, kv_format: KvFormat) -> tuple[Tensor, Tensor]:
    """All whole groups of prompts' keys [lane, token, head, channel]: levels [group, token, head, channel], lane by lane,
    and their ranges [group, 2, head, channel].
    """
    groups = keys[:, : keys.shape[1] // GROUP_TOKENS * GROUP_TOKENS].reshape(-1, GROUP_TOKENS, *keys.shape[2:])
    ranges = key_range(groups, bits_of(kv_format))
    spread = ranges.transpose(1, 2)[:, None].expand(-1, GROUP_TOKENS, -1, -1, -1)
    return encode_keys(groups, kv_format, spread), ranges


def decode_keys(stored: Tensor, kv_format: KvFormat, ranges: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What ``encode_keys`` stored, in ``dtype``."""
    if kv_format is KvFormat.NATIVE:
        return stored
    if kv_format is KvFormat.FP8:
        return _from_fp8(stored, dtype)
    assert ranges is not None
    return from_integer(stored, ranges[..., 0, :], ranges[..., 1, :], bits_of(kv_format), dtype)


def bits_of(kv_format: KvFormat) -> int:
    """Bits of an integer format's entry."""
    return {KvFormat.INT8: 8, KvFormat.INT4: 4}[kv_format]


def spread(low: Tensor, high: Tensor, bits: int, *, dim: int) -> Tensor:
    """Minimum and step of ranges, side by side in ``dim``."""
    span = high.float() - low.float()
    step = span / torch.full((), 2.0**bits - 1, device=span.device)  # by a number CUDA multiplies with its reciprocal
    return torch.stack((low.float(), step), dim=dim).to(_SCALE)


def to_integer(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """Entries as ``bits`` wide levels above ``low``; two of 4 bit side by side share a byte."""
    safe = torch.where(step > 0, step.float(), 1.0)
    levels = ((x.float() - low.float()) / safe).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return levels if bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)


def from_integer(stored: Tensor, low: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """What ``to_integer`` stored."""
    levels = levels_of(stored, bits)
    if low.dtype == dtype:  # the sum is rounded once all the same: it is taken in float32, which holds the product
        return torch.addcmul(low, levels.float().to(dtype), step)
    return torch.addcmul(low.float(), levels.float(), step.float()).to(dtype)


def levels_of(stored: Tensor, bits: int) -> Tensor:
    """Levels one by one."""
    return stored if bits == 8 else torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)


def fp8_of(stored: Tensor) -> Tensor:
    """The stored bytes as what they are."""
    return stored.view(torch.float8_e4m3fn)


def _to_fp8(x: Tensor) -> Tensor:
    return x.float().clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _from_fp8(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8_of(stored).to(dtype)

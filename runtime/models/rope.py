"""Rotary position encoding and the ways in which checkpoints stretch it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """``dims`` of each head rotate, half against half; ``scaling`` holds config.json's rope parameters."""

    theta: float
    dims: int
    kind: str = "default"
    scaling: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in _FREQUENCIES:
            raise ValueError(f"rope_type={self.kind!r}, must be one of {', '.join(_FREQUENCIES)}")

    def frequencies(self) -> tuple[Tensor, float]:
        """Radians a position for each pair of channels, [dims / 2] in float32, and the factor on cosine and sine."""
        channels = torch.arange(0, self.dims, 2, dtype=torch.int64).float()
        return _FREQUENCIES[self.kind](self.theta ** -(channels / self.dims), self)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first channels of ``x`` [batch, token, head, channel] by angles whose ``cos`` is [batch, token, 1, dims]."""
    dims = cos.shape[-1]
    turned = x[..., :dims]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if dims == x.shape[-1] else torch.cat((turned, x[..., dims:]), dim=-1)


def _default(inverse: Tensor, _: Rope) -> tuple[Tensor, float]:
    return inverse, 1.0


def _linear(inverse: Tensor, rope: Rope) -> tuple[Tensor, float]:
    return inverse / float(rope.scaling["factor"]), 1.0


def _llama3(inverse: Tensor, rope: Rope) -> tuple[Tensor, float]:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1's own formula)."""
    keys = rope.scaling
    original, low, high = (
        float(keys[name]) for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * kept + inverse / float(keys["factor"]) * (1 - kept), 1.0


def _yarn(inverse: Tensor, rope: Rope) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): channels that turn often keep their speed, slow ones are stretched."""
    keys, factor = rope.scaling, float(rope.scaling["factor"])
    original = float(keys["original_max_position_embeddings"])
    fast, slow = (_channel_of(float(keys.get(name) or turns), rope, original) for name, turns in _YARN_TURNS)
    if keys.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, rope.dims - 1)
    ramp = (torch.arange(rope.dims // 2, dtype=torch.float32) - fast) / max(slow - fast, 0.001)
    stretched = ramp.clamp(0, 1)
    return inverse / factor * stretched + inverse * (1 - stretched), _yarn_magnitude(keys, factor)


_YARN_TURNS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def _channel_of(turns: float, rope: Rope, original: float) -> float:
    """The (fractional) channel pair that turns so many times over the original context."""
    return rope.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_magnitude(keys: Mapping[str, Any], factor: float) -> float:
    if keys.get("attention_factor") is not None:
        return float(keys["attention_factor"])
    both = keys.get("mscale"), keys.get("mscale_all_dim")
    if both[0] and both[1]:
        return _magnitude(factor, float(both[0])) / _magnitude(factor, float(both[1]))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

"""One tier of the KV cache: slots in the tier's format, and the ranges by which its keys are read back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.pool import Allocate, Rows, SlotPool
from runtime.quantise import (
    bits_of,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    key_range,
    plane_shapes,
)
from sim.kv import KvFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Sizes that both tiers share."""

    layers: int
    lanes: int
    heads: int
    head_dim: int
    positions: int
    dtype: torch.dtype


class OpenKeys:
    """Each layer's newest keys in the compute type, until their group is complete.

    ``group_tokens`` is 64. With ``None`` ranges come from the whole prompt and are never renewed, as ALISA publishes it.
    """

    def __init__(self, shape: KvShape, group_tokens: int | None, allocate: Allocate, *, needed: bool = True) -> None:
        self.group_tokens = group_tokens
        waiting = (group_tokens or 0) if needed else 0
        size = (shape.layers, shape.lanes, waiting, shape.heads, shape.head_dim)
        self.keys = allocate(size, shape.dtype)
        self.start = [shape.positions] * shape.layers  # first position whose group is open
        self._lane = torch.arange(shape.lanes, device=self.keys.device)[:, None]

    def groups(self, positions: int) -> int:
        return 1 if self.group_tokens is None else -(-positions // self.group_tokens)

    def group_of(self, positions: Tensor) -> Tensor:
        return torch.zeros_like(positions) if self.group_tokens is None else positions // self.group_tokens

    def read(self, layer: int, positions: Tensor, stored: Tensor) -> Tensor:
        """``stored`` keys, those of the open group replaced by what they were."""
        if self.group_tokens is None:
            return stored
        keys = self.keys[layer][self._lane, positions % self.group_tokens]
        return torch.where((positions >= self.start[layer])[..., None, None], keys, stored)


class Tier:
    """Keys and values [lane, token, head, channel] in and out; what lies between is the format's affair."""

    def __init__(
        self, kv_format: KvFormat, shape: KvShape, slots: int, allocate: Allocate, open_keys: OpenKeys
    ) -> None:
        self.kv_format, self.dtype, self.open_keys = kv_format, shape.dtype, open_keys
        device = open_keys.keys.device
        planes = plane_shapes(kv_format, shape.heads, shape.head_dim, shape.dtype)
        self.pool = SlotPool(
            planes,
            layers=shape.layers,
            lanes=shape.lanes,
            slots=slots,
            positions=shape.positions,
            device=device,
            allocate=allocate,
        )
        groups = open_keys.groups(shape.positions) if kv_format.is_grouped else 0
        self.ranges = torch.zeros(
            (shape.layers, shape.lanes, groups, 2, shape.heads, shape.head_dim), dtype=torch.float16, device=device
        )
        self._lane = torch.arange(shape.lanes, device=device)[:, None]

    def put(self, layer: int, positions: Tensor, valid: Tensor, k: Tensor, v: Tensor) -> None:
        keys = encode_keys(k, self.kv_format, self._ranges(layer, positions))
        self.pool.put(layer, positions, valid, {"k": keys, **encode_values(v, self.kv_format)})

    def take(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(layer, positions, self.pool.take(layer, positions))

    def all(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions [lane, slot], keys and values of every slot."""
        positions, rows = self.pool.rows(layer)
        return positions, *self._decode(layer, positions, rows)

    def freeze(self, layer: int, group: int, positions: Tensor, keys: Tensor) -> None:
        """Fix a group's ranges from all its keys, and store those keys of it that are held."""
        if not self.kv_format.is_grouped:
            return
        self.ranges[layer, :, group] = key_range(keys, bits_of(self.kv_format))
        if self.open_keys.group_tokens is not None:
            stored = encode_keys(keys, self.kv_format, self._ranges(layer, positions))
            self.pool.rewrite(layer, positions, {"k": stored})

    def _decode(self, layer: int, positions: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        keys = decode_keys(rows["k"], self.kv_format, self._ranges(layer, positions), self.dtype)
        if self.kv_format.is_grouped:
            keys = self.open_keys.read(layer, positions, keys)
        return keys, decode_values(rows, self.kv_format, self.dtype)

    def _ranges(self, layer: int, positions: Tensor) -> Tensor | None:
        if not self.kv_format.is_grouped:
            return None
        groups = self.open_keys.group_of(positions).clamp(max=self.ranges.shape[2] - 1)
        ranges: Tensor = self.ranges[layer][self._lane, groups]
        return ranges


class KeyFreezer:
    """Follows the newest keys and freezes each group, in both tiers, as soon as it is complete."""

    def __init__(self, open_keys: OpenKeys, tiers: tuple[Tier, ...]) -> None:
        self.open_keys = open_keys
        self.tiers = tuple(tier for tier in tiers if tier.kv_format.is_grouped)

    def start(self, layer: int, k: Tensor) -> None:
        """Keys of the prompt, [lane, token, head, channel], before any of them is stored."""
        if not self.tiers:
            return
        size = self.open_keys.group_tokens or k.shape[1]
        complete = k.shape[1] // size
        for group in range(complete):
            self._freeze(layer, group, group * size, k[:, group * size : (group + 1) * size])
        if self.open_keys.group_tokens is not None:
            self.open_keys.start[layer] = complete * size
            self.open_keys.keys[layer][:, : k.shape[1] - complete * size] = k[:, complete * size :]

    def closes(self, position: int) -> bool:
        """Whether the token at ``position`` completes a group, whose stored keys are then written anew."""
        size = self.open_keys.group_tokens
        return bool(self.tiers) and size is not None and (position + 1) % size == 0

    def bear(self, layer: int, position: int, k: Tensor) -> None:
        """The key of the newborn token, [lane, 1, head, channel], which is stored already."""
        size = self.open_keys.group_tokens
        if not self.tiers or size is None:
            return
        self.open_keys.keys[layer][:, position % size] = k[:, 0]
        if self.closes(position):
            self.open_keys.start[layer] = position + 1
            self._freeze(layer, position // size, position + 1 - size, self.open_keys.keys[layer])

    def _freeze(self, layer: int, group: int, first: int, keys: Tensor) -> None:
        positions = torch.arange(first, first + keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
        for tier in self.tiers:
            tier.freeze(layer, group, positions, keys)

"""One tier of the KV cache: slots in the tier's format, and the ranges by which its keys are read back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.attention import Keys, Part, Plain, Values
from runtime.entries import IntegerKeys, IntegerValues, KeysInPart
from runtime.pool import Allocate, Rows, SlotPool, take_rows
from runtime.quantise import (
    bits_of,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    fp8_of,
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
        size = (shape.layers, shape.lanes, shape.heads, waiting, shape.head_dim)
        self.keys = allocate(size, shape.dtype)
        self.start = [shape.positions] * shape.layers  # first position whose group is open
        self.filled = [0] * shape.layers  # tokens of that group that are there

    def waiting(self, layer: int) -> Tensor:
        """Keys of the open group, [lane, token, head, channel]."""
        return self.keys[layer, :, :, : self.filled[layer]].transpose(1, 2)

    def groups(self, positions: int) -> int:
        return 1 if self.group_tokens is None else -(-positions // self.group_tokens)

    def group_of(self, positions: Tensor) -> Tensor:
        return torch.zeros_like(positions) if self.group_tokens is None else positions // self.group_tokens

    def read(self, layer: int, positions: Tensor, stored: Tensor) -> Tensor:
        """``stored`` keys, those of the open group replaced by what they were."""
        if self.group_tokens is None:
            return stored
        keys = take_rows(self.keys[layer], positions % self.group_tokens)
        return torch.where((positions >= self.start[layer])[..., None, None], keys, stored)


class Tier:
    """Keys and values [lane, token, head, channel] in and out; what lies between is the format's affair.

    Native ones may lie on another device than the rest: that one then attends to them.
    """

    def __init__(
        self,
        kv_format: KvFormat,
        shape: KvShape,
        slots: int,
        allocate: Allocate,
        open_keys: OpenKeys,
        *,
        device: torch.device,
    ) -> None:
        self.kv_format, self.shape, self.open_keys = kv_format, shape, open_keys
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
        ranges = (shape.layers, shape.lanes, shape.heads, groups, 2, shape.head_dim)
        self.ranges = torch.zeros(ranges, dtype=torch.float16, device=device)

    @property
    def widens(self) -> bool:
        """Whether keys and values are written widened before they are attended to: those beside wanted ones should not be."""
        return self.kv_format is not KvFormat.NATIVE and self.pool.device.type != "cpu"

    def put(self, layer: int, positions: Tensor, valid: Tensor, k: Tensor, v: Tensor) -> None:
        keys = encode_keys(k, self.kv_format, self._ranges(layer, positions))
        self.pool.put(layer, positions, valid, {"k": keys, **encode_values(v, self.kv_format)})

    def bear(self, layer: int, positions: Tensor, valid: Tensor, k: Tensor, v: Tensor) -> None:
        """The same for newborn tokens: their keys wait in the open group, if there is one, and are stored with it."""
        if self.kv_format.is_grouped and self.open_keys.group_tokens is not None:
            self.pool.put(layer, positions, valid, encode_values(v, self.kv_format))
        else:
            self.put(layer, positions, valid, k, v)

    def take(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(layer, positions, self.pool.take(layer, positions))

    def list(self, layer: int, positions: Tensor, attended: Tensor) -> Part:
        """The tokens at ``positions`` [lane, token]."""
        return self._part(layer, positions, attended, self.pool.take(layer, positions), frozen=True)

    def all(self, layer: int, slots: int, attended: Callable[[Tensor], Tensor], *, frozen: bool) -> Part:
        """The first ``slots`` slots; ``attended`` says of their positions, those of empty slots among them, which count."""
        held, rows = self.pool.rows(layer, slots)
        positions = held.to(self.open_keys.keys.device)
        return self._part(layer, positions, attended(positions), rows, frozen=frozen)

    def waiting(self, layer: int, positions: Tensor, attended: Tensor) -> Part:
        """The tokens of the open group, whose keys are there as they are; ``positions`` [lane, token] are theirs."""
        values = self._values(self.pool.take(layer, positions, without="k"))
        keys = Plain(entries=self.open_keys.waiting(layer))
        return Part(positions=positions, attended=attended, keys=keys, values=values)

    def freeze(self, layer: int, group: int, positions: Tensor, keys: Tensor) -> None:
        """Fix a group's ranges from all its keys, and store those keys of it that are held."""
        if not self.kv_format.is_grouped:
            return
        self.ranges[layer, :, :, group] = key_range(keys, bits_of(self.kv_format)).transpose(1, 2)
        if self.open_keys.group_tokens is not None:
            stored = encode_keys(keys, self.kv_format, self._ranges(layer, positions))
            self.pool.rewrite(layer, positions, {"k": stored})

    def _part(self, layer: int, positions: Tensor, attended: Tensor, rows: Rows, *, frozen: bool) -> Part:
        if self.widens and not frozen:
            return Part.of(*self._decode(layer, positions, rows), positions, attended)
        keys = self._keys(layer, positions, rows["k"])
        return Part(positions=positions, attended=attended, keys=keys, values=self._values(rows))

    def _keys(self, layer: int, positions: Tensor, stored: Tensor) -> Keys:
        """On the CPU as they are stored, those of the open group as they wait; elsewhere widened, and none of them waits."""
        if self.kv_format.is_grouped and not self.widens:
            start, waiting = self.open_keys.start[layer], self.open_keys.waiting(layer)
            frozen = max(1, self.open_keys.groups(start))
            groups = self.open_keys.group_of(positions).clamp(max=frozen - 1)
            ranges = self.ranges[layer, :, :, :frozen]
            keys = IntegerKeys(levels=stored, ranges=ranges, groups=groups, kv_format=self.kv_format)
            if waiting.shape[1] == 0:
                return keys
            return KeysInPart(stored=keys, waiting=Plain(entries=waiting), positions=positions, start=start)
        if self.kv_format is KvFormat.FP8 and not self.widens:
            return Plain(entries=fp8_of(stored))
        by_channel = self._ranges(layer, positions)
        return Plain(entries=decode_keys(stored, self.kv_format, by_channel, self.shape.dtype))

    def _values(self, rows: Rows) -> Values:
        if self.kv_format.is_grouped and not self.widens:
            return IntegerValues(levels=rows["v"], ranges=rows["v_range"], kv_format=self.kv_format)
        if self.kv_format is KvFormat.FP8 and not self.widens:
            return Plain(entries=fp8_of(rows["v"]))
        return Plain(entries=decode_values(rows, self.kv_format, self.shape.dtype))

    def _decode(self, layer: int, positions: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        keys = decode_keys(rows["k"], self.kv_format, self._ranges(layer, positions), self.shape.dtype)
        if self.kv_format.is_grouped:
            keys = self.open_keys.read(layer, positions, keys)
        return keys, decode_values(rows, self.kv_format, self.shape.dtype)

    def _ranges(self, layer: int, positions: Tensor) -> Tensor | None:
        """Of each token, [lane, token, head, 2, channel]."""
        if not self.kv_format.is_grouped:
            return None
        groups = self.open_keys.group_of(positions).clamp(max=self.ranges.shape[3] - 1)
        return take_rows(self.ranges[layer], groups)


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
            waiting = k[:, complete * size :].transpose(1, 2)
            self.open_keys.filled[layer] = waiting.shape[2]
            self.open_keys.keys[layer][:, :, : waiting.shape[2]] = waiting

    def closes(self, position: int) -> bool:
        """Whether the token at ``position`` completes a group, whose stored keys are then written anew."""
        size = self.open_keys.group_tokens
        return bool(self.tiers) and size is not None and (position + 1) % size == 0

    def bear(self, layer: int, position: int, k: Tensor) -> None:
        """The key of the newborn token, [lane, 1, head, channel], which is stored already."""
        size = self.open_keys.group_tokens
        if not self.tiers or size is None:
            return
        self.open_keys.keys[layer][:, :, position % size] = k[:, 0]
        self.open_keys.filled[layer] = (position + 1) % size
        if self.closes(position):
            self.open_keys.start[layer] = position + 1
            keys = self.open_keys.keys[layer].transpose(1, 2)
            self._freeze(layer, position // size, position + 1 - size, keys)

    def _freeze(self, layer: int, group: int, first: int, keys: Tensor) -> None:
        positions = torch.arange(first, first + keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
        for tier in self.tiers:
            tier.freeze(layer, group, positions, keys)

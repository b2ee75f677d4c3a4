"""Launches the Triton kernels with shapes read off their tensors."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sim.capture import attention_parts
from sim.spec import ModelSpec

EXCHANGED_HEADS = 32  # that a program moves at once
_WIDE, _EXCHANGING_WIDE, _EXCHANGING = 4096, 2, 4
_LEAST_CHAINED_ROWS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where scores [lane, query head, width] go, with their peaks and sums [lane, query head]."""

    scores: Tensor
    peaks: Tensor
    sums: Tensor

    @classmethod
    def none(cls, anything: Tensor) -> "Weights":
        """What a kernel is given that writes no weights."""
        return cls(scores=anything, peaks=anything, sums=anything)


class Launcher:
    """Kernels over one wave's lanes."""

    def __init__(self, spec: ModelSpec, padding: Tensor) -> None:
        self.kernels = kernels()
        self.exchanging = exchanging(spec, padding.shape[0])
        self.heads, self.group, self.channels = spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim
        self.padding = padding.to(torch.int32)
        self.padded = power_of_two(spec.head_dim)
        self.chained = chains(padding.device, padding.shape[0])
        if self.group > 1:
            self.parts = Parts.of(padding, self.heads, self.group, self.channels)

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.heads * self.group

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        attended: Tensor,
        *,
        counts: Tensor,
        slots: Tensor | None = None,
        weights: Weights | None = None,
        far: tuple[Tensor, ...] | None = None,
        staged: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Queries [lane, query head, channel], newborn keys and values [lane, head, channel] (rows of one tensor, or each
        of its own) over the slots of ``keys``, then ``far``: all of them, or those listed in ``slots`` [lane, width].

        With ``staged`` [lane, head, row, channel] these come after the slots of ``keys``, and ``far`` is
        [lane, slot, head, channel].
        """
        rows = (q, k, v, keys, values, keys if slots is None else slots, counts, self.padding)
        sizes = (
            0 if counts.shape[0] == 1 else 1,
            self.heads,
            keys.shape[2],
            far[0].shape[1 if staged else 2] if far else 0,
            staged[0].shape[2] if staged else 0,
            0 if slots is None else slots.shape[1],
        )
        kinds = {
            "CHANNELS": self.channels,
            "LISTED": slots is not None,
            "WEIGHED": weights is not None,
            "FAR": far is not None and staged is None,
            "STAGED": staged is not None,
        }
        launch = self._attend_alone if self.group == 1 else self._attend_in_groups
        elsewhere = (*(far or (keys, keys)), *(staged or (keys, keys)))
        launch(rows, elsewhere, weights or Weights.none(keys), attended, sizes, kinds)

    def _attend_alone(
        self,
        rows: tuple[Tensor, ...],
        elsewhere: tuple[Tensor, ...],
        weights: Weights,
        attended: Tensor,
        sizes: tuple[int, ...],
        kinds: dict[str, Any],
    ) -> None:
        q = rows[0]
        self.kernels.attend[q.shape[0], self.heads](
            *rows,
            attended,
            *elsewhere,
            weights.scores,
            weights.peaks,
            weights.sums,
            self.channels**-0.5,
            q.stride(0),
            *sizes,
            PADDED=self.padded,
            BLOCK=32,  # with one warp, the best of those tried on an H200: see benchmarks/NOTES.md
            CHAINED=self.chained,
            num_warps=1,
            **kinds,
        )

    def _attend_in_groups(
        self,
        rows: tuple[Tensor, ...],
        elsewhere: tuple[Tensor, ...],
        weights: Weights,
        attended: Tensor,
        sizes: tuple[int, ...],
        kinds: dict[str, Any],
    ) -> None:
        q, k, parts, module = rows[0], rows[1], self.parts, _grouped_kernels()
        module.attend[q.shape[0], self.heads, parts.count](
            *rows,
            parts.mixed,
            parts.peaks,
            parts.totals,
            *elsewhere,
            weights.scores,
            self.channels**-0.5,
            q.stride(0),
            k.stride(0),
            *sizes,
            GROUP=self.group,
            ROWS=max(16, power_of_two(self.group)),
            PADDED=max(16, self.padded),
            BLOCK=64,
            PARTS=parts.count,
            PRECISION="ieee",  # of float32; 16-bit products are exact
            num_warps=4,
            **kinds,
        )
        merge(parts, attended, weights if kinds["WEIGHED"] else None)

    def exchange(self, moves: Tensor, counts: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> None:
        """Carry out ``moves`` [lane, entry, 4] between ``near`` [lane, head, slot, channel] and ``far`` [lane, slot, …]."""
        lanes = moves.shape[0]
        self.kernels.exchange[(self.exchanging,)](
            moves,
            counts,
            *near,
            *far,
            lanes,
            self.heads,
            near[0].shape[2],
            far[0].shape[1],
            moves.shape[1],
            CHANNELS=self.channels,
            PADDED=self.padded,
            HEADS=min(EXCHANGED_HEADS, power_of_two(self.heads)),
            num_warps=8,
        )


def exchanging(spec: ModelSpec, lanes: int) -> int:
    """Programs that exchange tokens beside products, each of which holds an SM: products of wide layers leave few of an H200's
    132 free, and take long enough for fewer programs. OPT-6.7B's steps of 128 sequences take 217 us a layer beside 2 programs,
    225 beside 4 and 238 beside 8, 213 with nothing to exchange.
    """
    return min(lanes, _EXCHANGING_WIDE if spec.hidden >= _WIDE else _EXCHANGING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the parts of a lane's tokens give, until they are merged: [part, lane, query head, channel] and without channels."""

    mixed: Tensor
    peaks: Tensor
    totals: Tensor

    @property
    def count(self) -> int:
        return self.mixed.shape[0]

    @classmethod
    def of(cls, padding: Tensor, heads: int, group: int, channels: int) -> "Parts":
        """As many as ``sim.capture`` says."""
        count = attention_parts(padding.shape[0], heads, heads * group) if padding.is_cuda else 2
        shape = (count, padding.shape[0], heads * group)
        mixed = torch.zeros((*shape, channels), device=padding.device)
        return cls(mixed=mixed, peaks=torch.zeros(shape, device=padding.device), totals=torch.ones_like(mixed[..., 0]))


def merge(parts: Parts, attended: Tensor, weights: Weights | None = None) -> None:
    """What ``parts`` gave, put together in ``attended`` [lane, query head, channel]; peaks and sums where ``weights`` ask."""
    lanes, queries, channels = attended.shape
    told = weights or Weights.none(attended)
    _grouped_kernels().merge[(lanes * queries,)](
        parts.mixed,
        parts.peaks,
        parts.totals,
        attended,
        told.peaks,
        told.sums,
        lanes * queries,
        CHANNELS=channels,
        PADDED=power_of_two(channels),
        PARTS=parts.count,
        PADDED_PARTS=power_of_two(parts.count),
        WEIGHED=weights is not None,
        num_warps=1,
    )


def kernels() -> ModuleType:
    """The module of kernels, imported where they first run: machines without a GPU may lack Triton."""
    from runtime.graph import kernels as module

    return module


def _grouped_kernels() -> ModuleType:
    from runtime.graph import grouped_kernels as module

    return module


def chains(device: torch.device, rows: int) -> bool:
    """Whether a kernel is launched before the one ahead of it ends (programmatic dependent launch), from Hopper on.

    Measured it gains 5 % at 64 rows and, of products alone, 1 to 2 % at 18, and costs 13 % at 13: see benchmarks/NOTES.md.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and rows >= _LEAST_CHAINED_ROWS


def power_of_two(value: int) -> int:
    """The first that is not less."""
    return int(1 << max(0, value - 1).bit_length())

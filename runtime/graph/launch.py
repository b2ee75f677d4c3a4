"""Launches the Triton kernels with shapes read off their tensors."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sim.spec import ModelSpec

_LEAST_CHAINED_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What lanes attend to, [lane, width], and where scores [lane, head, width] go, with peaks and sums [lane, head]."""

    slots: Tensor
    scores: Tensor
    peaks: Tensor
    sums: Tensor


class Launcher:
    """Kernels over one wave's lanes."""

    def __init__(self, spec: ModelSpec, padding: Tensor) -> None:
        self.kernels = kernels()
        self.heads, self.channels = spec.heads, spec.head_dim
        self.padding = padding.to(torch.int32)
        self.padded = power_of_two(spec.head_dim)
        self.chained = chains(padding.device, padding.shape[0])

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
        listed: Listed | None = None,
        far: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Queries, newborn keys and values [lane, head, channel] (rows of one tensor) over the slots of ``keys``, then ``far``."""
        lanes, dummy = q.shape[0], keys
        self.kernels.attend[lanes, self.heads](
            q,
            k,
            v,
            keys,
            values,
            listed.slots if listed else dummy,
            counts,
            self.padding,
            attended,
            *(far or (dummy, dummy)),
            listed.scores if listed else dummy,
            listed.peaks if listed else dummy,
            listed.sums if listed else dummy,
            self.channels**-0.5,
            q.stride(0),
            0 if counts.shape[0] == 1 else 1,
            self.heads,
            keys.shape[2],
            far[0].shape[2] if far else 0,
            listed.slots.shape[1] if listed else 0,
            CHANNELS=self.channels,
            PADDED=self.padded,
            BLOCK=32,  # with one warp, the best of those tried on an H200: see benchmarks/NOTES.md
            LISTED=listed is not None,
            FAR=far is not None,
            CHAINED=self.chained,
            num_warps=1,
        )

    def exchange(self, moves: Tensor, counts: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> None:
        """Carry out ``moves`` [lane, entry, 4] between ``near`` [lane, head, slot, channel] and ``far`` [lane, slot, …]."""
        at_once, lanes = min(8, power_of_two(self.heads)), moves.shape[0]
        turns = next(turns for turns in (16, 4, 1) if lanes % turns == 0)
        self.kernels.exchange[lanes // turns, -(-self.heads // at_once)](
            moves,
            counts,
            *near,
            *far,
            self.heads,
            near[0].shape[2],
            far[0].shape[1],
            moves.shape[1],
            CHANNELS=self.channels,
            PADDED=self.padded,
            HEADS=at_once,
            LANES=turns,
            num_warps=4,
        )


def kernels() -> ModuleType:
    """The module of kernels, imported where they first run: machines without a GPU may lack Triton."""
    from runtime.graph import kernels as module

    return module


def chains(device: torch.device, rows: int) -> bool:
    """Whether a kernel is launched before the one ahead of it ends (programmatic dependent launch), from Hopper on.

    Measured on an H200 it gains 5 % at 64 rows and costs 13 % at 13: see benchmarks/NOTES.md.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and rows >= _LEAST_CHAINED_ROWS


def power_of_two(value: int) -> int:
    """The first that is not less."""
    return int(1 << max(0, value - 1).bit_length())

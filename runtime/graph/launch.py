"""Launches the Triton kernels with shapes read off their tensors."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from runtime.models.decoder import Affine
from sim.spec import ModelSpec


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
    ) -> None:
        """Queries, newborn keys and values [lane, head, channel] (rows of one tensor) over the slots of ``keys``."""
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
            listed.scores if listed else dummy,
            listed.peaks if listed else dummy,
            listed.sums if listed else dummy,
            self.channels**-0.5,
            q.stride(0),
            0 if counts.shape[0] == 1 else 1,
            self.heads,
            keys.shape[2],
            listed.slots.shape[1] if listed else 0,
            CHANNELS=self.channels,
            PADDED=self.padded,
            BLOCK=32,
            LISTED=listed is not None,
            num_warps=1,
        )

    def exchange(self, moves: Tensor, counts: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> None:
        """Carry out ``moves`` [lane, entry, 4] between ``near`` [lane, head, slot, channel] and ``far`` [lane, slot, …]."""
        at_once = min(8, power_of_two(self.heads))
        self.kernels.exchange[moves.shape[0], -(-self.heads // at_once)](
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
            num_warps=4,
        )


def add_norm(x: Tensor, added: Tensor | None, norm: Affine, eps: float, normed: Tensor) -> None:
    """``x`` [row, hidden] += ``added``, and its layer norm in ``normed``."""
    width = x.shape[1]
    kernels().add_norm[(x.shape[0],)](
        x,
        x if added is None else added,
        norm.weight,
        norm.weight if norm.bias is None else norm.bias,
        normed,
        width,
        eps,
        WIDTH=power_of_two(width),
        ADDS=added is not None,
        BIASED=norm.bias is not None,
        num_warps=8 if width > 1024 else 1,
    )


def kernels() -> ModuleType:
    """The module of kernels, imported where they first run: machines without a GPU may lack Triton."""
    from runtime.graph import kernels as module

    return module


def power_of_two(value: int) -> int:
    """The first that is not less."""
    return int(1 << max(0, value - 1).bit_length())

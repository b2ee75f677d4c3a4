"""What a token's row is where dense tokens stream in, all lanes' of one layer together, and attention over such rows."""

from math import gcd
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from runtime.graph.schedule import Row, Widths
from runtime.models import Decoder
from sim.plan import Plan


class Addressed(NamedTuple):
    """Where one layer's tokens lie: ``slots`` [slot, *row] and staging in the ``block``; others ``on_host`` [token, *row], from
    position ``kept_from`` on. ``listed`` [row, number] is what ``Rows.listed`` says, ``places`` [row, 7] as in ``streamed``.
    """

    layer: int
    layers: int
    buffers: int
    block: Tensor
    slots: Tensor
    on_host: Tensor
    kept_from: int
    listed: Tensor
    places: Tensor
    row: Tensor
    padding: Tensor
    from_front: bool
    widths: Widths


class Rows(Protocol):
    """Rows of ``shape`` and ``dtype``; ``kv_bytes`` of HBM are kept besides."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kv_bytes: int

    def widths(self, buffers: int, inputs: int) -> Widths:
        """In elements of ``dtype``, of one lane; ``inputs`` are entries of the compute type."""

    def listed(self, row: Row) -> tuple[int, ...]:
        """What attention looks up of a step's slots."""

    def planes(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Of ``rows`` [token, *row] the parts that are stored, each [token, lane, ...]."""

    def stored(self, layer: int, lanes: slice, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Of a prompt's keys and values [lane, token, head, channel] the same parts, [lane, token, ...]."""

    def attend(self, at: Addressed, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        """Store the newborn token and attend to all."""


class NativeRows:
    """As they are computed: [lane, key or value, head, channel]."""

    kv_bytes = 0

    def __init__(self, plan: Plan, decoder: Decoder, lanes: int) -> None:  # noqa: ARG002
        self.spec = decoder.spec
        self.shape: tuple[int, ...] = (lanes, 2, self.spec.kv_heads, self.spec.head_dim)
        self.dtype = decoder.dtype

    def widths(self, buffers: int, inputs: int) -> Widths:
        kv = 2 * self.spec.kv_dim
        return Widths(slot=self.spec.layers * kv, kv=kv, again=kv, inputs=inputs, buffers=buffers)

    def listed(self, row: Row) -> tuple[int, ...]:
        """Which token each slot holds."""
        return row.positions

    def planes(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[:, :, 0], rows[:, :, 1]

    def stored(self, layer: int, lanes: slice, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        return k, v

    def attend(self, at: Addressed, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        from runtime.graph import streamed_kernels  # machines without a GPU may lack Triton

        spec = self.spec
        streamed_kernels.attend[spec.heads, attended.shape[0]](
            q,
            k,
            v,
            at.slots,
            at.listed,
            at.block,
            at.places,
            at.row,
            at.padding,
            attended,
            spec.head_dim**-0.5,
            q.stride(0),
            k.stride(0),
            at.slots.stride(0),
            spec.heads,
            spec.kv_heads,
            at.listed.shape[1],
            at.layer,
            at.layers,
            BUFFERS=at.buffers,
            FROM_FRONT=at.from_front,
            UNIT=gcd(8, at.widths.kv, at.widths.inputs),  # every place in the block is a multiple: eight are 16 bytes
            CHANNELS=spec.head_dim,
            PADDED=power_of_two(spec.head_dim),
            BLOCK=32,
            num_warps=1,
        )

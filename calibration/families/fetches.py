"""Tokens fetched from pinned memory by recall's kernel: by the size of a token and by programs, alone and beside products.

What the runtime's own number of programs takes is ``fetch``: nothing runs beside it. ``fetch_beside`` is with as few as
exchange tokens under a window, beside the products. Other numbers, ``fetch_blocks`` and ``fetch_blocks_beside``, are for the
reader: whether those are the right ones. With 0 programs products run alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.graph.fetching import PROGRAMS, fetch
from runtime.graph.pinned import registered
from sim.units import MIB

_BESIDE = 32
_PROGRAMS = (PROGRAMS, 8, _BESIDE)
_CHANNELS, _HEAD = (4096, 1024), 128  # of a token's keys, and of one head
_BYTES = 128 * MIB  # keys and values; alone, one half is fetched after the other
_PRODUCTS, _SHAPE = 20, (64, 4096, 16384)  # shorter than all of the bytes take


def cases(scope: Scope) -> Iterator[Case]:
    """Of a GPU: there is no such kernel elsewhere."""
    if not scope.on_gpu:
        return
    rows, inputs, outputs = _SHAPE
    beside = f"rows={rows} inputs={inputs} outputs={outputs} products={_PRODUCTS}"
    for channels in scope.some(_CHANNELS):
        for programs in scope.some(_PROGRAMS):
            family = "fetch" if programs == PROGRAMS else "fetch_blocks"
            words, half = f"channels={channels} programs={programs}", _BYTES // 2
            halves = partial(_alone, scope, channels, programs)
            yield timed(scope, family, f"{words} bytes={half}", halves, size_bytes=half)
            both = partial(_products_beside, scope, channels, programs)
            family = "fetch_beside" if programs == _BESIDE else "fetch_blocks_beside"
            yield timed(scope, family, f"{words} {beside}", both, captured=False)
    alone = partial(_products_beside, scope, 0, 0)
    yield timed(scope, "fetch_blocks_beside", f"channels=0 programs=0 {beside}", alone, captured=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Of one lane, on the host and with a slot for each on the device; ``order`` is a permutation of them."""

    here: tuple[Tensor, Tensor]
    there: tuple[Tensor, Tensor]
    order: Tensor

    @classmethod
    def of(cls, scope: Scope, channels: int) -> "_Tokens":
        count, heads = _BYTES // (2 * channels * scope.dtype.size_bytes), channels // _HEAD
        there, here = (1, count, heads, _HEAD), (1, heads, count, _HEAD)
        keys, values = (registered(scope.device, there, scope.torch_dtype) for _ in range(2))
        slots = torch.zeros((2, *here), dtype=scope.torch_dtype, device=scope.device)
        order = torch.randperm(count, device=scope.device).to(torch.int32)
        return cls(here=(slots[0], slots[1]), there=(keys, values), order=order)

    def fetched(self, chosen: Tensor, programs: int) -> Call:
        """Each chosen token to the slot of its own number."""
        listed = chosen.sort().values[None, :, None].expand(1, -1, 2).contiguous()
        counts = torch.full((1, 1), len(chosen), dtype=torch.int32, device=chosen.device)
        row = torch.zeros(1, dtype=torch.int64, device=chosen.device)
        return lambda: fetch(listed, counts, row, self.here, self.there, programs=programs)


def _alone(scope: Scope, channels: int, programs: int) -> list[Call]:
    tokens = _Tokens.of(scope, channels)
    return [tokens.fetched(half, programs) for half in tokens.order.chunk(2)]


def _products_beside(scope: Scope, channels: int, programs: int) -> list[Call]:
    """Products while another stream fetches for longer than they take, or nothing."""
    side = torch.cuda.Stream(scope.device)  # type: ignore[no-untyped-call]
    tokens = _Tokens.of(scope, channels) if programs else None
    brought = list[Call]() if tokens is None else [tokens.fetched(tokens.order, programs)]
    rows, inputs, outputs = _SHAPE
    x = scope.normal(rows, inputs)
    products = each(
        lambda weight: torch.nn.functional.linear(x, weight), [scope.normal(outputs, inputs) for _ in range(_PRODUCTS)]
    )

    def beside() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for fetched in brought:
                fetched()
        for product in products:
            product()

    return [beside]

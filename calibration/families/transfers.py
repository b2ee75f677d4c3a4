"""Bytes between host and device, and rows gathered from either: copies, both ways and beside work, and the pool's reads."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.memory import device_zeros, host_zeros
from runtime.pool import SlotPool
from sim.units import GIB, KIB, MIB

_SIZES = tuple(4 * KIB * 4**power for power in range(10))  # to 1 GiB
_GATHERED = (256 * KIB, 2 * MIB, 64 * MIB)
_ROWS = (256, 1024, 4096, 16384)


def copies(scope: Scope) -> Iterator[Case]:
    """One direction alone, from pinned and pageable memory, then both at once. On a CPU: between two buffers."""
    sizes = [size for size in scope.some(_SIZES) if size <= scope.most_bytes]
    kinds = ("pinned", "pageable") if scope.on_gpu else ("pinned",)
    for memory in kinds:
        for size in sizes if memory == "pinned" else sizes[::2]:  # the latter no constant prices
            for to in ("device", "host") if scope.on_gpu else ("device",):
                words = f"to={to} memory={memory} bytes={size}"
                yield timed(scope, "copy", words, _copier(scope, size, memory, to), size_bytes=size, captured=False)
    if scope.on_gpu:
        for size in (MIB, 64 * MIB):
            words = f"bytes={size}"
            yield timed(scope, "duplex", words, partial(_both_ways, scope, size), size_bytes=2 * size, captured=False)
        yield timed(
            scope,
            "copy_beside",
            f"bytes={64 * MIB}",
            lambda: _beside_a_pass(scope),
            size_bytes=64 * MIB,
            captured=False,
        )


def gathers(scope: Scope) -> Iterator[Case]:
    """Scattered rows by the pool's own reads: from HBM and from host memory."""
    for size in scope.some(_GATHERED):
        if size > scope.most_bytes / 4:
            continue
        for row in scope.some(_ROWS):
            for source in ("hbm", "host"):
                words = f"from={source} bytes={size} row={row}"
                yield timed(
                    scope, "gather", words, _gatherer(scope, size, row, source), size_bytes=size, captured=scope.on_gpu
                )


def _copier(scope: Scope, size: int, memory: str, to: str) -> Callable[[], list[Call]]:
    def prepare() -> list[Call]:
        pairs = [_pair(scope, size, memory) for _ in range(min(8, scope.copies(2 * size)))]
        if to == "device":
            return each(lambda pair: pair[1].copy_(pair[0], non_blocking=True), pairs)
        return each(lambda pair: pair[0].copy_(pair[1], non_blocking=True), pairs)

    return prepare


def _pair(scope: Scope, size: int, memory: str) -> tuple[Tensor, Tensor]:
    """Host memory and as much of the device's."""
    pinned = memory == "pinned" and scope.on_gpu
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    return host, torch.ones(size, dtype=torch.uint8, device=scope.device)


def _both_ways(scope: Scope, size: int) -> list[Call]:
    """Several copies each way, so that both streams are busy for nearly all of the time."""
    inward, outward = (torch.cuda.Stream(scope.device) for _ in range(2))  # type: ignore[no-untyped-call]
    pairs = [(_pair(scope, size, "pinned"), _pair(scope, size, "pinned")) for _ in range(4)]

    def call(both: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        main = torch.cuda.current_stream()
        for stream, (target, source) in ((inward, both[0][::-1]), (outward, both[1])):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        main.wait_stream(inward)
        main.wait_stream(outward)

    return each(call, pairs)


def _beside_a_pass(scope: Scope) -> list[Call]:
    """A copy to the device while a kernel keeps HBM busy; the time of both together."""
    side = torch.cuda.Stream(scope.device)  # type: ignore[no-untyped-call]
    host, device = _pair(scope, 64 * MIB, "pinned")
    data = torch.ones(GIB, dtype=torch.uint8, device=scope.device)

    def call() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            device.copy_(host, non_blocking=True)
        data.add_(1)
        data.add_(1)
        main.wait_stream(side)

    return [call] * 4


def _gatherer(scope: Scope, size: int, row: int, source: str) -> Callable[[], list[Call]]:
    def prepare() -> list[Call]:
        slots = max(1, size // row)
        reads = [_read(scope, slots, row, source) for _ in range(min(4, scope.copies(2 * size)))]
        return each(lambda read: read(), reads)

    return prepare


def _read(scope: Scope, tokens: int, row: int, source: str) -> Call:
    """A pool of twice as many tokens as are read, sorted ones at random."""
    memory = host_zeros if source == "host" else device_zeros
    planes = {"k": ((1, row // scope.dtype.size_bytes), scope.torch_dtype)}
    pool = SlotPool(
        planes,
        layers=1,
        lanes=1,
        slots=2 * tokens,
        positions=2 * tokens,
        device=scope.device,
        allocate=lambda shape, dtype: memory(scope.device, shape, dtype),
    )
    pool.slot_of[0, 0, : 2 * tokens] = torch.arange(2 * tokens, device=scope.device)
    chosen = torch.randperm(2 * tokens, device=scope.device)[:tokens].sort().values[None]
    return lambda: pool.take(0, chosen)

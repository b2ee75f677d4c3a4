"""Seconds of repeated work. What touches CUDA's clocks and graphs is here; the rest of the package runs on any device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.streams import warming_stream

Call = Callable[[], object]
_LEAST, _MOST = 5, 40  # samples
_SLEEP_CYCLES = 2_000_000  # about a millisecond: long enough to queue some twenty calls behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, and the tenth and ninetieth percentiles, of ``samples``."""

    seconds: float
    low_s: float
    high_s: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            seconds=_at(ordered, 0.5 * last),
            low_s=_at(ordered, 0.1 * last),
            high_s=_at(ordered, 0.9 * last),
            samples=len(ordered),
        )


class Timer(Protocol):
    """Times ``calls`` one after the other, again and again, and gives the seconds of one of them.

    Calls work on buffers of their own, together larger than any cache. ``captured`` ones become one graph where there
    are graphs; others are queued, so that what launching costs the host is not counted.
    """

    def time(self, calls: Sequence[Call], *, captured: bool, budget_s: float) -> Spread: ...


class CpuTimer:
    """By the host's clock."""

    def time(self, calls: Sequence[Call], *, captured: bool, budget_s: float) -> Spread:  # noqa: ARG002
        def once() -> float:
            start_s = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start_s) / len(calls)

        return _sampled(once, budget_s)


class CudaTimer:
    """By events in the current stream."""

    def time(self, calls: Sequence[Call], *, captured: bool, budget_s: float) -> Spread:
        work = _graph_of(calls) if captured else _queued(calls)

        def once() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if not captured:
                torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / len(calls)

        spread = _sampled(once, budget_s)
        torch.cuda.synchronize()  # what another stream still reads must not be freed
        return spread


class Untimed:
    """Makes each call once, which compiles what it needs, and makes up the seconds."""

    def time(self, calls: Sequence[Call], *, captured: bool, budget_s: float) -> Spread:  # noqa: ARG002
        for call in calls:
            call()
        return Spread.of([1.0])


def timer_for(device: torch.device) -> Timer:
    """The clock of ``device``."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def _graph_of(calls: Sequence[Call]) -> Call:
    """All calls as one graph, after a run of each that compiles its kernels."""
    stream = warming_stream(torch.device("cuda"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _queued(calls: Sequence[Call]) -> Call:
    def work() -> None:
        for call in calls:
            call()

    return work


def _sampled(once: Callable[[], float], budget_s: float) -> Spread:
    """As many samples as the budget allows, after one that is not counted."""
    once()
    samples, end_s = list[float](), time.perf_counter() + budget_s
    while len(samples) < _LEAST or (len(samples) < _MOST and time.perf_counter() < end_s):
        samples.append(once())
    return Spread.of(samples)


def _at(ordered: Sequence[float], place: float) -> float:
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

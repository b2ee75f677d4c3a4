"""What happened, when, and on which resource. Simulated and measured runs give the same type."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any, NamedTuple

from sim.outcome import Outcome, Served, Utilisation, served_seconds
from sim.units import MICRO


class Resource(StrEnum):
    """A serial stream of work."""

    GPU = "gpu"
    H2D = "h2d"
    D2H = "d2h"
    CPU = "cpu"
    LAUNCH = "launch"  # the host's, of operations one by one: a thread of its own beside attention on the CPU


class Tier(StrEnum):
    """A memory that holds KV."""

    HBM = "hbm"
    HOST = "host"


class Span(NamedTuple):
    """One piece of work; ``layer`` is None for the head of a step, ``step`` 0 is the prefill. Seconds from the wave's start."""

    resource: Resource
    name: str
    step: int
    layer: int | None
    start_s: float
    end_s: float
    size_bytes: float = 0.0


class Level(NamedTuple):
    """Bytes that the KV pools of one tier hold from ``start_s`` on, seconds from the wave's start."""

    tier: Tier
    step: int
    start_s: float
    size_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveTrace:
    """``sequences`` that started together; ``repeats`` such waves ran one after the other, each as recorded.

    ``step_end_s`` has one entry a step, the prefill first; ``served`` says which steps give whom the first and last token.
    """

    sequences: int
    repeats: int
    served: tuple[Served, ...]
    spans: tuple[Span, ...]
    levels: tuple[Level, ...]
    step_end_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return self.step_end_s[-1]

    def busy_s(self, resource: Resource) -> float:
        return sum(span.end_s - span.start_s for span in self.spans if span.resource is resource)

    def moved_bytes(self, resource: Resource) -> float:
        return sum(span.size_bytes for span in self.spans if span.resource is resource)

    def peak_bytes(self, tier: Tier) -> float:
        return max((level.size_bytes for level in self.levels if level.tier is tier), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run of a workload. ``static_*_bytes`` is what the tiers hold besides the KV pools; ``source`` says who recorded it."""

    source: str
    output_tokens: int
    static_hbm_bytes: int
    static_host_bytes: int
    waves: tuple[WaveTrace, ...]

    @property
    def outcome(self) -> Outcome:
        """Totals, read off the spans."""
        batch = sum(wave.sequences * wave.repeats for wave in self.waves)
        makespan_s = sum(wave.seconds * wave.repeats for wave in self.waves)
        first_s = decode_s = start_s = 0.0
        for wave in self.waves:
            first, decode = served_seconds(wave.served, wave.step_end_s)
            first_s += wave.repeats * (wave.sequences * (start_s + wave.seconds * (wave.repeats - 1) / 2) + first)
            decode_s += wave.repeats * decode
            start_s += wave.seconds * wave.repeats
        busy = {which: self._total(WaveTrace.busy_s, which) / makespan_s for which in Resource}
        steps = self.output_tokens - 1
        return Outcome(
            makespan_s=makespan_s,
            tokens_per_s=batch * self.output_tokens / makespan_s,
            ttft_s=first_s / batch,
            tpot_s=decode_s / batch / steps if steps else None,
            peak_hbm_bytes=self.static_hbm_bytes + ceil(max(wave.peak_bytes(Tier.HBM) for wave in self.waves)),
            peak_host_bytes=self.static_host_bytes + ceil(max(wave.peak_bytes(Tier.HOST) for wave in self.waves)),
            h2d_bytes=round(self._total(WaveTrace.moved_bytes, Resource.H2D)),
            d2h_bytes=round(self._total(WaveTrace.moved_bytes, Resource.D2H)),
            utilisation=Utilisation(gpu=busy[Resource.GPU], h2d=busy[Resource.H2D], d2h=busy[Resource.D2H]),
        )

    def _total(self, measure: Any, resource: Resource) -> float:
        return float(sum(wave.repeats * measure(wave, resource) for wave in self.waves))


def chrome_events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Events of the Trace Event Format, which Perfetto and chrome://tracing open; each distinct wave is drawn once."""
    start_s = 0.0
    threads = {resource: number for number, resource in enumerate(Resource)}
    for resource, number in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": resource.value}}
    for wave in trace.waves:
        for span in wave.spans:
            args = {"step": span.step, "layer": span.layer, "bytes": span.size_bytes}
            if span.size_bytes and span.end_s > span.start_s:
                args["GB/s"] = round(span.size_bytes / (span.end_s - span.start_s) / 1e9, 2)
            yield {
                "ph": "X",
                "name": span.name,
                "pid": 0,
                "tid": threads[span.resource],
                "ts": (start_s + span.start_s) / MICRO,
                "dur": (span.end_s - span.start_s) / MICRO,
                "args": args,
            }
        for level in wave.levels:
            counter = {level.tier.value: level.size_bytes}
            yield {
                "ph": "C",
                "name": f"KV in {level.tier}",
                "pid": 0,
                "ts": (start_s + level.start_s) / MICRO,
                "args": counter,
            }
        start_s += wave.seconds

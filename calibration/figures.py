"""A run in the figures that simulation and machine are compared by."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sim.trace import Resource, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """``step_s`` are the first wave's, the prefill first; times per output token are those between two tokens of a sequence."""

    makespan_s: float
    ttft_s: float
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    moved_bytes: float
    peak_hbm_bytes: int
    step_s: tuple[float, ...]

    @classmethod
    def of(cls, trace: Trace, peak_hbm_bytes: int | None = None) -> "Figures":
        """``peak_hbm_bytes`` is what an allocator says, where there is one to ask."""
        outcome = trace.outcome
        between = sorted(
            (end_s - start_s, wave.sequences * wave.repeats)
            for wave in trace.waves
            for start_s, end_s in pairwise(wave.step_end_s)
        )
        ends = trace.waves[0].step_end_s
        moved = sum(
            wave.repeats * wave.moved_bytes(which) for wave in trace.waves for which in (Resource.H2D, Resource.D2H)
        )
        return cls(
            makespan_s=outcome.makespan_s,
            ttft_s=outcome.ttft_s,
            tpot_p50_s=_quantile(between, 0.5),
            tpot_p95_s=_quantile(between, 0.95),
            moved_bytes=moved,
            peak_hbm_bytes=outcome.peak_hbm_bytes if peak_hbm_bytes is None else peak_hbm_bytes,
            step_s=(ends[0], *(end_s - start_s for start_s, end_s in pairwise(ends))),
        )


def _quantile(ordered: Sequence[tuple[float, int]], share: float) -> float | None:
    """Of times that each stand for as many sequences as they say."""
    if not ordered:
        return None
    wanted, passed = share * sum(count for _, count in ordered), 0
    for seconds, count in ordered:
        passed += count
        if passed >= wanted:
            return seconds
    return ordered[-1][0]

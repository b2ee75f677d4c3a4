"""What a run amounts to, whether it was simulated, priced in closed form or measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """Busy share of each resource over the makespan."""

    gpu: float
    h2d: float
    d2h: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Figures of a whole workload.

    ``ttft_s`` is the mean over sequences of the time from the start of the work to their first token, waiting for
    their wave included. ``tpot_s`` is the mean time between two tokens of a sequence, None if only one is generated.
    ``peak_hbm_bytes`` counts weights, workspace and KV pools; ``peak_host_bytes`` KV pools and streamed weights.
    """

    makespan_s: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float | None
    peak_hbm_bytes: int
    peak_host_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    utilisation: Utilisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Sequences whose first and last tokens come out of the same two steps of a wave."""

    sequences: int
    first_step: int
    last_step: int


class ByStep(Protocol):
    """Numbers by step: a tuple or a column."""

    def __getitem__(self, step: int, /) -> Any: ...


def served_seconds(served: Iterable[Served], step_end_s: ByStep) -> tuple[float, float]:
    """Summed over sequences: seconds from the wave's start to the first token, and from the first to the last."""
    first = sum(some.sequences * float(step_end_s[some.first_step]) for some in served)
    last = sum(some.sequences * float(step_end_s[some.last_step]) for some in served)
    return first, last - first

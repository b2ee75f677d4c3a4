"""What a plan is judged by: weighted seconds of the prefills and decode steps of its waves."""

from dataclasses import dataclass

from planner.request import Objective, Request
from sim.counts import Column
from sim.outcome import Outcome
from sim.plan import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a second of each distinct wave's prefill, and of its decode steps together, counts; full wave first."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def of(self, step_s: tuple[Column, ...]) -> float:
        """Weighted seconds of the waves' steps, [step] each."""
        rows = zip(self.prefill, self.decode, step_s, strict=True)
        return sum(first * float(row[0]) + rest * float(row[1:].sum()) for first, rest, row in rows)


def objective_weights(objective: Objective, setting: Setting) -> Weights:
    """Weights whose sum is the makespan, the mean time between tokens, or the mean time to the first token."""
    sizes = setting.wave_sizes
    distinct = tuple(dict.fromkeys(sizes))
    batch, decode_steps = setting.workload.batch, max(1, setting.workload.decode_steps)
    if objective is Objective.THROUGHPUT:
        repeats = tuple(float(sizes.count(size)) for size in distinct)
        return Weights(prefill=repeats, decode=repeats)
    if objective is Objective.TPOT:
        shares = tuple(sizes.count(size) * size / batch / decode_steps for size in distinct)
        return Weights(prefill=(0.0,) * len(distinct), decode=shares)
    waits = tuple(_sequences_behind(sizes, size) / batch for size in distinct)
    own = tuple(sizes.count(size) * size / batch for size in distinct)
    return Weights(prefill=tuple(wait + first for wait, first in zip(waits, own, strict=True)), decode=waits)


def objective_of(outcome: Outcome, request: Request) -> float:
    """The same sum, read off what a plan comes to."""
    if request.objective is Objective.THROUGHPUT:
        return outcome.makespan_s
    return outcome.ttft_s if request.objective is Objective.TTFT else outcome.tpot_s or 0.0


def latency_weights(setting: Setting) -> Weights:
    """Weights whose sum is the mean time between tokens, which a user may bound."""
    return objective_weights(Objective.TPOT, setting)


def _sequences_behind(sizes: tuple[int, ...], size: int) -> int:
    """Sequences that wait for the waves of ``size``, counted once for each such wave before them."""
    return sum(sum(sizes[place + 1 :]) for place, own in enumerate(sizes) if own == size)

"""Continuous admission, whoever runs it: its rule, and what each machine step took, moved and held as a ``Trace``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from runtime.clock import Clock
from runtime.wave import BudgetExceeded
from sim.admission import Rules
from sim.flows import flows_of, home_columns
from sim.forecast import static_hbm_bytes, static_host_bytes
from sim.occupancy import occupancy_of
from sim.outcome import Served
from sim.plan import Plan, Setting
from sim.scheduled import page_rules, paged_bytes
from sim.trace import Level, Resource, Span, Tier, Trace, WaveTrace
from sim.units import format_bytes


def admission_rules(plan: Plan, sequences: int, held_bytes: Sequence[float] | None = None) -> Rules:
    """The simulator's rule for so many ``sequences``; ``held_bytes`` [step], where one holds other than it counts.

    Raises BudgetExceeded where not even one sequence fits.
    """
    setting, homes = plan.setting, home_columns(plan.homes)
    occupancy = occupancy_of(plan, homes, flows_of(plan, homes))
    held = tuple(held_bytes or paged_bytes(setting, occupancy.hbm).tolist())
    if max(held) > setting.kv_budget_bytes:
        raise BudgetExceeded(
            f"KV of {format_bytes(max(held))} is planned for one sequence, the plan's budget is "
            f"{format_bytes(setting.kv_budget_bytes)}: solve again for fewer tokens or more memory"
        )
    return replace(page_rules(setting, occupancy), batch=sequences, held_bytes=held)


class _Step(NamedTuple):
    """Two marks; bytes copied from and to the host; bytes that each tier held."""

    begin: int
    end: int
    moved: tuple[float, float]
    held: tuple[float, float]


class StepLog:
    """Machine steps, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.clock, self._begin = Clock(device), 0
        self._steps: list[_Step] = []

    def __len__(self) -> int:
        return len(self._steps)

    def begin(self) -> None:
        self._begin = self.clock.mark()

    def end(self, *, fetched_bytes: float, written_bytes: float, hbm_bytes: float, host_bytes: float) -> None:
        moved, held = (fetched_bytes, written_bytes), (hbm_bytes, host_bytes)
        self._steps.append(_Step(self._begin, self.clock.mark(), moved, held))

    def wait(self, step: int) -> None:
        """Until the GPU has done ``step``."""
        self.clock.wait(self._steps[step].end)

    def trace(self, setting: Setting, given: Sequence[Sequence[int]]) -> Trace:
        """``given`` are the steps that gave each sequence its tokens. Copies have bytes and no duration of their own."""
        seconds = self.clock.seconds()
        spans, levels = list[Span](), list[Level]()
        for number, step in enumerate(self._steps):
            start_s, end_s = seconds[step.begin], seconds[step.end]
            spans.append(Span(Resource.GPU, "step", number, None, start_s, end_s))
            both = zip((Resource.H2D, Resource.D2H), ("fetch", "write"), step.moved, strict=True)
            spans += [Span(which, name, number, None, end_s, end_s, size) for which, name, size in both if size]
            tiers = zip((Tier.HBM, Tier.HOST), step.held, strict=True)
            levels += [Level(tier, number, start_s, held) for tier, held in tiers]
        wave = WaveTrace(
            sequences=len(given),
            repeats=1,
            served=_served(given),
            spans=tuple(spans),
            levels=tuple(levels),
            step_end_s=tuple(seconds[step.end] for step in self._steps),
        )
        return Trace(
            source="measured",
            output_tokens=setting.workload.output_tokens,
            static_hbm_bytes=static_hbm_bytes(setting),
            static_host_bytes=static_host_bytes(setting),
            waves=(wave,),
        )


def _served(given: Sequence[Sequence[int]]) -> tuple[Served, ...]:
    ends = Counter((steps[0], steps[-1]) for steps in given)
    return tuple(Served(sequences=many, first_step=a, last_step=b) for (a, b), many in sorted(ends.items()))

"""Which tokens must leave HBM in each step, and how the choice that is left, recomputing or fetching them, is limited."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.coefficients import Coefficients
from sim.counts import Column, counts_of
from sim.plan import Placement

SLACK = 1e-9  # relative, where sums are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRange:
    """Between ``fewest`` and ``most`` tokens have their inputs saved at birth."""

    fewest: float
    most: float

    @property
    def width(self) -> float:
        return self.most - self.fewest


def any_saved(problem: Coefficients) -> SavedRange:
    """From no saved inputs to those of every token."""
    return SavedRange(fewest=0.0, most=float(counts_of(problem.setting).cached[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """At the steps that overflow HBM: the tokens off it, by ``second`` (tokens that are recomputed), between two limits.

    ``kv`` tokens are ``kv_base`` + ``kv_slope`` * second. [overflowing step] each.
    """

    steps: NDArray[np.intp]
    kv_base: Column
    kv_slope: Column
    lowest: Column
    highest: Column


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds, linear in the recomputed tokens."""

    base: Column
    slope: Column

    def at(self, tokens: Column) -> Column:
        return self.base + self.slope * tokens


def spill_of(problem: Coefficients, case: SavedRange) -> Spill:
    """Freeing just what is needed is cheapest, so a step's choice is one number: how many tokens are recomputed."""
    memory, counts = problem.memory, counts_of(problem.setting)
    saved = np.maximum(0.0, np.minimum(counts.cached, case.fewest) - counts.dead)
    need_all = memory.hbm_all_in + memory.hbm_per_saved * saved - memory.hbm_budget
    host_all = memory.host_all_in + memory.host_per_saved * saved
    steps = _spilling_steps(problem, (need_all > 0) | (host_all > memory.host_budget))
    need, kv_frees = np.maximum(need_all[steps], 0.0), memory.freed_by_kv[steps]
    second_frees, most = _second_home(problem, steps)
    most = np.minimum(most, np.maximum(0.0, case.most - counts.dead[steps]) / (1 + counts.copy_rate[steps]))
    enough = np.divide(need, second_frees, out=np.full_like(need, np.inf), where=second_frees > 0)
    enough = np.where(need > 0, enough, 0.0)
    lowest = np.where((kv_frees > 0) | (need == 0), 0.0, enough)
    kv_base, kv_slope = _fewest_kv(need, kv_frees, second_frees, most)
    highest = np.ceil(enough - SLACK)
    if problem.setting.placement is Placement.RECENT:
        off = _off_by_then(Line(kv_base, kv_slope + 1), lowest, highest, counts.dead[steps])
        kv_base, kv_slope = _higher(Line(kv_base, kv_slope), Line(off, -1.0 * (most > 0)), np.minimum(most, off) / 2)
        highest = np.maximum(highest, off)
    pool = counts.cached[steps] - 1 if problem.uses_forward else counts.pool[steps]
    host_second = memory.host_by_forward[steps] if problem.uses_forward else memory.host_by_inputs[steps]
    host_kv = memory.host_by_kv[steps]
    highest = np.maximum(highest, _room_on_host(host_all[steps], host_second, memory.host_budget))
    highest = np.minimum(most, highest)
    for base, slope, limit in (
        (kv_base, kv_slope + 1, pool),
        (host_all[steps] + host_kv * kv_base, host_kv * kv_slope + host_second, memory.host_budget),
    ):
        lowest, highest = _within(lowest, highest, base - limit, slope)
    return Spill(steps=steps, kv_base=kv_base, kv_slope=kv_slope, lowest=lowest, highest=highest)


def _spilling_steps(problem: Coefficients, overflows: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Steps that may have tokens off HBM of need: those that overflow and, as homes only move outward, all that follow."""
    setting = problem.setting
    if setting.host_attention:
        return np.arange(problem.steps)
    return np.flatnonzero(np.logical_or.accumulate(overflows) if setting.placement is Placement.RECENT else overflows)


def _off_by_then(total: Line, lowest: Column, highest: Column, dead: Column) -> Column:
    """Living tokens off HBM, at least: the most that any step so far could not do without, less those that have died."""
    ends = (total.at(lowest), np.where(np.isfinite(highest), total.at(np.maximum(lowest, highest)), np.inf))
    off: Column = np.maximum.accumulate(np.minimum(*ends) + dead) - dead
    return off


def _higher(first: Line, second: Line, at: Column) -> tuple[Column, Column]:
    """Base and slope of whichever line is higher there."""
    better = second.at(at) > first.at(at)
    return np.where(better, second.base, first.base), np.where(better, second.slope, first.slope)


def _fewest_kv(need: Column, kv_frees: Column, second_frees: Column, most: Column) -> tuple[Column, Column]:
    """Base and slope of the fewest kv tokens with which ``need`` bytes are freed, by recomputed tokens.

    Tokens are whole, so at least need / (most that one frees), rounded up, must go; of the two lines the one that is
    higher in the middle counts.
    """
    helps = kv_frees > 0
    count = np.ceil(need / np.maximum(np.maximum(kv_frees, second_frees), SLACK) - SLACK) * helps
    base = np.divide(need, kv_frees, out=np.zeros_like(need), where=helps)
    slope = -np.divide(second_frees, kv_frees, out=np.zeros_like(need), where=helps & (need > 0))
    whole = Line(count, -1.0 * (helps & (second_frees > 0)))
    return _higher(Line(base, slope), whole, np.minimum(most, count) / 2)


def _room_on_host(held: Column, by_second: Column, budget: float) -> Column:
    """Recomputed tokens with which the host has room where every token has a place there (written back at birth)."""
    room: Column = np.divide(held - budget, -by_second, out=np.zeros_like(held), where=by_second < 0)
    return room


def _second_home(problem: Coefficients, steps: NDArray[np.intp]) -> tuple[Column, Column]:
    """Bytes that one recomputed token frees in HBM, and how many there may be."""
    memory, setting = problem.memory, problem.setting
    if problem.uses_inputs:
        return memory.freed_by_inputs[steps], counts_of(setting).pool[steps]
    if problem.uses_forward:
        return memory.freed_by_forward[steps], np.full(len(steps), float(setting.workload.prompt_tokens))
    return np.zeros(len(steps)), np.zeros(len(steps))


def _within(lowest: Column, highest: Column, base: Column, slope: Column) -> tuple[Column, Column]:
    """Tighten the limits of x so that base + slope * x <= 0; an empty range comes out with lowest > highest."""
    slack = SLACK * np.abs(base)
    at = -np.divide(base, slope, out=np.zeros_like(base), where=slope != 0)
    lowest = np.where(slope < 0, np.maximum(lowest, at), lowest)
    highest = np.where(slope > 0, np.minimum(highest, at), highest)
    hopeless = (slope == 0) & (base > slack)
    return lowest, np.where(hopeless, -np.inf, highest)

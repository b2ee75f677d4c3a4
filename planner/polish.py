"""Whole tokens near a plan: neighbouring rows of homes, each pair priced exactly, and the quickest way through them.

Where a plan has few tokens, one more or less matters, and rounding the program's lines can cost percents. So the rows
around them are searched by dynamic programming, backwards: what a row is best followed by is settled before it is known
how long its own fetch, delayed by what it then writes back, keeps the step before waiting.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from planner.coefficients import Coefficients
from planner.neighbours import BAND, SLACK, Centre, Flags, Index, Rows, all_second, nearby_rows
from planner.objective import Weights
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.flows import Flows, Following, Homes, flows_between
from sim.homes import TokenHomes
from sim.layer import LayerTimes, layer_times, prompt_write_seconds
from sim.layer_prices import LayerPrices
from sim.pipeline import seconds_before
from sim.plan import Plan, WriteBack

FEW_TOKENS = 4096  # steps x tokens: up to here single ones may matter


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """Plans of ``problem`` near another one, judged by ``weights``; those of ``limit_s`` and more are of no interest."""

    problem: Coefficients
    weights: Weights
    cost: CostModel
    limit_s: float

    def plans(self, centre: Centre) -> Iterator[Plan]:
        """The best one for each number of saved inputs near the centre's."""
        for saved in self._saved_nearby(centre):
            homes = self._quickest(nearby_rows(self.problem, centre, saved), saved)
            if homes is not None:
                yield Plan(setting=self.problem.setting, homes=homes)

    def _saved_nearby(self, centre: Centre) -> list[int]:
        """Numbers of saved inputs: about those of the centre, and as many as if all tokens off HBM were kept as inputs."""
        if not self.problem.uses_inputs:
            return [0]
        counts = counts_of(self.problem.setting)
        whole = {int(tokens) for tokens in counts.dead + all_second(self.problem)}
        some = {int(tokens) + 1 for tokens in counts.dead[centre.off > 0]} if centre.saved == 0 else set()
        near = range(centre.saved - BAND, centre.saved + BAND + 1)
        last = self.problem.setting.workload.cached_tokens
        return sorted(saved for saved in {0, max(whole), *near, *some} if 0 <= saved <= last)

    def _quickest(self, rows: Rows, saved: int) -> TokenHomes | None:
        """Backwards from the last step: the row that each candidate is best followed by."""
        rows = self._promising(rows, saved)
        starts = _starts(rows, self.problem.steps)
        if np.any(starts[1:] == starts[:-1]):
            return None
        rest: Column = np.zeros(1)
        ahead = [rest for _ in self.problem.timings]
        choices: list[Index] = []
        for pairs in reversed(self._pairs(rows, starts, saved)):
            totals = pairs.seconds(self, ahead) + rest
            choices.append(totals.argmin(axis=1))
            ahead = [pairs.chosen(times.prefetch_s, choices[-1]) for times in pairs.times]
            rest = totals.min(axis=1)
        if not rest.min() < self.limit_s:
            return None
        way = [int(rest.argmin())]
        for chosen in reversed(choices[1:]):
            way.append(int(chosen[way[-1]]))
        return _token_homes(rows.take(starts[:-1] + np.array(way)))

    def _promising(self, rows: Rows, saved: int) -> Rows:
        """Rows that could lie on a way within the limit, were every other step at its best."""
        starts = _starts(rows, self.problem.steps)
        if np.any(starts[1:] == starts[:-1]):
            return rows
        none = np.zeros(len(rows))
        flows = self._flows(rows, Following(host_kv=none, beyond=none, copies=none), saved)
        alone = none.copy()
        for wave, timing in enumerate(self.problem.timings):
            times = self._times(timing.prices, rows.step, flows)
            soonest = np.append(np.minimum.reduceat(times.prefetch_s, starts[:-1])[1:], 0.0)
            alone += self.weighed(wave, rows.step, times, soonest[rows.step])
        least = np.minimum.reduceat(alone, starts[:-1])
        return rows.take(alone - least[rows.step] + least.sum() < self.limit_s)

    def _pairs(self, rows: Rows, starts: Index, saved: int) -> list["Pairs"]:
        """By step: its rows, each with every one of the next step's; those of the last step end."""
        here, later, shapes = _every_pair(starts)
        first, then = rows.take(here), rows.take(later)
        following = Following(
            host_kv=then.homes.host_kv,
            beyond=then.homes.beyond(counts_of(self.problem.setting).at(then.step)),
            copies=then.homes.copies,
        )
        flows = self._flows(first, following, saved)
        possible = _outward(first.homes, then.homes) & self._fit_host(first, flows, saved)
        times = [self._times(timing.prices, first.step, flows) for timing in self.problem.timings]
        ends = np.cumsum([0, *(rows_here * rows_later for rows_here, rows_later in shapes)])
        return [
            Pairs(step=step, shape=shape, possible=possible[a:b], times=[_cut(column, a, b) for column in times])
            for step, (shape, (a, b)) in enumerate(zip(shapes, pairwise(ends.tolist()), strict=True))
        ]

    def _flows(self, rows: Rows, following: Following, saved: int) -> Flows:
        setting = self.problem.setting
        return flows_between(setting, counts_of(setting).at(rows.step), rows.homes, following, saved)

    def _times(self, prices: LayerPrices, step: Index, flows: Flows) -> LayerTimes:
        """Times of the layers in each row; row 0 of ``layer_times`` is the prefill, so one is put before them."""
        led = Flows(**{column.name: np.append(0.0, getattr(flows, column.name)) for column in fields(flows)})
        times = layer_times(prices, led, self.cost, away=True, steps=np.append(0, step))
        gpu: dict[str, Any] = {
            name: np.where(step, getattr(times, name)[1:], getattr(times, name)[0])
            for name in ("layer_s", "query_s", "launched_s")
        }
        link: dict[str, Any] = {name: getattr(times, name)[1:] for name in ("prefetch_s", "correct_s", "head_s")}
        in_line_s = np.where(step, 0.0, prompt_write_seconds(prices, times.write_bytes[1:], self.cost))
        gpu["layer_s"] += in_line_s
        return replace(times, **gpu, **link, in_line_s=in_line_s, write_s=np.where(step, times.write_s[1:], 0.0))

    def weighed(self, wave: int, step: Index | int, times: LayerTimes, ahead_s: Column) -> Column:
        """What steps add to the objective; the first one's own fetch goes before it."""
        setting = self.problem.setting
        depth, prefill = setting.prefetch_layers, self.weights.prefill[wave]
        step_s = seconds_before(times, ahead_s, setting.model.layers, depth)
        return np.where(step, self.weights.decode[wave] * step_s, prefill * (step_s + depth * times.prefetch_s))

    def _fit_host(self, rows: Rows, flows: Flows, saved: int) -> Flags:
        """Tokens that the host holds or that are on their way there, and saved inputs."""
        memory, counts = self.problem.memory, counts_of(self.problem.setting)
        inputs, lost = rows.homes.activations, rows.homes.dropped - counts.dead[rows.step]
        kept = np.maximum(0.0, np.minimum(counts.cached[rows.step], saved) - rows.homes.dropped)
        held = memory.host_all_in[rows.step] + memory.host_per_saved * kept
        if self.problem.setting.write_back is WriteBack.AT_BIRTH:
            held = held + memory.host_by_forward[rows.step] * (inputs + lost)
        else:
            on_their_way = flows.written_kv - flows.on_host * (rows.step == 0)
            held = held + memory.host_per_written * (flows.on_host + on_their_way)
        fits: Flags = held <= memory.host_budget * (1 + SLACK)
        return fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Rows of one step and of the next, each with each, as ``shape`` says; ``times`` for each wave, [pair]."""

    step: int
    shape: tuple[int, int]
    possible: Flags
    times: list[LayerTimes]

    def seconds(self, near: Neighbourhood, ahead: list[Column]) -> Column:
        """What the step adds, [row, next row], where the next one's rows fetch for ``ahead``; infinite where it cannot follow."""
        total = np.where(self.possible, 0.0, np.inf)
        for wave, times in enumerate(self.times):
            total += near.weighed(wave, self.step, times, np.broadcast_to(ahead[wave], self.shape).ravel())
        return total.reshape(self.shape)

    def chosen(self, column: Column, choice: Index) -> Column:
        """Of a column, [pair], what holds for each row and the one that is to follow it."""
        of_rows: Column = column.reshape(self.shape)[np.arange(len(choice)), choice]
        return of_rows


def _cut(times: LayerTimes, start: int, end: int) -> LayerTimes:
    """What ``sim.pipeline`` reads, of some rows."""
    names = ("layer_s", "query_s", "prefetch_s", "correct_s", "write_s", "head_s", "launched_s")
    return replace(times, **{name: getattr(times, name)[start:end] for name in names})


def _outward(here: Homes, later: Homes) -> Flags:
    """No boundary between homes moves inward."""
    beyond_inputs, beyond_kv = (homes.dropped + homes.activations for homes in (here, later))
    outward: Flags = (here.dropped <= later.dropped) & (beyond_inputs <= beyond_kv)
    outward &= beyond_inputs + here.host_kv <= beyond_kv + later.host_kv
    return outward


def _starts(rows: Rows, steps: int) -> Index:
    """Where the rows of each step begin, and the end."""
    return np.searchsorted(rows.step, np.arange(steps + 1))


def _every_pair(starts: Index) -> tuple[Index, Index, list[tuple[int, int]]]:
    """Every row with every one of the next step; those of the last step with themselves. And how many of either."""
    spans = [np.arange(start, end) for start, end in pairwise(starts)]
    heres = [np.repeat(span, len(later)) for span, later in pairwise(spans)]
    laters = [np.tile(later, len(span)) for span, later in pairwise(spans)]
    shapes = [(len(span), len(later)) for span, later in pairwise(spans)]
    return np.concatenate([*heres, spans[-1]]), np.concatenate([*laters, spans[-1]]), [*shapes, (len(spans[-1]), 1)]


def _token_homes(rows: Rows) -> TokenHomes:
    columns = {column.name: getattr(rows.homes, column.name) for column in fields(rows.homes)}
    return TokenHomes(**{name: tuple(int(tokens) for tokens in column) for name, column in columns.items()})


def has_few_tokens(problem: Coefficients) -> bool:
    """So few that rounding may cost more than the search around it."""
    return problem.steps * float(counts_of(problem.setting).pool[-1]) <= FEW_TOKENS

"""Why no plan fits: which memory overflows, from which step on, by how much, and what fills it.

Every way to spill is judged step by step, each step free to move its tokens as suits it best. What couples the steps is
left out, so a shortage found here is one that no plan escapes, and the least one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeAlias

import numpy as np

from planner.coefficients import Coefficients, coefficients_of
from planner.options import (
    STREAMED_SHARES,
    Family,
    assisted_settings,
    concurrencies,
    kv_budget,
    resident_settings,
    spilling_settings,
)
from planner.request import Request
from planner.solution import Blame, Shortage, Tier
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.footprint import resident_weight_bytes, workspace_bytes

SLACK_BYTES = 1e-3  # rounding of sums of bytes, far below one token

_Pair: TypeAlias = tuple[Column, Column]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moves:
    """Tokens of one sequence that may leave HBM at each step, and what each frees there and takes on the host, [step].

    Pairs stand for tokens whose KV goes to the host, and for those that are recomputed, at most ``most`` of them.
    """

    pool: Column
    most: Column
    frees: _Pair
    takes: _Pair

    @property
    def corners(self) -> tuple[_Pair, ...]:
        """Of what may be moved, in order around it: both at least 0, recomputed <= most, together <= pool."""
        none = np.zeros_like(self.pool)
        return (none, none), (self.pool, none), (self.pool - self.most, self.most), (none, self.most)


def memory_shortage(request: Request) -> Shortage | None:
    """The least that memory is short by, whichever way the fewest sequences at once are served; None if it may suffice."""
    least: Shortage | None = None
    least_key: tuple[float, ...] = (float("inf"),)
    for problem in _problems(replace(request, concurrency=concurrencies(request)[-1])):
        overflow = _overflow(problem)
        if not overflow.steps:
            return None
        if overflow.nearness < least_key:
            least, least_key = _shortage(problem, request, overflow), overflow.nearness
    return least


def with_more(request: Request, tier: Tier, more_bytes: int) -> Request:
    """``request`` with ``more_bytes`` more that KV can have of ``tier``."""
    machine, budget = request.machine, request.kv_budget_bytes
    if tier is Tier.HBM:
        gpu = replace(machine.gpu, hbm_bytes=machine.gpu.hbm_bytes + more_bytes)
        budget = None if budget is None else budget + more_bytes
        return replace(request, machine=replace(machine, gpu=gpu), kv_budget_bytes=budget)
    host = machine.host
    dram_bytes = ceil((host.usable_bytes + more_bytes) / host.usable_share)
    return replace(request, machine=replace(machine, host=replace(host, dram_bytes=dram_bytes)))


def _problems(request: Request) -> Iterator[Coefficients]:
    """Every way to spill, also where weights and workspace leave less than nothing for KV."""
    cost = CostModel(machine=request.machine, profile=request.profile)
    sequences = concurrencies(request)[-1]
    for share in STREAMED_SHARES:
        left_bytes = kv_budget(request, sequences, share)
        enough = with_more(request, Tier.HBM, max(0, -left_bytes))
        family = Family(concurrency=sequences, weights_on_host=share)
        for setting in resident_settings(family, enough):
            for leaf in (*spilling_settings(setting, request), *assisted_settings(setting)):
                problem = coefficients_of(leaf, cost)
                yield replace(problem, memory=replace(problem.memory, hbm_budget=left_bytes / sequences))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Overflow:
    """Bytes that the steps of one sequence need beyond ``tier``, [step]; ``is_alone``: no more of it would do by itself."""

    tier: Tier
    over: Column
    is_alone: bool = True

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(map(int, np.flatnonzero(self.over > SLACK_BYTES)))

    @property
    def nearness(self) -> tuple[float, ...]:
        """A plan that overflows only the host is nearer than one that overflows HBM wherever its tokens go."""
        return self.tier is Tier.HBM, not self.is_alone, float(self.over.max())


def _overflow(problem: Coefficients) -> _Overflow:
    """HBM, if it overflows even with a boundless host (then by how much with the host as it is); else the host."""
    memory, moves = problem.memory, _moves(problem)
    need, room = memory.hbm_all_in - memory.hbm_budget, memory.host_budget - memory.host_all_in
    unfrees, boundless = (-moves.frees[0], -moves.frees[1]), np.full_like(room, np.inf)
    over = need + _least(moves, unfrees, moves.takes, boundless)
    if not np.any(over > SLACK_BYTES):
        return _Overflow(tier=Tier.HOST, over=_least(moves, moves.takes, unfrees, -need) - room)
    over_as_is = need + _least(moves, unfrees, moves.takes, room)
    if np.all(np.isfinite(over_as_is)):
        return _Overflow(tier=Tier.HBM, over=over_as_is)
    return _Overflow(tier=Tier.HBM, over=over, is_alone=False)


def _shortage(problem: Coefficients, request: Request, overflow: _Overflow) -> Shortage:
    memory = problem.memory
    blame, blamed_bytes = _blame(problem, request)
    is_static = (memory.hbm_budget if overflow.tier is Tier.HBM else memory.host_budget) < 0
    return Shortage(
        blame=blame,
        blamed_bytes=blamed_bytes,
        tier=overflow.tier,
        step=None if is_static else overflow.steps[0],
        missing_bytes=ceil(float(overflow.over.max()) * problem.setting.concurrency),
    )


def _blame(problem: Coefficients, request: Request) -> tuple[Blame, int]:
    """Weights or workspace, where HBM could not hold them without streaming and KV takes less; else KV."""
    setting = problem.setting
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, 0.0)
    workspace = workspace_bytes(setting.model, setting.dtype, setting.concurrency, setting.workload.prompt_tokens)
    kv = ceil(float(problem.memory.hbm_all_in.max()) * setting.concurrency)
    left = request.machine.gpu.hbm_bytes - int(request.profile.reserve_bytes) - weights
    if left < 0 and kv < weights:
        return Blame.WEIGHTS, weights
    return (Blame.WORKSPACE, workspace) if left < workspace and kv < workspace else (Blame.KV, kv)


def _moves(problem: Coefficients) -> _Moves:
    """Inputs are saved for what is homed as inputs and for the copies of it; saving more gains nothing."""
    memory, counts = problem.memory, counts_of(problem.setting)
    none, saved = np.zeros_like(counts.pool), 1 + counts.copy_rate
    most, frees, takes = none, none, none
    if problem.uses_inputs:
        most = counts.pool
        frees = memory.freed_by_inputs - memory.hbm_per_saved * saved
        takes = memory.host_by_inputs + memory.host_per_saved * saved
    elif problem.uses_forward:
        most = np.minimum(counts.pool, problem.setting.workload.prompt_tokens)
        frees, takes = memory.freed_by_forward, memory.host_by_forward
    by_kv = memory.host_by_kv + memory.host_per_written * counts.replaced_rate
    return _Moves(pool=counts.pool, most=most, frees=(memory.freed_by_kv, frees), takes=(by_kv, takes))


def _least(moves: _Moves, wanted: _Pair, limited: _Pair, limit: Column) -> Column:
    """The least of ``wanted`` among the moves whose ``limited`` is at most ``limit``; infinite where there are none.

    Both are linear, so the best is a corner, or where an edge between two corners meets the limit. [step] each.
    """
    corners, slack = moves.corners, SLACK_BYTES
    edges = zip(corners, (*corners[1:], corners[0]), strict=True)
    least: Column = np.full_like(limit, np.inf)
    for tokens in (*corners, *(_meeting(limited, limit, start, end) for start, end in edges)):
        allowed = _of(limited, tokens) <= limit + slack
        least = np.minimum(least, np.where(allowed, _of(wanted, tokens), np.inf))
    return least


def _meeting(limited: _Pair, limit: Column, start: _Pair, end: _Pair) -> _Pair:
    """The point between two corners whose ``limited`` is ``limit``, or the corner that comes nearest."""
    first, last = _of(limited, start), _of(limited, end)
    gain = last - first
    share = np.clip(np.divide(limit - first, gain, out=np.zeros_like(gain), where=gain != 0), 0.0, 1.0)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _of(rates: _Pair, tokens: _Pair) -> Column:
    total: Column = rates[0] * tokens[0] + rates[1] * tokens[1]
    return total

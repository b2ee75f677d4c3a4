"""From the program's straight lines to whole tokens: HBM is filled step by step, shares are kept, capacity holds exactly."""

from dataclasses import dataclass, replace

import numpy as np

from planner.coefficients import Coefficients
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.forecast import Forecast, forecast, over_capacity
from sim.homes import TokenHomes
from sim.plan import Plan

REPAIRS = 12  # rounds of moving one more token outward where whole tokens overflow by less than one


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the program decides about the tokens that do not fit HBM, [step] each.

    ``off`` are off HBM as KV or inputs; ``share_inputs`` of them are kept as layer inputs, ``forward`` are dropped and
    forwarded again; the first ``saved_at_birth`` tokens have their inputs saved. ``least_off``, ``least_inputs`` and
    ``least_forward`` are lower limits; where ``round_up`` is 1 a fraction of a token becomes one of inputs, where 0 one
    of host KV.
    """

    off: Column
    share_inputs: Column
    forward: Column
    saved_at_birth: int
    least_off: Column
    least_inputs: Column
    least_forward: Column
    round_up: Column


def round_homes(problem: Coefficients, shape: Shape, cost: CostModel) -> Forecast | None:
    """The priced plan that keeps as much in HBM as fits; None if none does.

    How many of a step's tokens are inputs, or attended to by the CPU, is rounded down and up, and each step keeps what
    is quicker.
    """
    fewer = _repaired(problem, replace(shape, round_up=np.zeros(problem.steps)), cost)
    if not problem.setting.host_attention and not (problem.uses_inputs and np.any(shape.share_inputs)):
        return fewer
    more = _repaired(problem, replace(shape, round_up=np.ones(problem.steps)), cost)
    if fewer is None or more is None:
        return fewer or more
    quicker = (_total_s(more) < _total_s(fewer)).astype(np.float64)
    mixed = _repaired(problem, replace(shape, round_up=quicker), cost)
    options = [priced for priced in (fewer, more, mixed) if priced is not None]
    return min(options, key=lambda priced: float(_total_s(priced).sum()))


def _total_s(priced: Forecast) -> Column:
    """Seconds of each step in all distinct waves together, [step]."""
    total: Column = np.sum([wave.step_s for wave in priced.waves], axis=0)
    return total


def _repaired(problem: Coefficients, shape: Shape, cost: CostModel) -> Forecast | None:
    """The plan of ``shape``, with single tokens moved outward where whole ones overflow by less than a few."""
    for _ in range(REPAIRS):
        plan = _plan_or_none(problem, shape)
        if plan is None:
            return None
        priced = forecast(plan, cost)
        over_hbm, over_host = over_capacity(priced)
        if not (np.any(over_hbm > 0) or np.any(over_host > 0)):
            return priced
        shape = _further_out(problem, shape, plan, over_hbm, over_host)
    return None


def _further_out(problem: Coefficients, shape: Shape, plan: Plan, over_hbm: Column, over_host: Column) -> Shape:
    """One more token off HBM where that overflows; from the host as many as its bytes say, and inputs saved for them."""
    memory, homes = problem.memory, plan.homes
    token_bytes = problem.setting.concurrency * max(memory.host_per_written, -float(memory.host_by_forward[-1]))
    moved = np.ceil(np.maximum(0.0, over_host) / token_bytes)
    off = np.array(homes.host_kv) + np.array(homes.activations) - np.array(homes.copies)
    inputs, dropped = np.array(homes.activations) + moved, np.array(homes.dropped)
    saved = shape.saved_at_birth
    return replace(
        shape,
        least_off=np.maximum(shape.least_off, (off + 1.0) * (over_hbm > 0)),
        least_inputs=np.maximum(shape.least_inputs, inputs * (moved > 0)),
        least_forward=np.maximum(shape.least_forward, (dropped + moved) * (moved > 0)),
        saved_at_birth=saved + 1 if np.any((dropped + inputs > saved) & (moved > 0)) else saved,
    )


def _plan_or_none(problem: Coefficients, shape: Shape) -> Plan | None:
    try:
        return Plan(setting=problem.setting, homes=_homes(problem, shape))
    except ValueError:  # what a step needs in HBM leaves too little room
        return None


def _homes(problem: Coefficients, shape: Shape) -> TokenHomes:
    """As many tokens off HBM as must be, oldest first, shared between host KV and inputs as the program says."""
    counts, memory = counts_of(problem.setting), problem.memory
    dropped = np.maximum.accumulate(np.maximum(np.rint(shape.forward), shape.least_forward))
    dropped = np.minimum(dropped, problem.setting.workload.prompt_tokens) * problem.uses_forward
    dropped = np.minimum(dropped, counts.cached - 1)
    lost = np.maximum(dropped, counts.dead)
    saved = np.maximum(0.0, np.minimum(counts.cached, shape.saved_at_birth) - lost)
    frees = (1 - shape.share_inputs) * memory.freed_by_kv + shape.share_inputs * memory.freed_by_inputs
    need = memory.hbm_all_in + memory.hbm_per_saved * saved - memory.freed_by_forward * dropped - memory.hbm_budget
    needed_off = np.ceil(np.divide(need, frees, out=np.full_like(need, np.inf), where=frees > 0) - 1e-9)
    least_off = np.floor(shape.least_off + 1e-6 + shape.round_up * (1 - 2e-6))
    off = np.minimum(np.maximum(np.where(need > 0, needed_off, 0.0), least_off), counts.pool - dropped)
    copies = np.ceil(counts.copy_rate * off - 1e-9)
    inputs = np.floor((off + copies) * shape.share_inputs + 1e-6 + shape.round_up * (1 - 2e-6))
    inputs = np.maximum(inputs, shape.least_inputs)
    inputs = np.minimum(inputs, np.maximum(0.0, shape.saved_at_birth - lost)) * problem.uses_inputs
    return _outward(counts.cached, lost, inputs, off + copies, copies)


def _outward(cached: Column, lost: Column, inputs: Column, homed: Column, copies: Column) -> TokenHomes:
    """Rows in which tokens only move outward."""
    beyond_host = np.maximum.accumulate(lost + inputs)
    beyond_hbm = np.maximum.accumulate(np.maximum(lost + homed, beyond_host))
    activations, host_kv = beyond_host - lost, beyond_hbm - beyond_host
    columns = (cached - beyond_hbm, host_kv, activations, lost, np.minimum(copies, host_kv + activations))
    hbm, on_host, kept, gone, copied = (tuple(int(tokens) for tokens in column) for column in columns)
    return TokenHomes(hbm=hbm, host_kv=on_host, activations=kept, dropped=gone, copies=copied)

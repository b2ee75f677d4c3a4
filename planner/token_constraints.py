"""What must hold of token homes: memories, the way outward, what is saved and written, and the switches."""

from itertools import pairwise

import numpy as np

from planner.coefficients import Coefficients, evenly_attended, homes_per_token
from planner.program import Program, scaled
from planner.spill import SavedRange
from sim.counts import Column, counts_of
from sim.plan import WriteBack


def define_pool_constraints(program: Program) -> None:
    """Kv + inputs + forward <= pool: what a step needs in HBM stays there."""
    counts = counts_of(program.problem.setting)
    for place, knot in enumerate(program.knots):
        terms = [(program.kv[place], 1.0), (program.inputs[place], 1.0), (program.forward[place], 1.0)]
        program.at_most(f"pool_step_{knot}", terms, float(counts.pool[knot]))


def define_hbm_capacity_constraints(program: Program) -> None:
    """All in HBM - freed_kv kv - freed_inputs inputs - freed_forward forward + saved inputs kept there <= budget."""
    memory = program.problem.memory
    for place, knot in enumerate(program.knots):
        terms = [
            (program.kv[place], -float(memory.freed_by_kv[knot])),
            (program.inputs[place], -float(memory.freed_by_inputs[knot])),
            (program.forward[place], -float(memory.freed_by_forward[knot])),
            (program.saved[place], memory.hbm_per_saved),
        ]
        scale = max(memory.hbm_budget, 1.0)
        left = (memory.hbm_budget - float(memory.hbm_all_in[knot])) / scale
        program.at_most(f"hbm_capacity_step_{knot}", scaled(terms, scale), left)


def define_host_capacity_constraints(program: Program) -> None:
    """KV homed on the host or on its way there + inputs saved at birth <= host memory."""
    memory = program.problem.memory
    scale = max(memory.host_budget, 1.0)
    for place, knot in enumerate(program.knots):
        terms = [
            (program.kv[place], float(memory.host_by_kv[knot])),
            (program.inputs[place], float(memory.host_by_inputs[knot])),
            (program.forward[place], float(memory.host_by_forward[knot])),
            (program.saved[place], memory.host_per_saved),
            (program.written[place], memory.host_per_written),
        ]
        left = (memory.host_budget - float(memory.host_all_in[knot])) / scale
        program.at_most(f"host_capacity_step_{knot}", scaled(terms, scale), left)


def define_outward_constraints(program: Program) -> None:
    """Homes only move outward: what is beyond HBM, and what is beyond host KV, never shrinks from knot to knot.

    Inputs and dropped tokens are never both there, so nothing moves between them.
    """
    counts = counts_of(program.problem.setting)
    homes = 1 + counts.copy_rate
    for place, (knot, later) in enumerate(zip(program.knots, program.knots[1:], strict=False)):
        dying = float(counts.dead[later] - counts.dead[knot])
        beyond_host = [
            (program.forward[place], 1.0),
            (program.forward[place + 1], -1.0),
            (program.inputs[place], float(homes[knot])),
            (program.inputs[place + 1], -float(homes[later])),
        ]
        beyond_hbm = [
            *beyond_host,
            (program.kv[place], float(homes[knot])),
            (program.kv[place + 1], -float(homes[later])),
        ]

        program.at_most(f"outward_from_host_step_{later}", beyond_host, dying)
        program.at_most(f"outward_from_hbm_step_{later}", beyond_hbm, dying)


def define_written_constraints(program: Program) -> None:
    """Written >= what the tokens on the host become more, the replaced too; >= all that leave HBM, once some are there.

    Tokens that move on from the host, to inputs or dropped, are the oldest; those that leave HBM take their place.
    """
    problem, counts = program.problem, counts_of(program.problem.setting)
    (_, most_recomputed), per_token = _most_off(problem), homes_per_token(problem.setting)
    if problem.setting.write_back is WriteBack.AT_BIRTH:
        return
    for place, (knot, later) in enumerate(pairwise(program.knots)):
        share, replaced = 1 / (later - knot), float(counts.replaced_rate[knot])
        homes, homes_later = (float(per_token[step]) * share for step in (knot, later))
        grown = [
            (program.kv[place + 1], homes_later),
            (program.kv[place], replaced - homes),
            (program.written[place], -1.0),
        ]
        program.at_most(f"written_grown_step_{knot}", grown, 0.0)
        most = homes_later * float(most_recomputed[later]) + replaced * float(most_recomputed[knot])
        moved = [
            *grown,
            (program.inputs[place + 1], homes_later),
            (program.inputs[place], replaced - homes),
            (program.forward[place + 1], share),
            (program.forward[place], -share),
            (program.linked[place], most),
        ]
        if problem.uses_inputs or problem.uses_forward:
            program.at_most(f"written_moved_step_{knot}", moved, most)


def define_saved_inputs_constraints(program: Program) -> None:
    """The first tokens have their inputs saved at birth: as many as are ever homed there; what is dropped is freed."""
    if not program.problem.uses_inputs:
        return
    counts = counts_of(program.problem.setting)
    for place, knot in enumerate(program.knots):
        homes, dead = 1 + float(counts.copy_rate[knot]), float(counts.dead[knot])
        ever = [
            (program.inputs[place], homes),
            (program.recomputing[place], dead),
            (program.saved_at_birth, -1.0),
        ]
        program.at_most(f"saved_at_birth_step_{knot}", ever, 0.0)
        constant, share = _born_by_then(program.saved_range, float(counts.cached[knot]))
        held = [(program.saved_at_birth, share), (program.saved[place], -1.0)]
        program.at_most(f"saved_held_step_{knot}", held, dead - constant)


def define_switch_constraints(program: Program) -> None:
    """Nothing is off HBM before its switch is on; the limits are the most that could have to leave, which keeps them tight."""
    most_kv, most_recomputed = _most_off(program.problem)
    for place, knot in enumerate(program.knots):
        linked = [(program.kv[place], 1.0), (program.linked[place], -float(most_kv[knot]))]
        program.at_most(f"linked_step_{knot}", linked, 0.0)
        recomputed = [(program.inputs[place], 1.0), (program.forward[place], 1.0)]
        switch = (program.recomputing[place], -float(most_recomputed[knot]))
        program.at_most(f"recomputing_step_{knot}", [*recomputed, switch], 0.0)


def define_phase_constraints(program: Program) -> None:
    """A switch that is on stays on: p1 and p2 are single steps."""
    for place, later in enumerate(program.knots[1:]):
        for name, switch in (("linked", program.linked), ("recomputing", program.recomputing)):
            program.at_most(f"{name}_stays_on_step_{later}", [(switch[place], 1.0), (switch[place + 1], -1.0)], 0.0)


def _born_by_then(saved: SavedRange, cached: float) -> tuple[float, float]:
    """The lesser of the saved inputs and ``cached`` tokens is not convex: its chord over the range, constant and slope."""
    low, high = max(0.0, saved.fewest - saved.width), saved.most + saved.width
    share = (min(high, cached) - min(low, cached)) / (high - low)
    return min(low, cached) - share * low, share


def _most_off(problem: Coefficients) -> tuple[Column, Column]:
    """Upper limits of kv, and of inputs or forward, by step: what would have to leave if it were the only home."""
    memory, counts = problem.memory, counts_of(problem.setting)
    need = np.maximum(0.0, memory.hbm_all_in + memory.hbm_per_saved * counts.cached - memory.hbm_budget)
    second = memory.freed_by_forward if problem.uses_forward else memory.freed_by_inputs
    most_kv, most_second = (
        np.minimum(counts.pool, np.maximum.accumulate(need / np.maximum(frees, 1e-9)) + (need > 0))
        for frees in (memory.freed_by_kv, second)
    )
    if problem.setting.write_back is WriteBack.AT_BIRTH:
        most_second = counts.pool  # what is no longer kept as KV leaves the host, so more than must leave HBM may go
    for timing in problem.timings if problem.setting.host_attention else ():
        even = np.maximum.accumulate(evenly_attended(timing)) + 1
        most_kv = np.minimum(counts.pool, np.maximum(most_kv, even))
    return most_kv, most_second

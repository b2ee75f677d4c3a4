"""The integer program over token homes: what varies, what must hold, what is minimised, one equation a function.

Steps are sampled at knots; between two knots every quantity is a straight line, so a sum over steps is a weighted sum
over knots. Token counts are continuous, two families of binaries switch the link and recomputation on, once.
"""

import numpy as np
import pulp

from planner.coefficients import Coefficients
from planner.objective import Weights, latency_weights, objective_weights
from planner.program import Program, Term, summed
from planner.request import Objective
from planner.spill import SavedRange, any_saved
from planner.time_constraints import (
    define_fetch_time_constraints,
    define_host_attention_constraints,
    define_layer_time_constraints,
    define_step_time_constraints,
    define_write_time_constraints,
)
from planner.token_constraints import (
    define_hbm_capacity_constraints,
    define_host_capacity_constraints,
    define_outward_constraints,
    define_phase_constraints,
    define_pool_constraints,
    define_saved_inputs_constraints,
    define_switch_constraints,
    define_written_constraints,
)
from sim.plan import WriteBack


def build(
    problem: Coefficients,
    knots: tuple[int, ...],
    objective: Objective,
    max_tpot_s: float | None = None,
    saved_range: SavedRange | None = None,
) -> Program:
    """The whole program at ``knots``, a table of contents; ``saved_range`` says how many saved inputs to expect."""
    program = Program(
        problem=problem,
        knots=knots,
        weights=objective_weights(objective, problem.setting),
        latency=latency_weights(problem.setting),
        max_tpot_s=max_tpot_s,
        saved_range=saved_range or any_saved(problem),
        unit_s=float(np.mean(problem.timings[0].still.layer_s)),
        lp=pulp.LpProblem("token_homes", pulp.LpMinimize),
    )
    define_token_variables(program)
    define_switch_variables(program)
    define_time_variables(program)
    define_pool_constraints(program)
    define_hbm_capacity_constraints(program)
    define_host_capacity_constraints(program)
    define_outward_constraints(program)
    define_written_constraints(program)
    define_saved_inputs_constraints(program)
    define_switch_constraints(program)
    define_phase_constraints(program)
    define_fetch_time_constraints(program)
    define_layer_time_constraints(program)
    define_host_attention_constraints(program)
    define_write_time_constraints(program)
    define_step_time_constraints(program)
    define_latency_constraint(program)
    define_objective(program)
    return program


def define_token_variables(program: Program) -> None:
    """Tokens of one sequence off HBM at each knot: KV on the host, layer inputs, and dropped to be forwarded again.

    And those whose KV crosses to the host in a step because they leave HBM.
    """
    problem = program.problem
    leaves = None if problem.setting.write_back is WriteBack.AT_EVICTION else 0.0
    prefix = float(problem.setting.workload.prompt_tokens)
    for knot in program.knots:
        program.kv.append(program.variable("kv", knot))
        program.inputs.append(program.variable("inputs", knot, None if problem.uses_inputs else 0.0))
        program.written.append(program.variable("written", knot, leaves))
        program.saved.append(program.variable("saved", knot, None if problem.uses_inputs else 0.0))
        program.forward.append(program.variable("forward", knot, prefix if problem.uses_forward else 0.0))
    program.saved_at_birth = program.lp.add_variable("saved_at_birth", 0)


def define_switch_variables(program: Program) -> None:
    """Binaries: the link fetches from here on (p1), recomputation runs from here on (p2)."""
    for knot in program.knots:
        program.linked.append(program.variable("linked", knot, 1, binary=True))
        program.recomputing.append(program.variable("recomputing", knot, 1, binary=True))


def define_time_variables(program: Program) -> None:
    """Seconds of a layer's fetch, computation and write-back, and of the whole step, for each wave size."""
    for timing in program.problem.timings:
        size = timing.sequences
        for name, target in (
            ("fetch_s", program.fetch_s),
            ("layer_s", program.layer_s),
            ("write_s", program.write_s),
            ("step_s", program.step_s),
        ):
            target.append([program.variable(f"{name}_wave_{size}", knot) for knot in program.knots])


def define_latency_constraint(program: Program) -> None:
    """The mean time between tokens is at most what the user allows."""
    if program.max_tpot_s is not None:
        program.at_most_s("latency", [], _weighted_steps(program, program.latency), program.max_tpot_s)


def define_objective(program: Program) -> None:
    """Weighted times of all waves."""
    program.lp.setObjective(summed(_weighted_steps(program, program.weights)))


def knot_weights(knots: tuple[int, ...]) -> list[float]:
    """How often each knot counts in a sum over all steps of a piecewise straight line; the prefill stands by itself."""
    weights = [1.0] + [0.0] * (len(knots) - 1)
    if len(knots) > 1:
        weights[-1] = 1.0
    for place in range(1, len(knots) - 1):
        length = knots[place + 1] - knots[place]
        weights[place] += (length + 1) / 2
        weights[place + 1] += (length - 1) / 2
    return weights


def _weighted_steps(program: Program, weights: Weights) -> list[Term]:
    shares = knot_weights(program.knots)
    terms: list[Term] = []
    for prefill, decode, step_s in zip(weights.prefill, weights.decode, program.step_s, strict=True):
        terms.append((step_s[0], prefill))
        terms += [(variable, decode * share) for variable, share in zip(step_s[1:], shares[1:], strict=True)]
    return terms

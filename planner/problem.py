"""The integer program over token homes: what varies, what must hold, what is minimised, one equation a function.

Steps are sampled at knots; between two knots every quantity is a straight line, so a sum over steps is a weighted sum
over knots. Token counts are continuous, two families of binaries switch the link and recomputation on, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pulp

from planner.bound import SavedRange, any_saved
from planner.coefficients import Coefficients, Timing, evenly_attended
from planner.objective import Weights, latency_weights, objective_weights
from planner.request import Objective
from sim.flows import Column, counts_of
from sim.plan import Recompute, WriteBack

Term = tuple[pulp.LpVariable, float]

FORWARD_TANGENTS = 8  # straight pieces for the square of a recomputed prefix: at most 0.4 % of its attention off


@dataclass(slots=True, kw_only=True)
class Program:
    """The program under construction. Variables by knot; those of time by wave size, then knot.

    Times are measured in ``unit_s``, what a layer takes at least: the solver's tolerances are absolute.
    """

    problem: Coefficients
    knots: tuple[int, ...]
    weights: Weights
    latency: Weights
    max_tpot_s: float | None
    saved_range: SavedRange
    unit_s: float
    lp: pulp.LpProblem
    rows: dict[str, pulp.LpConstraint] = field(default_factory=dict)
    kv: list[pulp.LpVariable] = field(default_factory=list)
    inputs: list[pulp.LpVariable] = field(default_factory=list)
    forward: list[pulp.LpVariable] = field(default_factory=list)
    linked: list[pulp.LpVariable] = field(default_factory=list)
    recomputing: list[pulp.LpVariable] = field(default_factory=list)
    written: list[pulp.LpVariable] = field(default_factory=list)
    saved: list[pulp.LpVariable] = field(default_factory=list)
    saved_at_birth: pulp.LpVariable | None = None
    fetch_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    layer_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    write_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    step_s: list[list[pulp.LpVariable]] = field(default_factory=list)

    def variable(self, name: str, knot: int, upper: float | None = None, binary: bool = False) -> pulp.LpVariable:
        category = pulp.LpBinary if binary else pulp.LpContinuous
        return self.lp.add_variable(f"{name}_step_{knot}", 0, upper, category)

    def at_most(self, name: str, terms: Sequence[Term], limit: float) -> None:
        """Sum of coefficient x variable <= limit; a variable may be named more than once."""
        self.rows[name] = _summed(terms) <= limit
        self.lp.addConstraint(self.rows[name], name)

    def at_most_s(self, name: str, tokens: Sequence[Term], times: Sequence[Term], limit_s: float) -> None:
        """Seconds for tokens and switches + factor x time variables <= limit."""
        self.at_most(name, [*_scaled(tokens, self.unit_s), *times], limit_s / self.unit_s)

    def following(self, variables: Sequence[pulp.LpVariable], place: int, scale: float) -> list[Term]:
        """A quantity one step after the knot at ``place``, on the line to the next knot."""
        if place + 1 == len(self.knots):
            return []
        share = 1 / (self.knots[place + 1] - self.knots[place])
        return [(variables[place], scale * (1 - share)), (variables[place + 1], scale * share)]


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
        program.at_most(f"hbm_capacity_step_{knot}", _scaled(terms, scale), left)


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
        program.at_most(f"host_capacity_step_{knot}", _scaled(terms, scale), left)


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
    """Written >= what the tokens on the host become more, the dead replaced; >= all that leave HBM, once some are there.

    Tokens that move on from the host, to inputs or dropped, are the oldest; those that leave HBM take their place.
    """
    problem, counts = program.problem, counts_of(program.problem.setting)
    _, most_recomputed = _most_off(problem)
    if problem.setting.write_back is WriteBack.AT_BIRTH:
        return
    for place, (knot, later) in enumerate(pairwise(program.knots)):
        share, dying = 1 / (later - knot), float(counts.death_rate[knot])
        homes, homes_later = ((1 + float(counts.copy_rate[step])) * share for step in (knot, later))
        grown = [
            (program.kv[place + 1], homes_later),
            (program.kv[place], dying - homes),
            (program.written[place], -1.0),
        ]
        program.at_most(f"written_grown_step_{knot}", grown, 0.0)
        most = homes_later * float(most_recomputed[later]) + dying * float(most_recomputed[knot])
        moved = [
            *grown,
            (program.inputs[place + 1], homes_later),
            (program.inputs[place], dying - homes),
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


def define_fetch_time_constraints(program: Program) -> None:
    """Fetch >= constant + seconds a byte x bytes fetched, for each piece of the transfer's price, once the link is on."""
    from_host = program.problem.setting.recompute is Recompute.ACTIVATIONS_HOST
    for timing, fetch_s in zip(program.problem.timings, program.fetch_s, strict=True):
        for place, knot in enumerate(program.knots):
            streamed_s = float(timing.still.prefetch_s[knot])
            if knot == 0 or program.problem.setting.host_attention:
                program.at_most_s(
                    f"streamed_wave_{timing.sequences}_step_{knot}", [], [(fetch_s[place], -1.0)], -streamed_s
                )
                continue
            for number, (constant_s, per_byte_s) in enumerate(timing.prices.fetch.pieces):
                terms = [
                    (program.kv[place], per_byte_s * float(timing.h2d_bytes_by_kv[knot])),
                    (program.inputs[place], per_byte_s * float(timing.h2d_bytes_by_inputs[knot])),
                ]
                where = f"{number}_wave_{timing.sequences}_step_{knot}"
                linked = (program.linked[place], constant_s + _duplex_s(timing, knot))
                program.at_most_s(f"fetch_{where}", [*terms, linked], [(fetch_s[place], -1.0)], -streamed_s)
                if from_host:
                    switch = (program.recomputing[place], constant_s)
                    program.at_most_s(f"fetch_inputs_{where}", [*terms, switch], [(fetch_s[place], -1.0)], -streamed_s)


def define_layer_time_constraints(program: Program) -> None:
    """Layer >= still + conversions + SM share of gathers + recomputation, for each piece of the recomputation's price."""
    for timing, layer_s, fetch_s in zip(program.problem.timings, program.layer_s, program.fetch_s, strict=True):
        for place, knot in enumerate(program.knots):
            common = [
                (program.kv[place], float(timing.gpu_s_by_kv[knot])),
                (program.written[place], timing.gpu_s_by_written if knot else 0.0),
            ]
            times = [(fetch_s[place], timing.prices.sm_share), (layer_s[place], -1.0)]
            beside_s = timing.prices.sm_share * float(timing.still.prefetch_s[knot])  # streamed weights take no SMs
            for number, (constant_s, per_token_s) in enumerate(_recompute_pieces(program, timing, knot)):
                second = program.forward[place] if program.problem.uses_forward else program.inputs[place]
                terms = [*common, (second, per_token_s), (program.recomputing[place], constant_s)]
                name = f"layer_{number}_wave_{timing.sequences}_step_{knot}"
                program.at_most_s(name, terms, times, beside_s - float(timing.still.layer_s[knot]))


def define_host_attention_constraints(program: Program) -> None:
    """Layer >= query + round trip + seconds a token x kv + rest, where the CPU attends to what is on the host."""
    if not program.problem.setting.host_attention:
        return
    for timing, layer_s in zip(program.problem.timings, program.layer_s, strict=True):
        for number, (round_trip_s, per_token_s) in enumerate(timing.prices.host_attention.pieces):
            for place, knot in enumerate(program.knots[1:], 1):
                terms = [(program.kv[place], per_token_s), (program.linked[place], round_trip_s)]
                beside_s = float(timing.still.query_s[knot] + timing.still.rest_s[knot])
                name = f"host_attention_{number}_wave_{timing.sequences}_step_{knot}"
                program.at_most_s(name, terms, [(layer_s[place], -1.0)], -beside_s)


def define_write_time_constraints(program: Program) -> None:
    """Write >= setup + seconds a byte x bytes written, in the steps after which tokens leave HBM."""
    at_birth = program.problem.setting.write_back is WriteBack.AT_BIRTH
    for timing, write_s in zip(program.problem.timings, program.write_s, strict=True):
        setup_s, per_byte_s = timing.prices.stream.pieces[-1]
        for place, knot in enumerate(program.knots):
            if place + 1 == len(program.knots) and not at_birth:
                continue
            seconds = per_byte_s + timing.duplex_s_per_byte * (1.0 if knot else 0.0)
            terms = [(program.written[place], seconds * timing.d2h_bytes_by_written)]
            still_s = float(timing.still.write_s[knot])
            if knot == 0:
                kept, living = _kept_by_prefill(program)
                terms += [(variable, sign * seconds * timing.d2h_bytes_by_written) for variable, sign in kept]
                terms.append((program.saved[0], seconds * timing.d2h_bytes_by_saved))
                still_s += living * seconds * timing.d2h_bytes_by_written
            if not at_birth and place + 1 < len(program.knots):
                terms.append((program.linked[place + 1], setup_s))
            program.at_most_s(f"write_wave_{timing.sequences}_step_{knot}", terms, [(write_s[place], -1.0)], -still_s)


def define_step_time_constraints(program: Program) -> None:
    """A step is at least as long as each path through its pipeline; the paths are those of ``sim.pipeline``."""
    for wave, timing in enumerate(program.problem.timings):
        for place, knot in enumerate(program.knots):
            for name, terms, constant_s in _paths(program, wave, timing, place):
                program.at_most_s(
                    f"path_{name}_wave_{timing.sequences}_step_{knot}",
                    [],
                    [*terms, (program.step_s[wave][place], -1.0)],
                    -constant_s,
                )


def define_latency_constraint(program: Program) -> None:
    """The mean time between tokens is at most what the user allows."""
    if program.max_tpot_s is not None:
        program.at_most_s("latency", [], _weighted_steps(program, program.latency), program.max_tpot_s)


def define_objective(program: Program) -> None:
    """Weighted times of all waves."""
    program.lp.setObjective(_summed(_weighted_steps(program, program.weights)))


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


def _paths(program: Program, wave: int, timing: Timing, place: int) -> list[tuple[str, list[Term], float]]:
    """Name, terms and constant of each path through the step at ``place`` (``sim.pipeline`` derives them)."""
    setting = program.problem.setting
    layers, depth, head_s = setting.model.layers, setting.prefetch_layers, timing.prices.head_s
    fetch, layer, write = program.fetch_s[wave][place], program.layer_s[wave][place], program.write_s[wave][place]
    query_s = float(timing.still.query_s[program.knots[place]])
    if timing.prices.recalls:
        computed = [(layer, float(layers)), (fetch, float(layers))]
        first = [(layer, 1.0), (fetch, 1.0)]
        return [
            ("computed", computed, head_s),
            ("computed_written", [*computed, (write, 1.0)], 0.0),
            ("written", [*first, (write, float(layers))], 0.0),
        ]
    fetched = [(fetch, float(layers - depth)), (layer, 1.0)]
    ahead = program.following(program.fetch_s[wave], place, float(depth))
    return [
        ("computed", [(layer, float(layers))], head_s),
        ("computed_written", [(layer, float(layers)), (write, 1.0)], 0.0),
        ("fetched", fetched, head_s - query_s),
        ("fetched_written", [*fetched, (write, 1.0)], -query_s),
        ("written", [(layer, 1.0), (write, float(layers))], 0.0),
        ("computed_ahead", [(layer, float(layers - depth)), *ahead], 0.0),
        ("fetched_ahead", [(fetch, float(layers - depth)), *ahead], 0.0),
    ]


def _kept_by_prefill(program: Program) -> tuple[list[Term], float]:
    """Tokens whose KV crosses to the host while the prefill runs, as terms and a constant.

    Those that leave HBM at once; all that are kept as KV, if they are written at birth.
    """
    setting, counts = program.problem.setting, counts_of(program.problem.setting)
    if setting.write_back is WriteBack.AT_BIRTH:
        return [(program.inputs[0], -1.0), (program.forward[0], -1.0)], float(counts.cached[0] - counts.dead[0])
    return [(program.kv[0], 1.0)], 0.0


def _duplex_s(timing: Timing, knot: int) -> float:
    """What a fetch loses to the write-back of one token beside it."""
    written = timing.d2h_bytes_by_written if knot else 0.0
    return timing.duplex_s_per_byte * written


def _recompute_pieces(program: Program, timing: Timing, knot: int) -> list[tuple[float, float]]:
    """Seconds of a layer's recomputation by tokens of one sequence; the square of a forward pass by tangents."""
    problem = program.problem
    if knot == 0 or not (problem.uses_inputs or problem.uses_forward):
        return [(0.0, 0.0)]
    if problem.uses_inputs:
        rows = float(timing.rows_by_inputs[knot])
        return [(constant_s, per_row_s * rows) for constant_s, per_row_s in timing.prices.reproject.pieces]
    square, prefix = timing.prices.forward_s_per_token_squared, problem.setting.workload.prompt_tokens
    touches = sorted({round(prefix * share / FORWARD_TANGENTS) for share in range(FORWARD_TANGENTS + 1)})
    return [
        (constant_s - square * at**2, per_row_s + 2 * square * at)
        for constant_s, per_row_s in timing.prices.forward.pieces
        for at in touches
    ]


def _weighted_steps(program: Program, weights: Weights) -> list[Term]:
    shares = knot_weights(program.knots)
    terms: list[Term] = []
    for prefill, decode, step_s in zip(weights.prefill, weights.decode, program.step_s, strict=True):
        terms.append((step_s[0], prefill))
        terms += [(variable, decode * share) for variable, share in zip(step_s[1:], shares[1:], strict=True)]
    return terms


def _summed(terms: Sequence[Term]) -> pulp.LpAffineExpression:
    """PuLP keeps only the last of several coefficients of one variable."""
    coefficients: dict[pulp.LpVariable, float] = {}
    for variable, coefficient in terms:
        coefficients[variable] = coefficients.get(variable, 0.0) + coefficient
    return pulp.LpAffineExpression(coefficients)


def _scaled(terms: Sequence[Term], scale: float) -> list[Term]:
    """Coefficients near 1 keep the solver's tolerances meaningful."""
    return [(variable, coefficient / scale) for variable, coefficient in terms]

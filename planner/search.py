"""Bound and prune: every discrete choice is bounded, best first, and a program is solved only where one may still win."""

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from planner.bound import fits, least_bound, still_bound
from planner.coefficients import Coefficients, coefficients_of
from planner.objective import latency_weights, objective_weights
from planner.options import resident_settings, spilling_settings
from planner.problem import Program, build
from planner.request import Request
from planner.rounding import Shape, round_homes
from planner.solution import Certificate
from planner.solvers import SolverRun, default_solver, run_solver
from sim.cost import CostModel
from sim.flows import Column
from sim.forecast import Forecast, forecast
from sim.homes import TokenHomes
from sim.pipeline import step_seconds
from sim.plan import Plan, Setting, WriteBack

PRUNE_SHARE = 2e-4  # a choice that could gain no more than this is not solved; the certificate's gap counts it
KNOTS = 20  # sampled steps after the first one that overflows
ALL_KNOTS = 40  # so few steps are all sampled
REFINE_SHARE = 3e-3  # knots are doubled while a plan is further than this from its bound and still gets nearer
REFINEMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A priced plan of one setting; ``run`` is the solver's last one, None where all fits HBM and nothing is to choose."""

    priced: Forecast
    objective_s: float
    run: SolverRun | None
    binding: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The winner of a search and its certificate."""

    found: Found
    certificate: Certificate


class Search:
    """All discrete choices of one request. Bounds and solved settings are kept, so a second search is cheap."""

    def __init__(self, request: Request, cost: CostModel, solver: str | None = None) -> None:
        self.request = request
        self.cost = cost
        self.solver = solver or default_solver()
        self._problems: dict[Setting, Coefficients] = {}
        self._found: dict[Setting, Found | None] = {}

    def best(self, *, lossless_only: bool) -> Best | None:
        """The best plan, and a bound below which no plan of the request lies; None if none fits."""
        started, ticket = time.perf_counter(), count()
        queue: list[tuple[float, int, Setting, bool]] = []
        for setting in resident_settings(self.request):
            if setting.is_lossless or not lossless_only:
                heapq.heappush(queue, (self._still_s(setting), next(ticket), setting, False))
        options, solved, floor_s = len(queue), 0, float("inf")
        best: Found | None = None
        while queue and not (best and queue[0][0] >= best.objective_s * (1 - PRUNE_SHARE)):
            bound_s, _, setting, is_leaf = heapq.heappop(queue)
            if not is_leaf and not fits(self._problem(setting)):
                leaves = list(self._leaves(setting, lossless_only))
                options += len(leaves) - 1
                for leaf_s, leaf in leaves:
                    heapq.heappush(queue, (max(leaf_s, bound_s), next(ticket), leaf, True))
                continue
            found = self._solved(setting, bound_s) if is_leaf else self._fitted(setting)
            solved += is_leaf
            if found and is_leaf and waits_for_writes(found.priced):
                for sibling_s, sibling in self._bounded([replace(setting, write_back=WriteBack.AT_BIRTH)]):
                    heapq.heappush(queue, (max(sibling_s, bound_s), next(ticket), sibling, True))
            if found:
                floor_s = min(floor_s, bound_s)
            if found and (best is None or found.objective_s < best.objective_s):
                best = found
        if best is None:
            return None
        bound_s = min([floor_s, best.objective_s] + [queue[0][0]] * bool(queue))
        return Best(found=best, certificate=self._certificate(best, bound_s, started, options, solved))

    def _problem(self, setting: Setting) -> Coefficients:
        if setting not in self._problems:
            self._problems[setting] = coefficients_of(setting, self.cost)
        return self._problems[setting]

    def _still_s(self, setting: Setting) -> float:
        return self._judge(setting, still_bound(self._problem(setting)))

    def _leaves(self, setting: Setting, lossless_only: bool) -> Iterator[tuple[float, Setting]]:
        """Every way to spill, with its bound."""
        leaves = spilling_settings(setting, self.request)
        return self._bounded(leaf for leaf in leaves if leaf.is_lossless or not lossless_only)

    def _bounded(self, settings: Iterable[Setting]) -> Iterator[tuple[float, Setting]]:
        """Each setting with its bound; those that cannot fit are left out."""
        for setting in settings:
            bound_s = least_bound(self._problem(setting), partial(self._judge, setting))
            if bound_s < float("inf"):
                yield bound_s, setting

    def _judge(self, setting: Setting, step_s: tuple[Column, ...]) -> float:
        """The objective of waves whose steps take ``step_s``; infinite if the mean time between tokens is over the limit."""
        if self._breaks_latency(setting, step_s):
            return float("inf")
        return objective_weights(self.request.objective, setting).of(step_s)

    def _breaks_latency(self, setting: Setting, step_s: tuple[Column, ...]) -> bool:
        limit_s = self.request.max_tpot_s
        return limit_s is not None and latency_weights(setting).of(step_s) > limit_s * (1 + 1e-9)

    def _fitted(self, setting: Setting) -> Found | None:
        """Everything in HBM."""
        counts = setting.token_counts
        none = (0,) * len(counts.cached)
        living = tuple(tokens - gone for tokens, gone in zip(counts.cached, counts.dead, strict=True))
        homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
        return self._judged(forecast(Plan(setting=setting, homes=homes), self.cost), None, ())

    def _solved(self, setting: Setting, bound_s: float) -> Found | None:
        if setting not in self._found:
            self._found[setting] = self._solve(setting, bound_s)
        return self._found[setting]

    def _solve(self, setting: Setting, bound_s: float) -> Found | None:
        """Solve the setting's program, round its homes and price them; sample more steps while that brings it nearer."""
        problem, knots = self._problem(setting), KNOTS
        best: Found | None = None
        for _ in range(REFINEMENTS + 1):
            sampled = choose_knots(problem, knots)
            program = build(problem, sampled, self.request.objective, self.request.max_tpot_s)
            run = run_solver(program.lp, self.solver)
            if not run.is_optimal:
                return best
            priced = round_homes(problem, shape_of(program), self.cost)
            found = None if priced is None else self._judged(priced, run, binding_constraints(program))
            gained = found is not None and (best is None or found.objective_s < best.objective_s * (1 - PRUNE_SHARE))
            if found and (best is None or found.objective_s < best.objective_s):
                best = found
            near = best is not None and best.objective_s < bound_s * (1 + REFINE_SHARE)
            if near or len(sampled) == problem.steps or (found and not gained):
                return best
            knots *= 2
        return best

    def _judged(self, priced: Forecast, run: SolverRun | None, binding: tuple[str, ...]) -> Found | None:
        objective_s = self._judge(priced.plan.setting, tuple(wave.step_s for wave in priced.waves))
        if objective_s == float("inf"):
            return None
        return Found(priced=priced, objective_s=objective_s, run=run, binding=binding)

    def _certificate(self, best: Found, bound_s: float, started: float, options: int, solved: int) -> Certificate:
        run = best.run
        solver_gap = 0.0 if run is None else max(0.0, run.objective / run.bound - 1) if run.bound > 0 else 0.0
        gap = best.objective_s / bound_s - 1
        return Certificate(
            name=self.solver,
            status="optimal",
            objective_s=best.objective_s,
            bound_s=bound_s,
            gap=gap,
            solver_gap=min(solver_gap, gap),
            discretisation_gap=max(0.0, gap - solver_gap),
            solve_s=time.perf_counter() - started,
            options=options,
            solved=solved,
            binding=best.binding,
        )


def choose_knots(problem: Coefficients, wanted: int) -> tuple[int, ...]:
    """Steps to sample: the prefill, both sides of the step that first overflows HBM, and evenly from there to the end."""
    last = problem.steps - 1
    if last < max(ALL_KNOTS, wanted):
        return tuple(range(problem.steps))
    over = np.flatnonzero(problem.memory.hbm_all_in > problem.memory.hbm_budget)
    first = max(1, int(over[0])) if len(over) else 1
    spread = np.linspace(first, last, wanted)
    return tuple(sorted({0, 1, max(1, first - 1), *(round(step) for step in spread)}))


def shape_of(program: Program) -> Shape:
    """The program's lines at every step."""
    steps = np.arange(program.problem.steps)
    kv, inputs, forward = (
        np.interp(steps, program.knots, [max(0.0, variable.value() or 0.0) for variable in line])
        for line in (program.kv, program.inputs, program.forward)
    )
    saved = program.saved_at_birth.value() if program.saved_at_birth is not None else 0.0
    off = kv + inputs
    none = np.zeros(len(steps))
    return Shape(
        share_inputs=np.divide(inputs, off, out=none.copy(), where=off > 1e-6),
        forward=forward,
        saved_at_birth=int(np.ceil((saved or 0.0) - 1e-6)),
        least_off=none,
        least_inputs=none,
        round_up=none,
    )


def waits_for_writes(priced: Forecast) -> bool:
    """The waves would end sooner if writing back took no time; else writing at birth, which writes more, gains nothing."""
    setting = priced.plan.setting
    for wave in priced.waves:
        free = replace(wave.times, write_s=np.zeros_like(wave.times.write_s))
        faster_s = step_seconds(free, setting.model.layers, setting.prefetch_layers)
        if float(wave.step_s.sum()) > float(faster_s.sum()) * (1 + PRUNE_SHARE):
            return setting.write_back is WriteBack.AT_EVICTION
    return False


def binding_constraints(program: Program) -> tuple[str, ...]:
    """Families of constraints that leave no slack at a step where the link is on: what holds the optimum back."""
    linked = {
        f"_step_{knot}" for knot, switch in zip(program.knots, program.linked, strict=True) if switch.value() > 0.5
    }
    tight = (
        name
        for name, constraint in program.lp.constraints.items()
        if name.startswith(("hbm_capacity", "host_capacity", "pool", "path")) and abs(constraint.value()) < 1e-9
    )
    families = (name.partition("_step_") for name in [*tight, "latency"] if name in program.lp.constraints)
    return tuple(
        dict.fromkeys(
            family.partition("_wave_")[0] for family, dash, knot in families if dash + knot in linked or not dash
        )
    )

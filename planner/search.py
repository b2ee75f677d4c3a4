"""Bound and prune: every discrete choice is bounded, best first, and a program is solved only where one may still win."""

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial

import numpy as np

from planner.bound import (
    family_bound,
    fits,
    is_coupled,
    least_bound,
    paged_bound,
    rough_bound,
    spilling_bound,
    still_bound,
)
from planner.coefficients import Coefficients, coefficients_of
from planner.neighbours import centre_of, centre_of_lines
from planner.objective import latency_weights, objective_of, objective_weights
from planner.options import Family, assisted_settings, families, paged_settings, resident_settings, spilling_settings
from planner.polish import Neighbourhood, has_few_tokens
from planner.problem import build
from planner.program import Program
from planner.request import Request
from planner.rounding import Shape, round_homes
from planner.solution import Certificate
from planner.solvers import SolverRun, default_solver, run_solver
from planner.spill import SavedRange
from sim.capture import is_captured
from sim.cost import CostModel
from sim.counts import Column
from sim.forecast import Forecast, forecast, over_capacity
from sim.homes import TokenHomes
from sim.pipeline import step_seconds
from sim.plan import Plan, Setting, WriteBack

PRUNE_SHARE = 5e-4  # a choice that could gain no more than this is not solved; the certificate's gap counts it
KNOTS = 20  # sampled steps after the first one that overflows
ALL_KNOTS = 40  # so few steps are all sampled
REFINE_SHARE = 3e-3  # knots are doubled while a plan is further than this from its bound and still gets nearer
REFINEMENTS = 2
TIGHT = 1e-6  # slack of a constraint that binds; rows are scaled to about 1

POLISH_SHARE = 1e-5  # less is not worth another round


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
        self._saved: dict[Setting, SavedRange] = {}
        self._found: dict[Setting, Found | None] = {}

    def best(self, *, lossless_only: bool, sparse_only: bool = False) -> Best | None:
        """The best plan, and a bound below which no plan of the request lies; None if none fits.

        ``lossless_only`` and ``sparse_only`` leave out what changes the output, and dense attention.
        """

        def wanted(setting: Setting) -> bool:
            return (setting.is_lossless or not lossless_only) and not (sparse_only and setting.attention.is_dense)

        started, queue = time.perf_counter(), _Queue(wanted)
        for family in families(self.request):
            queue.push(_Stage.FAMILY, family_bound(family, self.request, self.cost), family)
        solved, floor_s = 0, float("inf")
        best: Found | None = None
        while queue.least_s < (best.objective_s * (1 - PRUNE_SHARE) if best else float("inf")):
            bound_s, stage, choice = queue.pop()
            found = self._open(queue, stage, choice, bound_s, best.objective_s if best else float("inf"))
            solved += stage is _Stage.SPILLING
            if found:  # where all fits HBM, or pages decide, a setting has one plan and that is its bound
                floor_s = min(floor_s, bound_s if stage is _Stage.SPILLING else found.objective_s)
            if found and (best is None or found.objective_s < best.objective_s):
                best = found
        if best is None:
            return None
        bound_s = min(floor_s, best.objective_s, queue.least_s)
        return Best(found=best, certificate=self._certificate(best, bound_s, started, queue.pushed, solved))

    def _open(
        self, queue: "_Queue", stage: "_Stage", choice: Family | Setting, bound_s: float, best_s: float
    ) -> Found | None:
        """Look into the choice with the least bound: queue what it falls into, or find its best plan."""
        if isinstance(choice, Family):
            for setting in resident_settings(choice, self.request):
                self._push(queue, bound_s, setting)
                for assisted in assisted_settings(setting):
                    queue.push(_Stage.SPILLING, max(bound_s, self._rough_s(assisted)), assisted)
            return None
        if stage is _Stage.RESIDENT and not fits(self._problem(choice)):
            for leaf in spilling_settings(choice, self.request):
                if is_captured(leaf) == is_captured(choice):
                    self._push_leaf(queue, bound_s, leaf)
            return None
        if stage is _Stage.COUPLED:
            queue.push(_Stage.SPILLING, max(bound_s, self._least_s(choice)), choice)
            return None
        if stage is not _Stage.SPILLING:
            if choice not in self._found:
                self._found[choice] = self._fitted(choice)
            return self._found[choice]
        found = self._solved(choice, bound_s, best_s)
        if found and waits_for_writes(found.priced):
            sibling = replace(choice, write_back=WriteBack.AT_BIRTH)
            floor_s = bound_s if is_captured(choice) == is_captured(sibling) else 0.0
            queue.push(_Stage.SPILLING, max(floor_s, self._least_s(sibling)), sibling)
        return found

    def _push(self, queue: "_Queue", bound_s: float, setting: Setting) -> None:
        """Queue a setting with all in HBM, or, where that does not fit, for what it falls into; beside it what its own bound says
        nothing of: plans that are launched otherwise, and continuous admission.
        """
        if fits(self._problem(setting)):
            queue.push(_Stage.RESIDENT, max(bound_s, self._still_s(setting)), setting)
            return
        queue.push(_Stage.RESIDENT, max(bound_s, self._spilling_s(setting)), setting)
        for leaf in spilling_settings(setting, self.request):
            if is_captured(leaf) != is_captured(setting):
                self._push_leaf(queue, bound_s, leaf)
        if self.request.concurrency is None:
            for paged in paged_settings(setting):
                queue.push(_Stage.PAGED, max(bound_s, self._paged_s(setting)), paged)

    def _push_leaf(self, queue: "_Queue", bound_s: float, leaf: Setting) -> None:
        stage = _Stage.COUPLED if is_coupled(self._problem(leaf)) else _Stage.SPILLING
        queue.push(stage, max(bound_s, self._rough_s(leaf)), leaf)

    def _problem(self, setting: Setting) -> Coefficients:
        if setting not in self._problems:
            self._problems[setting] = coefficients_of(setting, self.cost)
        return self._problems[setting]

    def _still_s(self, setting: Setting) -> float:
        return self._judge(setting, still_bound(self._problem(setting), self.cost))

    def _spilling_s(self, setting: Setting) -> float:
        return self._judge(setting, spilling_bound(self._problem(setting), self.cost))

    def _rough_s(self, setting: Setting) -> float:
        """What no plan of ``setting`` that spills beats, whatever couples its steps; infinite if none fits."""
        return rough_bound(self._problem(setting), partial(self._judge, setting))

    def _least_s(self, setting: Setting) -> float:
        """The same with the coupling."""
        bound_s, self._saved[setting] = least_bound(self._problem(setting), partial(self._judge, setting))
        return bound_s

    def _paged_s(self, setting: Setting) -> float:
        """What continuous admission of ``setting`` cannot beat."""
        return paged_bound(self._problem(setting), self.request, self.cost)

    def _judge(self, setting: Setting, step_s: tuple[Column, ...]) -> float:
        """The objective of waves whose steps take ``step_s``; infinite if the mean time between tokens is over the limit."""
        if self._breaks_latency(setting, step_s):
            return float("inf")
        return objective_weights(self.request.objective, setting).of(step_s)

    def _breaks_latency(self, setting: Setting, step_s: tuple[Column, ...]) -> bool:
        limit_s = self.request.max_tpot_s
        return limit_s is not None and latency_weights(setting).of(step_s) > limit_s * (1 + 1e-9)

    def _fitted(self, setting: Setting) -> Found | None:
        """Everything in HBM; None if not even one sequence fits."""
        counts = setting.token_counts
        none = (0,) * len(counts.cached)
        living = tuple(tokens - gone for tokens, gone in zip(counts.cached, counts.dead, strict=True))
        homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
        try:
            return self._judged(forecast(Plan(setting=setting, homes=homes), self.cost), None, ())
        except ValueError:
            return None

    def _solved(self, setting: Setting, bound_s: float, best_s: float) -> Found | None:
        if setting not in self._found:
            self._found[setting] = self._polished(setting, self._solve(setting, bound_s, best_s))
        return self._found[setting]

    def _solve(self, setting: Setting, bound_s: float, best_s: float = float("inf")) -> Found | None:
        """Solve the setting's program, round its homes and price them; sample more steps while that brings it nearer.

        Not where the program itself comes to more than ``best_s``, the best so far.
        """
        problem, knots = self._problem(setting), KNOTS
        best: Found | None = None
        for _ in range(REFINEMENTS + 1):
            sampled = choose_knots(problem, knots)
            solved = self._solved_program(problem, sampled)
            if solved is None:
                return best
            program, run = solved
            found = self._rounded(problem, shape_of(program), run, binding_constraints(program))
            gained = found is not None and (best is None or found.objective_s < best.objective_s * (1 - PRUNE_SHARE))
            if found and (best is None or found.objective_s < best.objective_s):
                best = found
            least_s = max(bound_s * (1 + REFINE_SHARE), run.objective * (1 + PRUNE_SHARE))
            near = best is not None and (best.objective_s < least_s or run.objective > best_s)
            if near or len(sampled) == problem.steps or (found and not gained):
                return best
            knots *= 2
        return best

    def _solved_program(self, problem: Coefficients, knots: tuple[int, ...]) -> tuple[Program, SolverRun] | None:
        """With as many saved inputs as the bound suggests; where they leave no room, with any number."""
        for saved in dict.fromkeys((self._saved.get(problem.setting), None)):
            program = build(problem, knots, self.request.objective, self.request.max_tpot_s, saved)
            run = in_seconds(run_solver(program.lp, self.solver), program)
            if run.is_optimal:
                return program, run
        return None

    def _rounded(self, problem: Coefficients, shape: Shape, run: SolverRun, binding: tuple[str, ...]) -> Found | None:
        """The program's lines in whole tokens; where there are few tokens and rounding breaks a limit, whole ones near them."""
        priced = round_homes(problem, shape, self.cost)
        if priced is not None or not has_few_tokens(problem):
            return None if priced is None else self._judged(priced, run, binding)
        weights = objective_weights(self.request.objective, problem.setting)
        near = Neighbourhood(problem=problem, weights=weights, cost=self.cost, limit_s=float("inf"))
        plans = near.plans(centre_of_lines(shape))
        return self._best_of(plans, run, binding)

    def _polished(self, setting: Setting, found: Found | None) -> Found | None:
        """Where there are few tokens: whole ones near the plan found, as long as that makes it better."""
        problem = self._problem(setting)
        weights = objective_weights(self.request.objective, setting)
        while found and has_few_tokens(problem):
            limit_s = found.objective_s * (1 - POLISH_SHARE)
            near = Neighbourhood(problem=problem, weights=weights, cost=self.cost, limit_s=limit_s)
            better = self._best_of(near.plans(centre_of(found.priced.plan)), found.run, found.binding)
            if better is None or better.objective_s >= found.objective_s:
                break
            found = better
        return found

    def _best_of(self, plans: Iterable[Plan], run: SolverRun | None, binding: tuple[str, ...]) -> Found | None:
        judged = (self._within_capacity(plan, run, binding) for plan in plans)
        return min((found for found in judged if found), key=lambda found: found.objective_s, default=None)

    def _within_capacity(self, plan: Plan, run: SolverRun | None, binding: tuple[str, ...]) -> Found | None:
        priced = forecast(plan, self.cost)
        over_hbm, over_host = over_capacity(priced)
        if np.any(over_hbm > 0) or np.any(over_host > 0):
            return None
        return self._judged(priced, run, binding)

    def _judged(self, priced: Forecast, run: SolverRun | None, binding: tuple[str, ...]) -> Found | None:
        outcome, limit_s = priced.outcome, self.request.max_tpot_s
        if limit_s is not None and (outcome.tpot_s or 0.0) > limit_s * (1 + 1e-9):
            return None
        return Found(priced=priced, objective_s=objective_of(outcome, self.request), run=run, binding=binding)

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


class _Stage(Enum):
    """How much of a choice is settled: each falls into choices of the next, or is a plan's setting."""

    FAMILY = auto()  # concurrency and streamed weights
    RESIDENT = auto()  # attention and format in HBM; a plan if all fits
    PAGED = auto()  # a plan: continuous admission
    COUPLED = auto()  # a program over token homes whose bound can still be raised
    SPILLING = auto()  # a program over token homes


class _Queue:
    """Choices by their bounds, least first; those that are not wanted or cannot fit are left out."""

    def __init__(self, wanted: Callable[[Setting], bool]) -> None:
        self._wanted = wanted
        self._heap: list[tuple[float, int, _Stage, Family | Setting]] = []
        self.pushed = 0

    @property
    def least_s(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")

    def push(self, stage: _Stage, bound_s: float, choice: Family | Setting) -> None:
        if bound_s < float("inf") and (isinstance(choice, Family) or self._wanted(choice)):
            heapq.heappush(self._heap, (bound_s, self.pushed, stage, choice))
            self.pushed += 1

    def pop(self) -> tuple[float, _Stage, Family | Setting]:
        bound_s, _, stage, choice = heapq.heappop(self._heap)
        return bound_s, stage, choice


def in_seconds(run: SolverRun, program: Program) -> SolverRun:
    """Objective and bound, which the program measures in its own unit."""
    return replace(run, objective=run.objective * program.unit_s, bound=run.bound * program.unit_s)


def choose_knots(problem: Coefficients, wanted: int) -> tuple[int, ...]:
    """Steps to sample: the prefill, both sides of the step that first overflows HBM, and evenly from there to the end."""
    last = problem.steps - 1
    if last < max(ALL_KNOTS, wanted):
        return tuple(range(problem.steps))
    over = np.flatnonzero(problem.memory.hbm_all_in > problem.memory.hbm_budget)
    first = max(1, int(over[0])) if len(over) and not problem.setting.host_attention else 1
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
    assisted = program.problem.setting.host_attention
    return Shape(
        off=off,
        share_inputs=np.divide(inputs, off, out=none.copy(), where=off > 1e-6),
        forward=forward,
        saved_at_birth=int(np.ceil((saved or 0.0) - 1e-6)),
        least_off=kv if assisted else none,
        least_inputs=none,
        least_forward=none,
        round_up=none,
    )


def waits_for_writes(priced: Forecast) -> bool:
    """The waves would end sooner if writing back took no time; else writing at birth, which writes more, gains nothing.

    Only decode steps gain: of the prompt, at birth no less is written.
    """
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
        for name, constraint in program.rows.items()
        if name.startswith(("hbm_capacity", "host_capacity", "pool", "path")) and abs(constraint.value()) < TIGHT
    )
    families = (name.partition("_step_") for name in [*tight, "latency"] if name in program.rows)
    return tuple(
        dict.fromkeys(
            family.partition("_wave_")[0] for family, dash, knot in families if dash + knot in linked or not dash
        )
    )

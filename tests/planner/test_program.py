"""The integer program earns its place: take away the solver, or any one family of constraints, and an answer is wrong.

For each family there is a small problem on which the whole program comes to what an exhaustive search finds, and the
program without the family to less than any plan takes.
"""

import re
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import pytest

from builders import in_hbm, make_cost, make_homes, make_machine, make_model, make_products, make_setting
from exhaustive import optimum_of_setting, settings_to_search
from instances import FAMILIES
from planner import search
from planner.bound import family_bound, least_bound, paged_bound, rough_bound
from planner.coefficients import coefficients_of
from planner.objective import objective_weights
from planner.optimum import optimum
from planner.options import Family
from planner.problem import build
from planner.program import Program
from planner.request import Request
from planner.solvers import SolverRun, run_solver
from sim import catalogue
from sim.attention import Selector
from sim.capture import is_captured, keeps_open_group
from sim.cost import CostModel
from sim.forecast import forecast
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Placement, Plan, Recompute, Setting, WriteBack
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

CLOSE = 0.04  # of the whole program to the exhaustive search, whose tokens are whole
EARNED = 2e-3  # by which the program without a family falls short, at least
MISSED = 1e-2  # the same for the optimum without the solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Earner:
    """Where ``constraints`` matter: ``seed`` of a family of problems, in the setting that ``choices`` name.

    Where it says so, copies take ``slower_starts`` times as long to start.
    """

    constraints: str
    problems: str
    seed: int
    choices: dict[str, Any] = field(default_factory=dict)
    slower_starts: float = 1.0

    @property
    def request(self) -> Request:
        request = next(family for family in FAMILIES if family.name == self.problems).request(self.seed)
        copy_setup_s = self.slower_starts * request.profile.copy_setup_s
        return replace(request, profile=replace(request.profile, copy_setup_s=copy_setup_s))

    def setting(self, request: Request) -> Setting:
        wanted = {"host_attention": False, "weights_on_host": 0.0, "write_back": WriteBack.AT_EVICTION} | self.choices
        return next(
            setting
            for setting in settings_to_search(request)
            if all(_choice(setting, name) == value for name, value in wanted.items())
        )


def _choice(setting: Setting, name: str) -> Any:
    return setting.attention.selector if name == "selector" else getattr(setting, name)


def earner(constraints: str, problems: str, seed: int, *, slower_starts: float = 1.0, **choices: Any) -> Earner:
    return Earner(constraints=constraints, problems=problems, seed=seed, choices=choices, slower_starts=slower_starts)


INPUTS_ON_HOST, INPUTS_IN_HBM, TOKENS = Recompute.ACTIVATIONS_HOST, Recompute.ACTIVATIONS_HBM, Recompute.TOKENS
INT8_IN_HBM = KvFormats(gpu=KvFormat.INT8)
SWA_RECENT = {"selector": Selector.SWA, "placement": Placement.RECENT}
EARNERS = (
    earner("pool", "waves", 7, recompute=INPUTS_IN_HBM, concurrency=2),
    earner("hbm_capacity", "waves", 20, recompute=INPUTS_IN_HBM, concurrency=3),
    earner("host_capacity", "small host", 12, recompute=TOKENS, concurrency=2),
    earner("outward_from_host", "8-bit KV", 9, recompute=TOKENS, concurrency=3),
    earner("outward_from_hbm", "all at once", 350, host_attention=True, concurrency=4),
    earner("written_grown", "waves", 235, recompute=INPUTS_ON_HOST, concurrency=2),
    earner("written_moved", "small host", 12, recompute=TOKENS, concurrency=2),
    earner("saved_at_birth", "all at once", 36, recompute=INPUTS_IN_HBM, concurrency=1),
    earner("saved_held", "all at once", 36, recompute=INPUTS_IN_HBM, concurrency=1),
    earner("linked", "the link fills up", 7, recompute=TOKENS, concurrency=1),
    earner("recomputing", "arithmetic to spare", 203, recompute=INPUTS_IN_HBM, concurrency=1),
    earner("linked_stays_on", "small host", 95, recompute=TOKENS, concurrency=3),
    earner("recomputing_stays_on", "sparse", 2822, recompute=INPUTS_IN_HBM, concurrency=2, **SWA_RECENT),
    earner("streamed", "the link fills up", 353, host_attention=True, weights_on_host=0.5, concurrency=2),
    earner("fetch", "sparse", 275, recompute=TOKENS, concurrency=3),
    earner("fetch_inputs", "8-bit KV", 5, slower_starts=20, recompute=INPUTS_ON_HOST, concurrency=3),
    earner("layer", "arithmetic to spare", 7, recompute=INPUTS_IN_HBM, concurrency=2),
    earner("host_attention", "all at once", 259, host_attention=True, concurrency=3),
    earner("write", "sparse", 275, recompute=TOKENS, concurrency=3),
    earner("path_computed", "waves", 1, host_attention=True, concurrency=1),
    earner("path_computed_written", "sparse", 275, recompute=TOKENS, concurrency=3),
    earner("path_computed_ahead", "8-bit KV", 5, recompute=INPUTS_ON_HOST, concurrency=3),
    earner("path_fetched", "latency", 1, weights_on_host=0.25, concurrency=1),
    earner("path_fetched_written", "waves", 20, recompute=TOKENS, concurrency=3),
    earner("path_fetched_ahead", "arithmetic to spare", 199, recompute=TOKENS, concurrency=2),
    earner("path_launched", "waves", 334, recompute=INPUTS_IN_HBM, concurrency=2),
    earner("path_written", "arithmetic to spare", 199, recompute=TOKENS, concurrency=2),
)


@pytest.mark.parametrize("case", EARNERS, ids=lambda case: case.constraints)
def test_without_a_family_of_constraints_the_program_promises_what_no_plan_keeps(case: Earner) -> None:
    request = case.request
    cost = CostModel(machine=request.machine, profile=request.profile)
    setting = case.setting(request)
    exact = optimum_of_setting(setting, request, cost)
    assert exact is not None

    whole_s, without_s = (_solved_s(request, setting, cost, left_out) for left_out in ("", case.constraints))

    assert whole_s == pytest.approx(exact[1], rel=CLOSE)
    assert without_s < min(whole_s, exact[1]) * (1 - EARNED)


def test_every_family_of_constraints_has_such_a_case() -> None:
    families: set[str] = set()
    for case in EARNERS:
        request = case.request
        program = _program(request, case.setting(request), CostModel(machine=request.machine, profile=request.profile))
        families |= {_family(name) for name in program.rows}

    assert families == {case.constraints for case in EARNERS}


def test_the_bound_of_a_prefill_counts_the_prompt_that_it_writes_at_birth() -> None:
    """All fits HBM, so that there is one plan: its prefill takes what the bound says, write-backs in line included."""
    at_birth, at_eviction = (
        make_setting(prompt=8, write_back=when) for when in (WriteBack.AT_BIRTH, WriteBack.AT_EVICTION)
    )
    cost = make_cost(gather_setup_s=2.0)

    bounds_s = [
        rough_bound(coefficients_of(setting, cost), lambda step_s: float(step_s[0][0]))
        for setting in (at_birth, at_eviction)
    ]

    assert bounds_s == [forecast(in_hbm(setting), cost).waves[0].step_s[0] for setting in (at_birth, at_eviction)]
    assert bounds_s[0] == bounds_s[1] + 2 * (2 + 8)


EAGER = {"weights_on_host": 0.5, "prefetch_layers": 3}  # four buffers do not divide six layers


@pytest.mark.parametrize("changes", [{}, EAGER, {"weights_on_host": 0.5}, {"write_back": WriteBack.AT_BIRTH}], ids=str)
def test_a_forwarded_prefix_takes_the_program_what_it_takes_the_engine(changes: dict[str, Any]) -> None:
    """Of 16 sequences, from none to all of 40 tokens, by each of the pieces of one price: captured, or kernel by kernel.

    A token off HBM leaves 384 bytes and takes 128 for what is computed of it: beyond 50 tokens in HBM three for each two.
    """
    machine, model = make_machine(flop_per_s=512.0, launch_s=2.0), make_model(layers=6)
    shape = {"batch": 16, "prompt": 40, "output": 37, "kv_budget_bytes": 16 * 50 * 384}
    setting = make_setting(**shape, machine=machine, model=model, recompute=TOKENS, **changes)
    cost = make_cost(machine, kernels_per_layer=3.0, prompt_tile_s=640.0)
    dropped = [ceil(1.5 * max(0, step - 10)) for step in range(37)]
    plan = Plan(setting=setting, homes=make_homes([40 + n - gone for n, gone in enumerate(dropped)], dropped=dropped))
    problem, request = coefficients_of(setting, cost), _request(setting, cost)
    program = build(problem, tuple(range(problem.steps)), request.objective)
    for kv, forward, count in zip(program.kv, program.forward, dropped, strict=True):
        program.lp.addConstraint(kv == 0)
        program.lp.addConstraint(forward == count)

    run = run_solver(program.lp)

    (wave,) = forecast(plan, cost).waves
    price = problem.timings[0].prices.forward
    layer_s = [seconds.value() * program.unit_s for seconds in program.layer_s[0]]
    assert is_captured(setting) == (changes is not EAGER)
    assert dropped[-1] == 39
    assert len(price.pieces) > 2
    assert run.is_optimal
    assert wave.times.ops["forward"].tolist() == [price.at_one(gone) for gone in dropped]
    assert layer_s == pytest.approx(wave.times.layer_s.tolist(), rel=1e-6)


@pytest.mark.parametrize("concurrency", [8, 64, 65, 100])
@pytest.mark.parametrize("positions", [0, 64])
def test_the_bound_of_admission_one_by_one_counts_no_launch_that_a_step_may_be_without(
    positions: int, concurrency: int
) -> None:
    """Little but launches, of 1 s: more in steps of over 64 rows, and more of rotation, but none of either for a prompt;
    that has six of its own, in each pass of no more than may run at once.
    """
    machine, model = make_machine(hbm_bytes_per_s=1e9, launch_s=1.0), make_model(positions=positions)
    cost = make_cost(machine, kernels_per_layer=3.0)
    setting = make_setting(
        batch=100, output=9, machine=machine, model=model, concurrency=concurrency, admission=Admission.CONTINUOUS
    )

    bound_s = paged_bound(coefficients_of(setting, cost), _request(setting, cost), cost)

    taken_s = forecast(in_hbm(setting), cost).outcome.makespan_s
    assert 0.4 * taken_s < bound_s <= taken_s


@pytest.mark.parametrize("times", [0.25, 4.0])
def test_bounds_count_on_products_that_were_measured_only_where_those_are_faster(times: float) -> None:
    """Little but weights: 4 s a layer at 640 B/s. Where they take 1 s of it that is all that a family is sure of."""
    machine, model = make_machine(hbm_bytes_per_s=640.0), make_model()
    bare = make_cost(machine)
    cost = make_cost(machine, products=make_products(bare, model, {1: times, 8: times}))
    paged = make_setting(batch=8, output=64, machine=machine, model=model, admission=Admission.CONTINUOUS)
    request = _request(paged, cost)
    whole = Family(concurrency=8, weights_on_host=0.0)

    bounds_s = family_bound(whole, request, cost), paged_bound(coefficients_of(paged, cost), request, cost)

    sure = min(1.0, times)
    assert bounds_s[0] == pytest.approx(64 * 2 * 4 * sure)
    assert bounds_s[1] == pytest.approx(bounds_s[0] + 64 * 0.8 + _attended_s(paged, 640.0))
    waves = replace(paged, admission=Admission.WAVES)
    assert max(bounds_s) <= min(forecast(in_hbm(one), cost).outcome.makespan_s for one in (paged, waves))


def _attended_s(setting: Setting, hbm_bytes_per_s: float) -> float:
    """64 bytes a token and layer, in two layers, of each sequence at each step that decodes."""
    return 2 * 64 * setting.workload.batch * sum(setting.token_counts.cached[1:]) / hbm_bytes_per_s


def _request(setting: Setting, cost: CostModel) -> Request:
    return Request(
        machine=setting.machine,
        profile=cost.profile,
        model=setting.model,
        workload=setting.workload,
        max_sparsity=0.0,
        kv_formats=(),
    )


@pytest.mark.parametrize("seed, close", [(1, 1e-3), (6, 2e-2), (13, 2e-3)])
def test_where_keys_wait_in_hbm_program_and_bound_promise_no_more_than_a_plan_keeps(seed: int, close: float) -> None:
    """The program, whose fetch is a straight line, comes close with more tokens on the host than a group has; 6 has 52."""
    request = next(family for family in FAMILIES if family.name == "open group").request(seed)
    cost = CostModel(machine=request.machine, profile=request.profile)
    setting = next(setting for setting in settings_to_search(request) if keeps_open_group(setting))
    exact = optimum_of_setting(setting, request, cost)
    assert exact is not None
    assert any(exact[0].homes.host_kv)
    problem, judge = coefficients_of(setting, cost), objective_weights(request.objective, setting).of

    program_s, bound_s = _solved_s(request, setting, cost, ""), rough_bound(problem, judge)

    assert exact[1] * (1 - close) < program_s <= exact[1] * (1 + 1e-9)
    assert bound_s == pytest.approx(exact[1], rel=1e-9)


def test_without_the_latency_constraint_a_limit_that_no_plan_keeps_seems_kept() -> None:
    request = EARNERS[0].request
    cost = CostModel(machine=request.machine, profile=request.profile)

    whole, without = (
        _program(request, EARNERS[0].setting(request), cost, max_tpot_s=1e-12, left_out=left_out)
        for left_out in ("", "latency")
    )

    assert not run_solver(whole.lp).is_optimal
    assert run_solver(without.lp).is_optimal


def test_without_the_solver_the_optimum_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size: on an H100 tokens go to the host first, and are kept as inputs once the link is full."""
    machine = MachineSpec(name="h100-80g-sxm", gpu=catalogue.gpu("h100-80g-sxm"), host=catalogue.host())
    request = Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model("opt-30b"),
        workload=Workload(batch=56, prompt_tokens=128, output_tokens=512),
        max_sparsity=0.0,
        kv_formats=(),
        concurrency=56,
    )
    solved = optimum(request)

    monkeypatch.setattr(search, "run_solver", _idle)
    unsolved = optimum(request)

    assert solved is not None
    assert unsolved is not None
    assert unsolved.found.objective_s > solved.found.objective_s * (1 + MISSED)


def _idle(lp: Any, name: str) -> SolverRun:
    """What a solver would report that leaves every variable at zero."""
    for variable in lp.variables():
        variable.varValue = 0.0
    return SolverRun(name=name, status="optimal", objective=0.0, bound=0.0, solve_s=0.0)


def _program(
    request: Request, setting: Setting, cost: CostModel, *, max_tpot_s: float | None = None, left_out: str = ""
) -> Program:
    """Every step a knot, without the constraints of the family ``left_out``."""
    problem, at_most = coefficients_of(setting, cost), Program.at_most
    _, saved = least_bound(problem, objective_weights(request.objective, setting).of)

    def all_but_some(program: Program, name: str, *row: Any) -> None:
        if _family(name) != left_out:
            at_most(program, name, *row)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Program, "at_most", all_but_some)
        return build(problem, tuple(range(problem.steps)), request.objective, max_tpot_s, saved)


def _solved_s(request: Request, setting: Setting, cost: CostModel, left_out: str) -> float:
    program = _program(request, setting, cost, left_out=left_out)
    run = search.in_seconds(run_solver(program.lp), program)
    assert run.is_optimal
    return run.objective


def _family(name: str) -> str:
    """``fetch_1_wave_2_step_3`` is of the family ``fetch``."""
    return re.sub(r"_\d+$", "", re.split("_wave_|_step_", name)[0])

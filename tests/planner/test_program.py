"""The program earns its place: without a family of its constraints, it claims what no plan can do."""

import re
from functools import cache

import pytest

from planner.coefficients import coefficients_of
from planner.options import Family, assisted_settings, resident_settings, spilling_settings
from planner.problem import Program, build
from planner.request import Objective, Request
from planner.search import choose_knots
from planner.solvers import run_solver
from sim import catalogue
from sim.cost import CostModel
from sim.plan import Recompute, Setting
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

A100 = ("a100-40g", "opt-13b", 64, 128, 64, 6 * 10**9)
GH200 = ("gh200", "opt-30b", 64, 256, 48, 4 * 10**9)
CPU = "cpu"  # instead of a source of recomputation: the CPU attends to what is on the host
# family of constraints: where it binds
BINDS = {
    "hbm_capacity": (A100, Recompute.ACTIVATIONS_HOST),
    "layer": (A100, Recompute.ACTIVATIONS_HOST),
    "fetch": (A100, Recompute.ACTIVATIONS_HOST),
    "linked": (A100, Recompute.ACTIVATIONS_HOST),
    "recomputing": (A100, Recompute.ACTIVATIONS_HOST),
    "path_computed": (A100, Recompute.ACTIVATIONS_HOST),
    "path_fetched": (A100, Recompute.ACTIVATIONS_HOST),
    "path_computed_written": (A100, Recompute.ACTIVATIONS_HOST),
    "saved_at_birth": (A100, Recompute.ACTIVATIONS_HOST),
    "saved_held": (A100, Recompute.ACTIVATIONS_HOST),
    "write": (A100, Recompute.ACTIVATIONS_HOST),
    "host_attention": (A100, CPU),
    "outward_from_hbm": (GH200, CPU),
}
Case = tuple[str, str, int, int, int, int]


def family_of(name: str) -> str:
    """``fetch_0_wave_64_step_3`` is of the family ``fetch``."""
    return re.sub(r"(_inputs)?_\d+$", "", re.sub(r"_wave_\d+|_step_\d+$", "", name))


def request_of(case: Case) -> Request:
    gpu, model, batch, prompt, output, budget = case
    machine = MachineSpec(name=gpu, gpu=catalogue.gpu(gpu), host=catalogue.host())
    return Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model(model),
        workload=Workload(batch=batch, prompt_tokens=prompt, output_tokens=output),
        max_sparsity=0.0,
        kv_formats=(),
        concurrency=batch,
        kv_budget_bytes=budget,
    )


def setting_of(case: Case, source: str) -> Setting:
    request = request_of(case)
    dense = next(resident_settings(Family(concurrency=case[2], weights_on_host=0.0), request))
    if source == CPU:
        return next(assisted_settings(dense))
    return next(one for one in spilling_settings(dense, request) if one.recompute == source)


def program_of(case: Case, source: str) -> Program:
    request = request_of(case)
    problem = coefficients_of(setting_of(case, source), CostModel(machine=request.machine, profile=request.profile))
    return build(problem, choose_knots(problem, 16), Objective.THROUGHPUT)


@cache
def whole_s(case: Case, source: str) -> float:
    run = run_solver(program_of(case, source).lp)
    assert run.is_optimal
    return run.objective


@pytest.mark.parametrize("family", BINDS)
def test_without_a_family_of_constraints_the_program_claims_too_much(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, source = BINDS[family]
    expected_s, at_most = whole_s(case, source), Program.at_most

    def all_but_family(self: Program, name: str, *row: object) -> None:
        if family_of(name) != family:
            at_most(self, name, *row)  # type: ignore[arg-type]

    monkeypatch.setattr(Program, "at_most", all_but_family)
    program = program_of(case, source)

    assert family not in map(family_of, program.rows)
    assert run_solver(program.lp).objective < expected_s * (1 - 1e-5)


def test_every_family_has_a_name() -> None:
    names = {family_of(name) for case, source in BINDS.values() for name in program_of(case, source).rows}

    assert names >= set(BINDS)

"""More of anything never makes the optimum slower, nor does being allowed more; beyond the gap that it states."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.optimum import optimum
from planner.request import Objective, Request
from planner.search import Best
from sim import catalogue
from sim.kv import KvFormat
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

SOME = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    gpu = draw(st.sampled_from(("t4", "v100-16g", "l4", "a100-40g", "rtx-4090", "h100-80g-sxm", "gh200")))
    machine = MachineSpec(name=gpu, gpu=catalogue.gpu(gpu), host=catalogue.host())
    return Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model(draw(st.sampled_from(("opt-1.3b", "opt-6.7b", "llama-3-8b", "pythia-2.8b")))),
        workload=Workload(
            batch=draw(st.integers(1, 48)),
            prompt_tokens=draw(st.sampled_from((16, 128, 700))),
            output_tokens=draw(st.integers(2, 96)),
        ),
        max_sparsity=draw(st.sampled_from((0.0, 0.5, 0.8))),
        kv_formats=draw(st.sampled_from(((), (KvFormat.INT8,)))),
        kv_budget_bytes=draw(st.sampled_from((None, 2**29, 2**31))),
    )


def best_of(request: Request) -> Best:
    best = optimum(request)
    assert best is not None
    return best


def assert_no_slower(better: Request, worse: Request) -> None:
    """Within the gap of the better one: its own optimum may be as far below what was found."""
    found, held = best_of(better), best_of(worse)
    slack = 1 + found.certificate.gap + 1e-9
    assert found.found.objective_s <= held.found.objective_s * slack


@SOME
@given(requests(), st.sampled_from(("hbm_bytes_per_s", "fp16_flop_per_s", "hbm_bytes")), st.floats(1.01, 3.0))
def test_more_of_the_gpu_is_no_slower(request: Request, resource: str, factor: float) -> None:
    gpu = request.machine.gpu
    more = replace(gpu, **{resource: type(getattr(gpu, resource))(getattr(gpu, resource) * factor)})

    assert_no_slower(replace(request, machine=replace(request.machine, gpu=more)), request)


@SOME
@given(requests(), st.floats(1.01, 10.0))
def test_a_faster_link_is_no_slower(request: Request, factor: float) -> None:
    gpu = request.machine.gpu
    faster = replace(gpu, link=replace(gpu.link, bytes_per_s=gpu.link.bytes_per_s * factor))

    assert_no_slower(replace(request, machine=replace(request.machine, gpu=faster)), request)


@SOME
@given(requests(), st.sampled_from(("dram_bytes", "dram_bytes_per_s", "flop_per_s")), st.floats(1.01, 4.0))
def test_more_of_the_host_is_no_slower(request: Request, resource: str, factor: float) -> None:
    host = request.machine.host
    more = replace(host, **{resource: type(getattr(host, resource))(getattr(host, resource) * factor)})

    assert_no_slower(replace(request, machine=replace(request.machine, host=more)), request)


@SOME
@given(requests(), st.sampled_from(Objective))
def test_being_allowed_more_is_no_slower(request: Request, objective: Objective) -> None:
    wanted = replace(request, objective=objective)
    strict = replace(wanted, max_sparsity=0.0, kv_formats=())

    assert_no_slower(wanted, strict)
    assert_no_slower(replace(wanted, max_sparsity=0.9), wanted)


@SOME
@given(requests(), st.sampled_from(Objective))
def test_no_objective_is_below_its_bound(request: Request, objective: Objective) -> None:
    certificate = best_of(replace(request, objective=objective)).certificate

    assert certificate.bound_s <= certificate.objective_s * (1 + 1e-9)
    assert certificate.gap == pytest.approx(certificate.solver_gap + certificate.discretisation_gap, abs=1e-9)


@SOME
@given(requests(), st.floats(1.05, 3.0))
def test_a_bound_on_the_time_between_tokens_is_kept(request: Request, room: float) -> None:
    least = best_of(replace(request, objective=Objective.TPOT)).found.objective_s
    bounded = best_of(replace(request, max_tpot_s=least * room)).found.priced.outcome

    assert bounded.tpot_s is not None
    assert bounded.tpot_s <= least * room * (1 + 1e-9)

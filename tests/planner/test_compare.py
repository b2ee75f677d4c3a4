"""The rivals are real plans, and the optimum is never slower than one that is no more lossy."""

from dataclasses import replace

import numpy as np
import pytest

from planner.baselines import RIVALS, play
from planner.compare import Row, compare, row_to_json
from planner.request import Request
from sim import catalogue
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.forecast import forecast, over_capacity
from sim.kv import KvFormat
from sim.plan import Admission, Placement, Recompute
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

POLICIES = [
    "optimum",
    "optimum-lossless",
    "vllm",
    "vllm-8bit",
    "flexgen",
    "accelerate",
    "deepspeed-zero",
    "alisa",
    "h2o",
    "kvpr",
    "pages",
]
CASES = {
    "the paper's small GPU": ("v100-16g", "opt-6.7b", 32, 128, 128),
    "all fits": ("v100-16g", "opt-6.7b", 4, 128, 64),
    "weights do not fit": ("t4", "llama-2-13b", 8, 64, 48),
    "grouped heads": ("l4", "llama-3-8b", 16, 1500, 64),
    "long prompt": ("a100-40g", "llama-2-13b", 8, 2000, 64),
    "a fast link": ("gh200", "opt-30b", 64, 256, 96),
}


def make_request(gpu: str, model: str, batch: int, prompt: int, output: int) -> Request:
    machine = MachineSpec(name=gpu, gpu=catalogue.gpu(gpu), host=catalogue.host())
    return Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model(model),
        workload=Workload(batch=batch, prompt_tokens=prompt, output_tokens=output),
    )


def rows_of(case: str) -> dict[str, Row]:
    return {row.policy: row for row in compare(make_request(*CASES[case]))}


@pytest.mark.parametrize("case", CASES)
def test_no_rival_beats_the_optimum_that_may_lose_as_much(case: str) -> None:
    rows = rows_of(case)
    best, lossless = rows["optimum"].outcome, rows["optimum-lossless"].outcome
    assert best is not None
    assert lossless is not None

    for row in rows.values():
        if row.outcome is not None and row.policy not in ("pages", "h2o"):  # selectors that this request does not allow
            limit = lossless if row.lossless else best
            assert row.outcome.makespan_s >= limit.makespan_s * (1 - 1e-3), row.policy


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_a_plan_that_fits_and_runs_as_priced(case: str) -> None:
    request = make_request(*CASES[case])
    cost = CostModel(machine=request.machine, profile=request.profile)

    for row in compare(request):
        if row.plan is not None:
            assert not any(np.any(over > 0) for over in over_capacity(forecast(row.plan, cost)))
            assert simulate(row.plan, cost).outcome.makespan_s == pytest.approx(row.outcome.makespan_s, rel=1e-9)
            assert row.lossless == row.plan.setting.is_lossless
        else:
            assert row.reason


def test_json_has_the_agreed_keys_and_policies() -> None:
    rows = [row_to_json(row) for row in compare(make_request(*CASES["weights do not fit"]))]

    assert [row["policy"] for row in rows] == POLICIES
    assert list(rows[0]) == [
        "policy",
        "lossless",
        "feasible",
        "reason",
        "makespan_s",
        "tokens_per_s",
        "ttft_s",
        "tpot_s",
        "peak_hbm_bytes",
        "peak_host_bytes",
        "h2d_bytes",
        "d2h_bytes",
    ]
    alisa = next(row for row in rows if row["policy"] == "alisa")
    assert not alisa["feasible"]
    assert str(alisa["reason"]).startswith("out of memory")
    assert alisa["makespan_s"] is None


def test_each_system_is_what_it_is_known_for() -> None:
    request = make_request(*CASES["the paper's small GPU"])
    cost = CostModel(machine=request.machine, profile=request.profile)
    plans = {rival.policy: play(rival, request, cost).priced.plan for rival in RIVALS}

    assert plans["vllm"].setting.admission is Admission.CONTINUOUS
    assert plans["vllm-8bit"].setting.kv_format.gpu is KvFormat.INT8
    assert plans["deepspeed-zero"].setting.weights_on_host == 1.0
    assert set(plans["accelerate"].homes.hbm) == {1}
    assert plans["alisa"].setting.placement is Placement.RECENT
    assert plans["alisa"].setting.attention.selector is Selector.SWA
    assert not plans["alisa"].setting.drop_dead
    assert plans["h2o"].homes.host_kv[-1] == 0
    assert plans["kvpr"].setting.recompute is Recompute.ACTIVATIONS_HOST
    assert plans["kvpr"].homes.hbm[-1] == 1
    flexgen = plans["flexgen"].homes
    shares = [on_host / (on_host + in_hbm) for on_host, in_hbm in zip(flexgen.host_kv, flexgen.hbm, strict=True)]
    assert max(shares) - min(shares) < 0.02  # static


def test_deepspeed_keeps_all_kv_on_the_gpu_and_runs_out_of_it_at_large_batch() -> None:
    request = make_request("v100-16g", "opt-6.7b", 64, 128, 512)
    rival = next(rival for rival in RIVALS if rival.policy == "deepspeed-zero")

    played = play(rival, request, CostModel(machine=request.machine, profile=request.profile))

    assert played.priced is None
    assert played.reason is not None
    assert played.reason.startswith("out of memory")
    small = replace(request, workload=Workload(batch=4, prompt_tokens=128, output_tokens=512))
    assert play(rival, small, CostModel(machine=small.machine, profile=small.profile)).priced is not None

"""The benchmark of decisions: near-tied plans are found, run twice each, taken up again, and failures are told."""

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sim.attention import Selector
from sim.cost import CostModel
from sim.forecast import forecast
from sim.plan import Admission, Placement, Plan, Recompute
from sim.profile import Evidence, Profile
from sim.profile_files import save_profile
from sim.recipe import Recipe, plan_of
from sim.spec import DType
from tests.calibration.tiny import fingerprint, machine

TINY = Recipe(model="opt-125m/8/64", batch=8, prompt=40, output=24, dtype=DType.FP32)
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decisions.py"
WHERE = {"date": "d", "device": "here", "profile": "p"}


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with workloads of a tiny model and whatever it takes to run one."""
    spec = importlib.util.spec_from_file_location("decisions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def small(rng: random.Random, **_: bool) -> Recipe:
        return replace(TINY, batch=rng.choice((4, 6, 8)), prompt=rng.choice((30, 35, 40)))

    monkeypatch.setattr(module, "draw_recipe", small)
    monkeypatch.setattr(module, "SHORTEST_S", 0.0)
    monkeypatch.setattr(module, "require_here", lambda *_: None)
    return module


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """As if measured, and other choices than the nominal one's."""
    evidence = Evidence(fingerprint=fingerprint(), machine=machine())
    changes: dict[str, Any] = {"link_efficiency": 0.05, "kernels_per_layer": 5.0}
    save_profile(
        tmp_path / "p.json",
        replace(Profile.nominal(machine()), name="tiny", basis="a test", evidence=evidence, **changes),
    )
    return tmp_path / "p.json"


def run(decisions: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["decisions.py", *words])
    decisions.main()


def test_the_choices_are_those_of_the_two_profiles(
    decisions: ModuleType, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.json"
    run(decisions, monkeypatch, str(profile), "--table", str(file), "--workloads", "3", "--prepare", "--device", "cpu")

    workloads = json.loads(file.read_text())["workloads"]
    ours, nominal = (
        CostModel(machine=machine(), profile=one)
        for one in (decisions.load_profile(profile), Profile.nominal(machine()))
    )
    assert len({one["workload"] for one in workloads}) == 3
    for one in workloads:
        plans = {case: plan_of(Recipe.of(case), machine()) for case in one["predicted_s"]}
        took, nominally = (
            {case: forecast(plan, cost).outcome.makespan_s for case, plan in plans.items()} for cost in (ours, nominal)
        )
        assert one["measured_choice"] == min(took, key=lambda case: took[case])
        assert one["nominal_choice"] == min(nominally, key=lambda case: nominally[case])
        assert sum(seconds <= 1.15 * min(took.values()) for seconds in took.values()) >= 2
        budget = int(one["workload"].rpartition("=")[2])
        assert all(plan.setting.kv_budget_bytes <= budget for plan in plans.values())


def test_candidates_keep_to_the_budget_and_differ(decisions: ModuleType) -> None:
    whole = plan_of(TINY, machine()).setting.kv_budget_bytes

    found = list(decisions.candidates(TINY, 0.6 * whole, machine()))

    assert len({*found}) == len(found)
    assert all(plan_of(one, machine()).setting.kv_budget_bytes <= 0.6 * whole for one in found)
    assert {one.admission for one in found} == {*Admission}
    assert {one.recompute for one in found} == {Recompute.NONE, Recompute.ACTIVATIONS_HOST}
    sparse = replace(TINY, selector=Selector.SWA, keep=40, placement=Placement.RESIDENT)
    assert {one.admission for one in decisions.candidates(sparse, 0.6 * whole, machine())} == {Admission.WAVES}


def test_what_stopped_goes_on_and_failures_are_told(
    decisions: ModuleType,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, began = tmp_path / "t.json", list[Plan]()
    words = (str(profile), "--table", str(file), "--workloads", "2", "--device", "cpu")

    def interrupted(plan: Plan, *_: object) -> Any:
        began.append(plan)
        if len(began) == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(makespan_s=1.0)

    def out_of_memory_at_first(plan: Plan, *_: object) -> Any:
        began.append(plan)
        if len(began) == 3:
            raise RuntimeError("out of memory\nat length")
        return SimpleNamespace(makespan_s=1.25)

    monkeypatch.setattr(decisions, "measured_figures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(decisions, monkeypatch, *words)
    monkeypatch.setattr(decisions, "measured_figures", out_of_memory_at_first)
    run(decisions, monkeypatch, *words)
    run(decisions, monkeypatch, *words)

    workloads = json.loads(file.read_text())["workloads"]
    tried = sum(len(one["predicted_s"]) for one in workloads)
    assert len(began) == 2 * tried  # one was interrupted, and one that failed is not tried again
    assert [reason for one in workloads for reason in one["failed"].values()] == ["out of memory"]
    said = capsys.readouterr().out
    assert said.count("  not run: ") == 2
    assert "of 2 within 3% of the best" in said
    assert "0 workloads have not been run" in said

    run(decisions, monkeypatch, "--table", str(file))
    assert capsys.readouterr().out in said


def test_without_a_profile_nothing_is_run(
    decisions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(decisions, monkeypatch, "--table", str(tmp_path / "none.json"))

    assert capsys.readouterr().out.startswith(f"{tmp_path / 'none.json'}: not there yet; usage: ")


def test_a_choice_that_cannot_be_run_is_not_within_the_goal(
    decisions: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = {
        "workload": "w",
        "measured_choice": "a",
        "nominal_choice": "b",
        "predicted_s": {"a": 1.0, "b": 1.1, "c": 1.2},
        "measured_s": {"b": [2.0, 2.0], "c": [1.0, 1.0]},
        "failed": {"a": "out of memory"},
    }
    decisions.report({"workloads": [workload], **WHERE})

    said = capsys.readouterr().out
    assert "+100.0%" in said
    assert "0 of 1 within 3% of the best; 1 slower than the nominal choice" in said


@pytest.mark.parametrize(("nominal", "slower"), [([1.0, 1.02], 0), ([1.0, 1.0], 1)])
def test_slower_is_what_rounds_that_differ_less_do_not_explain(
    decisions: ModuleType, capsys: pytest.CaptureFixture[str], nominal: list[float], slower: int
) -> None:
    workload = {
        "workload": "w",
        "measured_choice": "a",
        "nominal_choice": "b",
        "predicted_s": {"a": 1.0, "b": 1.0},
        "measured_s": {"a": [1.02, 1.02], "b": nominal},
        "failed": {},
    }
    decisions.report({"workloads": [workload], **WHERE})

    said = capsys.readouterr().out
    assert (
        f"1 of 1 within 3% of the best; {slower} slower than the nominal choice by more than their rounds differ"
        in said
    )

"""The pace of the host: asked of a GPU alone, and runs held against predictions for the pace that they had."""

from dataclasses import replace

import pytest

from calibration.campaign import Campaign, Drawn, Result, Results, campaign_hash
from calibration.runner import Runner, launch_s
from calibration.verdict import judge
from sim.cost import CostModel
from sim.engine import simulate
from sim.profile import Evidence, Profile
from sim.profile_files import content_hash
from sim.recipe import Recipe, plan_of
from sim.spec import DType
from sim.verdict import Figures, Stratum, Verdict
from tests.calibration.tiny import CPU, MODEL, fingerprint, machine

USUAL_S = 4e-6
RECIPES = tuple(Recipe(model=MODEL, batch=batch, prompt=12, output=5, dtype=DType.FP32) for batch in (1, 2, 3))


def profile_of(usual_s: float) -> Profile:
    """Of a host so slow that most of a run is what it launches."""
    evidence = Evidence(fingerprint=fingerprint(), machine=machine(), launch_s=usual_s)
    return replace(Profile.nominal(machine()), name="tiny", host_operation_s=1e-4, evidence=evidence)


def ran(recipe: Recipe, pace: float, took: float, launched_s: float) -> Figures:
    """``took`` times what is predicted for a host that launches in ``pace`` times the usual time."""
    profile = profile_of(USUAL_S)
    profile = replace(profile, host_operation_s=pace * profile.host_operation_s)
    figures = Figures.of(simulate(plan_of(recipe, machine(), profile), CostModel(machine=machine(), profile=profile)))
    return replace(figures, makespan_s=took * figures.makespan_s, launch_s=launched_s)


def judged(profile: Profile, figures: list[Figures]) -> Verdict:
    """By recipe, whatever the errors."""
    plans = tuple(Drawn(stratum=Stratum.LAUNCH, recipe=one.case, predicted_s=0.1) for one in RECIPES)
    campaign = Campaign(
        profile="tiny",
        profile_hash=content_hash(profile),
        gpu="cpu-test",
        seed=0,
        prepared="2026-11-25",
        plans=plans,
    )
    results = tuple(
        Result(recipe=one.case, figures=took, reason="", date="2026-11-25", device="test")
        for one, took in zip(RECIPES, figures, strict=True)
    )
    whole = Results(campaign_hash=campaign_hash(campaign), results=results)
    verdict = judge(campaign, whole, profile, machine(), on_gpu=False)
    return replace(verdict, plans=tuple(sorted(verdict.plans, key=lambda one: one.recipe)))


def test_a_makespan_is_held_against_the_pace_of_its_run() -> None:
    """One run at twice the usual time a launch, one at that which took 25 % longer besides, one as usual."""
    paces, took = (2.0, 2.0, 1.0), (1.0, 1.25, 1.0)
    figures = [
        ran(recipe, pace, times, pace * USUAL_S) for recipe, pace, times in zip(RECIPES, paces, took, strict=True)
    ]

    slow, longer, usual = judged(profile_of(USUAL_S), figures).plans

    assert slow.makespan < -0.4
    assert (slow.paced, longer.paced, usual.paced) == pytest.approx((0.0, 1 / 1.25 - 1, 0.0))
    assert usual.paced == usual.makespan


def test_without_both_paces_there_is_no_such_error() -> None:
    at_some_pace = [
        ran(recipe, 2.0, 1.0, launched_s) for recipe, launched_s in zip(RECIPES, (8e-6, 0, 8e-6), strict=True)
    ]

    assert [one.paced is None for one in judged(profile_of(USUAL_S), at_some_pace).plans] == [False, True, False]
    assert [one.paced for one in judged(profile_of(0.0), at_some_pace).plans] == [None] * 3


def test_a_cpu_launches_nothing() -> None:
    assert launch_s(CPU) == 0.0
    assert Runner(device=CPU).run(plan_of(RECIPES[0], machine())).launch_s == 0.0

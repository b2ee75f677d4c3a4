"""The pace of the host: asked of a GPU alone, and told beside a campaign where it is known."""

from dataclasses import replace

import pytest

from calibration.runner import Runner, launch_s
from calibration.tables import launches
from sim.recipe import Recipe, plan_of
from sim.spec import DType
from studies import make_verdict
from tests.calibration.tiny import CPU, MODEL, machine


def test_the_pace_is_told_beside_the_one_that_the_profile_was_measured_at() -> None:
    verdict = make_verdict()
    plans = [
        replace(one, measured=replace(one.measured, launch_s=took))
        for one, took in zip(verdict.plans, (0.0, 8e-6, 6e-6, 9e-6, 7e-6, 12e-6), strict=True)
    ]

    said = launches(replace(verdict, plans=tuple(plans)), 7.5e-6)

    assert said == "a launch took the host 8.0 us (6.0 to 12.0) around the runs, 7.5 us when the profile was measured"


@pytest.mark.parametrize(("took", "then_s"), [(0.0, 7.5e-6), (8e-6, 0.0)])
def test_nothing_is_told_where_either_is_not_known(took: float, then_s: float) -> None:
    verdict = make_verdict()
    plans = tuple(replace(one, measured=replace(one.measured, launch_s=took)) for one in verdict.plans)

    assert launches(replace(verdict, plans=plans), then_s) is None


def test_a_cpu_launches_nothing() -> None:
    recipe = Recipe(model=MODEL, batch=1, prompt=12, output=5, dtype=DType.FP32)

    assert launch_s(CPU) == 0.0
    assert Runner(device=CPU).run(plan_of(recipe, machine())).launch_s == 0.0

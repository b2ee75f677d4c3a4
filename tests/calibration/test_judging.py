"""What a plan is bound by, which step is steadiest, how far a machine has drifted, what is trusted, and when to give up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from calibration import campaign as campaigns
from calibration.bench import measure
from calibration.campaign import stratum_of
from calibration.evidence import steadiest_step
from calibration.families.base import Case
from calibration.problem import Problem
from sim import catalogue
from sim.breakdown import breakdown
from sim.cost import CostModel
from sim.forecast import forecast
from sim.plan import Recompute
from sim.profile import Evidence, Measurement, Profile
from sim.recipe import Recipe, plan_of
from sim.spec import MachineSpec
from sim.verdict import Stratum
from tests.calibration.tiny import CPU, MODEL, fingerprint, machine, nothing_yet, scope

CARD = MachineSpec(name="h200", gpu=catalogue.gpu("h200"), host=catalogue.host())
FEW = Recipe(model="opt-6.7b", batch=4, prompt=64, output=32)
MANY = Recipe(model="opt-1.3b", batch=128, prompt=512, output=32)


@pytest.mark.parametrize(
    ("recipe", "stratum"),
    [
        (FEW, Stratum.WEIGHTS),
        (replace(FEW, streamed=50), Stratum.LINK),
        (MANY, Stratum.KV_READS),
        (replace(MANY, hbm=0), Stratum.LINK),
        (replace(MANY, hbm=0, recompute=Recompute.TOKENS), Stratum.RECOMPUTE),
    ],
)
def test_a_plan_is_bound_by_what_most_of_its_decode_steps_go_to(recipe: Recipe, stratum: Stratum) -> None:
    cost = CostModel(machine=CARD, profile=Profile.nominal(CARD))

    assert stratum_of(forecast(plan_of(recipe, CARD), cost)) is stratum


@pytest.mark.parametrize(("launch_s", "stratum"), [(2e-6, Stratum.WEIGHTS), (6e-6, Stratum.LAUNCH)])
def test_a_plan_is_bound_by_launches_from_a_quarter_on(launch_s: float, stratum: Stratum) -> None:
    """Which are not the largest part: ten kernels of a layer take a sixth of a step at 2 us each, at 6 us more than a third."""
    gpu = replace(CARD.gpu, launch_s=launch_s)
    machine, profile = replace(CARD, gpu=gpu), Profile.nominal(CARD)
    priced = forecast(plan_of(FEW, machine), CostModel(machine=machine, profile=profile))

    spent = breakdown(priced.plan.setting, priced.waves[0])
    launched, products = (float(spent[kind][1:].sum()) for kind in ("kernel launches", "matrix products"))
    assert launched < products
    assert stratum_of(priced) is stratum


def step(case: str, low_s: float, high_s: float, family: str = "decode") -> Measurement:
    return Measurement(family=family, case=case, seconds=(low_s + high_s) / 2, low_s=low_s, high_s=high_s, samples=4)


def test_the_steadiest_step_is_the_one_whose_samples_differ_least() -> None:
    steps = [step("wild", 1.0, 1.4), step("steady", 2.0, 2.02), step("usual", 1.0, 1.1)]

    assert steadiest_step([*steps, step("no step", 1.0, 1.0, "copy")]) == steps[1]
    assert steadiest_step([]) is None


def test_drift_is_how_many_times_as_long_the_step_takes_now(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower:
        def __init__(self, **_: object) -> None:
            pass

        def warm(self, _: object) -> None:
            pass

        def run(self, _: object) -> SimpleNamespace:
            ends = np.cumsum([9.0, 5.0, *[0.3] * 6]).tolist()  # the first steps are not counted
            return SimpleNamespace(trace=SimpleNamespace(waves=[SimpleNamespace(step_end_s=ends)]))

    monkeypatch.setattr(campaigns, "Runner", Slower)
    reference = step(Recipe(model=MODEL, batch=2, prompt=12, output=8).case, 0.09, 0.11)
    evidence = Evidence(fingerprint=fingerprint(), machine=machine(), reference=reference)
    profile = replace(Profile.nominal(machine()), name="tiny", basis="a test", evidence=evidence)

    assert campaigns.drift(profile, machine(), CPU) == pytest.approx(3.0)


def test_what_repeated_samples_disagree_about_weighs_less_and_a_step_more() -> None:
    took = [step("a", 1.0, 1.0, "copy"), step("b", 0.8, 1.25, "copy"), step("c", 1.0, 1.0), step("d", 1.0, 1.0)]
    problem = Problem(
        machine=machine(),
        start=Profile.nominal(machine()),
        rows=tuple((one, lambda _: 1.0) for one in took),
        names=(),
    )

    steady, wild, *steps = problem.weights

    assert wild < 0.5 * steady
    assert steps == pytest.approx([4 * steady] * 2)


def test_when_nothing_works_any_more_measuring_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[int]()

    def fail(number: int) -> tuple[Measurement, ...]:
        tried.append(number)
        raise RuntimeError("the device is gone")

    failing = [
        Case(family="copy", case=str(number), measure=lambda number=number: fail(number)) for number in range(99)
    ]
    monkeypatch.setattr("calibration.bench.cases", lambda *_: iter(failing))

    with pytest.raises(ValueError, match=r"copy 25: the device is gone \(after 25 others\)"):
        measure(scope(), None, nothing_yet())
    assert tried == list(range(26))

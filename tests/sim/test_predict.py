"""Which measurements constants are held against."""

from dataclasses import replace
from statistics import median

import pytest

from builders import make_machine
from sim.cost import CostModel
from sim.forecast import forecast
from sim.predict import FIRST_STEADY_STEP, predictable
from sim.profile import Measurement, Profile
from sim.recipe import Recipe, plan_of

MACHINE = make_machine(hbm_bytes_per_s=1e12, flop_per_s=1e14, link_bytes_per_s=5e10)


def families(model: str, words: str) -> list[str]:
    """Those that are priced of a step's two measurements."""
    case = f"model={model} batch=2 prompt=64 output=6 {words}".strip()
    steps = [
        Measurement(family=family, case=case, seconds=1.0, low_s=1.0, high_s=1.0, samples=3)
        for family in ("decode", "prefill")
    ]
    return [one.family for one, _ in predictable(steps, MACHINE)]


@pytest.mark.parametrize("selector", ["topk", "pages"])
def test_steps_that_fetch_what_first_layers_alone_pick_are_left_out(selector: str) -> None:
    words = f"selector={selector} keep=50 placement=resident hbm=60"

    assert families("opt-13b/6", words) == ["prefill"]
    assert families("opt-13b", words) == ["decode", "prefill"]


@pytest.mark.parametrize(
    "words",
    [
        "selector=pages keep=50 placement=resident",  # nothing is fetched
        "selector=swa keep=50 placement=resident hbm=60",  # what is fetched is known beforehand
        "hbm=60",
    ],
)
def test_first_layers_stand_for_all_where_no_fetch_hangs_on_their_picks(words: str) -> None:
    assert families("opt-13b/6", words) == ["decode", "prefill"]


@pytest.mark.parametrize(("share", "slower"), [(1.0, False), (0.5, True)])
def test_a_measured_step_is_one_of_many_repeats_whose_clocks_have_fallen(share: float, slower: bool) -> None:
    """Eight steps of two layers that project half of 64 tokens are over before that, where a power limit holds them back."""
    machine = replace(MACHINE, gpu=replace(MACHINE.gpu, fp16_flop_per_s=1e13))
    cost = CostModel(machine=machine, profile=replace(Profile.nominal(machine), gemm_sustained_share=share))
    case = "model=opt-13b/2 batch=8 prompt=64 output=9 hbm=50 recompute=activations_host"
    took = Measurement(family="decode", case=case, seconds=1.0, low_s=1.0, high_s=1.0, samples=3)

    ((_, price),) = predictable([took], machine)

    (wave,) = forecast(plan_of(Recipe.of(case), machine), cost).waves
    brief_s = median(wave.step_s[FIRST_STEADY_STEP:].tolist())
    assert price(cost) > 1.2 * brief_s if slower else price(cost) == pytest.approx(brief_s)

"""What a campaign may draw for a GPU, cut down to a tiny model: each kind is run, and held against its prediction."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from calibration import draw
from calibration.campaign import Campaign, Drawn, Results, campaign_hash, run_campaign
from calibration.draw import draw_recipe
from calibration.roofline import roofline_s
from calibration.runner import Runner
from calibration.verdict import judge
from sim.attention import Selector
from sim.cost import CostModel
from sim.forecast import forecast
from sim.plan import Admission, Plan
from sim.profile import Evidence, Profile
from sim.profile_files import content_hash
from sim.recipe import Recipe, plan_of
from sim.spec import DType, WeightFormat
from sim.verdict import Judged, Stratum
from tests.calibration.tiny import CPU, MODEL, fingerprint, machine

DENSE = Recipe(model=MODEL, batch=5, prompt=12, output=20, dtype=DType.FP32)
WINDOW = replace(DENSE, selector=Selector.SWA, keep=40, hbm=50)


def kind(recipe: Recipe) -> str:
    if recipe.admission is Admission.CONTINUOUS:
        return "continuous"
    if recipe.streamed:
        return "streamed"
    if recipe.weights is not WeightFormat.NATIVE:
        return "rounded"
    return "pages" if recipe.selector is Selector.PAGES else "plain"


def test_every_kind_is_drawn_and_most_plans_are_plain() -> None:
    rng = random.Random(1)
    kinds = [kind(draw_recipe(rng, on_gpu=True)) for _ in range(300)]

    assert {*kinds} == {"plain", "pages", "continuous", "streamed", "rounded"}
    assert kinds.count("plain") > 150


def judged(recipe: Recipe) -> Judged:
    """Run as a campaign of one plan."""
    torch.set_num_threads(1)
    evidence = Evidence(fingerprint=fingerprint(), machine=machine())
    profile = replace(Profile.nominal(machine()), name="tiny", basis="a test", evidence=evidence)
    drawn = Drawn(stratum=Stratum.LAUNCH, recipe=recipe.case, predicted_s=9.0)
    campaign = Campaign(
        profile="tiny",
        profile_hash=content_hash(profile),
        gpu="cpu-test",
        seed=0,
        prepared="2026-11-25",
        plans=(drawn,),
    )
    nothing = Results(campaign_hash=campaign_hash(campaign))
    results = run_campaign(campaign, profile, machine(), CPU, nothing, lambda *_: None)
    assert results.results[0].reason == ""
    return judge(campaign, results, profile, machine(), on_gpu=False).plans[0]


@pytest.mark.parametrize("base", [DENSE, WINDOW], ids=["dense", "swa"])
@pytest.mark.parametrize("vary", [draw._as_it_is, draw._recalled, draw._admitted, draw._streamed, draw._rounded])
def test_every_kind_runs(vary: Callable[[random.Random, Recipe], Recipe], base: Recipe) -> None:
    recipe = vary(random.Random(4), base)

    one = judged(recipe)

    assert Recipe.of(recipe.case) == recipe
    assert one.measured.moved_bytes > 0 or one.moved is None
    assert len(one.measured.step_s) == len(one.simulated.step_s)
    assert one.measured.peak_hbm_bytes == pytest.approx(one.simulated.peak_hbm_bytes, rel=0.05)
    if recipe.selector is not Selector.DENSE and recipe.hbm < 100:
        assert one.replayed is not None
        assert one.replayed.is_exact


def pages_for(percent: int) -> Plan:
    return plan_of(replace(DENSE, admission=Admission.CONTINUOUS, hbm=percent), machine())


def test_pages_are_for_a_share_of_the_sequences_one_at_least() -> None:
    whole, half, least = (pages_for(percent).setting.kv_budget_bytes for percent in (100, 50, 0))

    assert (half, least) == (whole / 2, whole / 5)
    assert pages_for(50).setting.is_lossless


def test_fewer_pages_make_more_machine_steps() -> None:
    cost = CostModel(machine=machine(), profile=Profile.nominal(machine()))
    whole, half, least = (len(forecast(pages_for(percent), cost).waves[0].step_s) for percent in (100, 50, 0))

    assert whole == DENSE.output < half < least
    assert roofline_s(pages_for(100), cost) < roofline_s(pages_for(50), cost) < roofline_s(pages_for(0), cost)


def test_one_copy_of_the_weights_is_kept() -> None:
    runner = Runner(device=CPU)
    native, rounded = (
        plan_of(replace(DENSE, weights=weights), machine()).setting
        for weights in (WeightFormat.NATIVE, WeightFormat.INT8)
    )
    drawn = runner.decoder(native)

    assert runner.decoder(native) is drawn
    stored = runner.decoder(rounded)
    assert stored.weight_format is WeightFormat.INT8
    assert runner.decoder(rounded) is stored
    assert runner.decoder(native) is not drawn

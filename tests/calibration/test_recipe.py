"""Recipes: words that build the same plan again, whatever is drawn."""

import random
from dataclasses import replace

import pytest

from builders import make_machine, refuses
from calibration.draw import draw_recipe
from sim import catalogue
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.forecast import forecast
from sim.plan import Placement, Recompute
from sim.profile import Profile
from sim.recipe import Recipe, model_of, plan_of, shortened
from sim.spec import DType


def test_a_recipe_is_its_words() -> None:
    recipe = Recipe(
        model="opt-125m/2/64", batch=4, prompt=16, output=8, dtype=DType.FP32, selector=Selector.SWA, keep=20
    )

    assert recipe.case == "model=opt-125m/2/64 batch=4 prompt=16 output=8 dtype=fp32 selector=swa keep=20"
    assert Recipe.of(recipe.case) == recipe
    with refuses("recipe='model=x batches=3', cannot be read ('batches'): prepare the campaign again"):
        Recipe.of("model=x batches=3")


def test_a_model_may_be_cut_down() -> None:
    whole, short, narrow = (model_of(text) for text in ("opt-6.7b", "opt-6.7b/4", "llama-3-8b/2/512"))

    assert whole == catalogue.model("opt-6.7b")
    assert (short.layers, short.hidden) == (4, whole.hidden)
    assert (narrow.layers, narrow.hidden, narrow.heads, narrow.kv_heads, narrow.head_dim) == (2, 512, 4, 1, 128)


@pytest.mark.parametrize("hbm", [100, 60, 30, 0])
@pytest.mark.parametrize("selector", [Selector.DENSE, Selector.SWA])
def test_slots_are_as_many_as_asked_for_or_needed(selector: Selector, hbm: int) -> None:
    resident = Placement.RESIDENT if selector is Selector.SWA else Placement.RECENT
    keep = 100 if selector is Selector.DENSE else 20
    recipe = Recipe(
        model="opt-125m/2/64", batch=2, prompt=60, output=12, selector=selector, keep=keep, placement=resident, hbm=hbm
    )

    plan = plan_of(recipe, make_machine())

    counts = plan.setting.token_counts
    living = max(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
    slots = max(near + copies for near, copies in zip(plan.homes.hbm, plan.homes.copies, strict=True))
    assert slots == max(round(living * hbm / 100), *plan.setting.slots_needed)
    assert any(plan.homes.host_kv) == (slots < living)


@pytest.mark.parametrize("hbm", [60, 30, 0])
@pytest.mark.parametrize("selector", [Selector.DENSE, Selector.SWA, Selector.PAGES])
def test_slots_are_as_many_at_every_step_that_has_tokens_for_them(selector: Selector, hbm: int) -> None:
    """As a captured step allocates them: also before it needs the most."""
    dense = selector is Selector.DENSE
    recipe = Recipe(model="opt-125m/2/64", batch=2, prompt=20, output=40, selector=selector, hbm=hbm)
    recipe = replace(recipe, keep=100 if dense else 40, placement=Placement.RECENT if dense else Placement.RESIDENT)

    plan = plan_of(recipe, make_machine())

    counts, homes, needed = plan.setting.token_counts, plan.homes, plan.setting.slots_needed
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    most = max(*needed, round(max(living) * hbm / 100))
    held = [near + copies for near, copies in zip(homes.hbm, homes.copies, strict=True)]
    assert held == [min(most, alive) for alive in living]
    assert needed[0] < max(needed) or dense


@pytest.mark.parametrize("recompute", [Recompute.ACTIVATIONS_HOST, Recompute.TOKENS])
def test_what_is_off_hbm_may_be_recomputed(recompute: Recompute) -> None:
    recipe = Recipe(model="opt-125m/2/64", batch=2, prompt=20, output=6, hbm=50, recompute=recompute)

    plan = plan_of(recipe, make_machine())

    assert any(plan.homes.activations if recompute.from_activations else plan.homes.dropped)


@pytest.mark.parametrize("seed", range(12))
def test_every_drawn_plan_can_be_simulated_and_fits(seed: int) -> None:
    machine = make_machine(hbm_bytes_per_s=1e12, flop_per_s=1e14, link_bytes_per_s=5e10, launch_s=1e-6)
    recipe = draw_recipe(random.Random(seed), on_gpu=seed % 2 == 0)
    plan = plan_of(recipe, machine)
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))

    short = shortened(plan, 3)

    assert Recipe.of(recipe.case) == recipe
    assert simulate(short, cost).outcome.makespan_s == pytest.approx(forecast(short, cost).outcome.makespan_s)
    assert forecast(plan, cost).outcome.makespan_s > forecast(short, cost).outcome.makespan_s

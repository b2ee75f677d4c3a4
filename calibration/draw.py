"""Plans drawn by a seed: sizes, selectors, formats, budgets, placements and admission that the runtime runs."""

import random
from dataclasses import replace

from sim.attention import Selector
from sim.kv import KvFormat
from sim.plan import Admission, Placement, Recompute
from sim.recipe import Recipe
from sim.spec import DType, WeightFormat

_GPU_MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b", "llama-3-8b")
_CPU_MODELS = ("opt-125m/4/512", "opt-125m/6/256", "opt-125m/5/384")


def draw_recipe(rng: random.Random, *, on_gpu: bool) -> Recipe:
    """One plan; what binds it is found out by simulating it."""
    if not on_gpu:
        return _draw(rng, _CPU_MODELS, batches=(1, 2, 4, 8, 12), prompts=(16, 48, 96, 160), outputs=(16, 24, 32))
    recipe = _draw(
        rng, _GPU_MODELS, batches=(4, 8, 16, 32, 48, 64, 96, 128), prompts=(64, 128, 256, 512), outputs=(32, 64, 128)
    )
    vary = rng.choices((_as_it_is, _recalled, _admitted, _streamed, _rounded), weights=(66, 12, 10, 6, 6))[0]
    return vary(rng, replace(recipe, dtype=DType.FP16))


def _as_it_is(_: random.Random, recipe: Recipe) -> Recipe:
    return recipe


def _recalled(rng: random.Random, recipe: Recipe) -> Recipe:
    """Page digests with recall in place of what the recipe selects."""
    return replace(
        recipe,
        selector=Selector.PAGES,
        keep=rng.choice((5, 10, 20, 40)),
        placement=Placement.RESIDENT,
        kv=KvFormat.NATIVE,
        recompute=Recompute.NONE,
    )


def _admitted(rng: random.Random, recipe: Recipe) -> Recipe:
    """Continuous admission, with pages for some of the sequences."""
    return replace(
        _dense(recipe),
        concurrency=recipe.batch,
        kv=KvFormat.NATIVE,
        hbm=rng.choice((75, 50, 25)),
        recompute=Recompute.NONE,
        admission=Admission.CONTINUOUS,
    )


def _streamed(rng: random.Random, recipe: Recipe) -> Recipe:
    """Weights on the host, those that pinning takes no minutes for: ``prepare`` leaves out the rest."""
    return replace(_dense(recipe), streamed=rng.choice((25, 50, 100)))


def _rounded(_: random.Random, recipe: Recipe) -> Recipe:
    return replace(_dense(recipe), weights=WeightFormat.INT8)


def _dense(recipe: Recipe) -> Recipe:
    """Under continuous admission a selection is launched kernel by kernel, which takes too long to run; how weights lie is
    tried with dense attention alone.
    """
    return replace(recipe, selector=Selector.DENSE, keep=100, placement=Placement.RECENT)


def _draw(
    rng: random.Random,
    models: tuple[str, ...],
    *,
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Recipe:
    sparse = rng.random() < 0.5
    batch = rng.choice(batches)
    waves = rng.choice((1, 1, 1, 2, 3))
    hbm = rng.choice((100, 100, 75, 50, 25))
    recompute = Recompute.NONE
    if not sparse and hbm < 100 and rng.random() < 0.35:
        recompute = rng.choice((Recompute.ACTIVATIONS_HOST, Recompute.TOKENS))
    placement = rng.choice((Placement.RESIDENT, Placement.RESIDENT, Placement.RECENT))
    if not sparse:
        placement = Placement.RECENT
    elif hbm == 100:
        placement = Placement.RESIDENT  # with all in HBM there is nothing to place
    return Recipe(
        model=rng.choice(models),
        batch=batch,
        prompt=rng.choice(prompts),
        output=rng.choice(outputs),
        dtype=DType.FP32,
        concurrency=-(-batch // waves) if batch >= waves else batch,
        selector=Selector.SWA if sparse else Selector.DENSE,
        keep=rng.choice((5, 10, 20, 40, 70)) if sparse else 100,
        placement=placement,
        kv=KvFormat.INT8 if rng.random() < 0.2 else KvFormat.NATIVE,
        hbm=hbm,
        recompute=recompute,
    )

"""Plans drawn by a seed: sizes, selectors, formats, budgets and placements that the runtime runs."""

import random
from dataclasses import replace

from sim.attention import Selector
from sim.kv import KvFormat
from sim.plan import Placement, Recompute
from sim.recipe import Recipe
from sim.spec import DType

_GPU_MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b", "llama-3-8b")
_CPU_MODELS = ("opt-125m/4/512", "opt-125m/6/256", "opt-125m/5/384")


def draw_recipe(rng: random.Random, *, on_gpu: bool) -> Recipe:
    """One plan; what binds it is found out by simulating it."""
    if not on_gpu:
        return _draw(rng, _CPU_MODELS, batches=(1, 2, 4, 8, 12), prompts=(16, 48, 96, 160), outputs=(16, 24, 32))
    recipe = _draw(
        rng, _GPU_MODELS, batches=(4, 8, 16, 32, 48, 64, 96, 128), prompts=(64, 128, 256, 512), outputs=(32, 64, 128)
    )
    return replace(recipe, dtype=DType.FP16)


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

"""Whole layers: short runs of plans with a few layers, their prefill and their decode steps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import mean

from calibration.families.base import Case, Scope
from calibration.runner import Runner
from calibration.timer import Spread, Untimed
from sim.attention import Selector
from sim.capture import is_captured
from sim.cost import CostModel
from sim.footprint import layer_weight_bytes
from sim.forecast import forecast
from sim.kv import KvFormat
from sim.plan import Placement, Recompute
from sim.predict import FIRST_STEADY_STEP
from sim.profile import Measurement, Profile
from sim.recipe import Recipe, model_of, plan_of, shortened
from sim.spec import WeightFormat

_DEEP_SHARE = 0.6  # of the memory that may be used, for the layers of a deep model
_LEAST_RUNS, _RUNS = 2, 12
_SHORT_S, _SETTLED_S = 0.2, 1.2  # runs that end sooner are made twice as often; clocks have fallen by then
_DENSE = Recipe(model="opt-125m", batch=1, prompt=1, output=1)


def cases(scope: Scope, runner: Runner) -> Iterator[Case]:
    """Each model at two depths, which tells a layer from a step (the second as deep as memory allows, where there is time), then
    what a plan may choose.
    """
    seen = set[str]()
    for recipe in _recipes(scope):
        if recipe.case not in seen and _fits(scope, recipe):
            seen.add(recipe.case)
            yield Case(family="decode", case=recipe.case, measure=partial(measured, scope, runner, recipe))


def _recipes(scope: Scope) -> Iterator[Recipe]:
    """Model by model, so that weights are drawn once for each depth."""
    batches, prompts = scope.step_batches, scope.prompts
    for name in scope.models:
        for layers in (6,) if scope.thorough and scope.on_gpu else (2, 6):
            base = replace(_DENSE, model=_with_layers(name, layers), dtype=scope.dtype, output=scope.output)
            grid = [(batch, prompt) for batch in batches for prompt in prompts]
            for batch, prompt in grid if layers == 6 else grid[:: len(prompts) + 1]:
                dense = replace(base, batch=batch, prompt=prompt)
                yield dense
                if layers == (6 if scope.thorough else 2):
                    yield _window(dense, 20)
            if layers == 6:
                yield from _choices(replace(base, batch=batches[len(batches) // 2], prompt=prompts[-1]), scope)
                yield from _widened([replace(base, batch=batch, prompt=prompts[0]) for batch in batches], scope)
        if scope.thorough and scope.on_gpu:
            deep = replace(base, model=_deep(scope, name), prompt=prompts[0])
            for batch in scope.batches:
                yield replace(deep, batch=batch)
                yield _window(replace(deep, batch=batch), 20)
            yield from _few(replace(deep, batch=batches[0], prompt=prompts[-1]), replace(deep, batch=scope.batches[1]))


def _choices(dense: Recipe, scope: Scope) -> Iterator[Recipe]:
    window = _window(dense, 20)
    yield replace(window, keep=70)
    yield replace(dense, hbm=50)
    yield replace(window, hbm=60)
    yield replace(dense, kv=KvFormat.INT8)
    if scope.thorough:
        for batch in scope.batches[-2:]:  # choices that hold half of the multiprocessors, and all of them
            yield replace(window, keep=70, batch=batch)
        yield replace(dense, hbm=80)
        yield replace(window, hbm=60, placement=Placement.RECENT)
        yield replace(window, kv=KvFormat.INT8)
        yield replace(dense, hbm=50, kv=KvFormat.INT8)
        yield replace(window, selector=Selector.PAGES, keep=10)
    yield replace(dense, hbm=50, recompute=Recompute.ACTIVATIONS_HOST)
    yield replace(dense, hbm=70, recompute=Recompute.TOKENS)


def _widened(dense: Sequence[Recipe], scope: Scope) -> Iterator[Recipe]:
    """Weights in integers, of the fewest and the most sequences, where a kernel widens them ahead of each product."""
    if scope.on_gpu and scope.thorough:
        for recipe in (dense[0], dense[-1]):
            yield replace(recipe, weights=WeightFormat.INT8)


def _few(longer: Recipe, shorter: Recipe) -> Iterator[Recipe]:
    """Of few sequences: what a step takes at least where it is launched, or replayed in pieces, layer after layer."""
    yield replace(longer, hbm=50)  # waits for the link
    yield from (replace(longer, hbm=90), replace(shorter, hbm=85))
    for dense in (longer, shorter):
        yield replace(dense, hbm=50, recompute=Recompute.ACTIVATIONS_HOST)
    yield replace(longer, selector=Selector.LOCAL, keep=20)  # launched kernel by kernel


def _window(dense: Recipe, keep: int) -> Recipe:
    return replace(dense, selector=Selector.SWA, keep=keep, placement=Placement.RESIDENT)


def _deep(scope: Scope, name: str) -> str:
    """As many layers as there is memory for: what a layer takes is told apart from what a step takes."""
    model = model_of(name)
    layer_bytes = layer_weight_bytes(model, scope.dtype, WeightFormat.NATIVE)
    return _with_layers(name, min(model.layers, int(_DEEP_SHARE * scope.most_bytes / layer_bytes)))


def _with_layers(name: str, layers: int) -> str:
    head, _, rest = name.partition("/")
    hidden = rest.split("/")[1:]
    return "/".join([head, str(layers), *hidden])


def _fits(scope: Scope, recipe: Recipe) -> bool:
    """Well within the memory that may be used."""
    outcome = forecast(plan_of(recipe, scope.machine), _nominal(scope)).outcome
    return outcome.peak_hbm_bytes < scope.most_bytes and outcome.peak_host_bytes < scope.most_bytes


def _nominal(scope: Scope) -> CostModel:
    return CostModel(machine=scope.machine, profile=Profile.nominal(scope.machine))


def measured(scope: Scope, runner: Runner, recipe: Recipe) -> tuple[Measurement, ...]:
    """The prefill and a decode step; after a run that loads and compiles what is needed, and captures it where there is a graph."""
    plan = plan_of(recipe, scope.machine)
    prefills, steps, paces = list[float](), list[list[float]](), list[float]()
    peaks = [runner.run(plan if is_captured(plan.setting) else shortened(plan, 3)).peak_bytes]
    if isinstance(scope.timer, Untimed):
        return ()
    for _ in range(_RUNS):
        ran = runner.run(plan)
        ends = ran.trace.waves[0].step_end_s
        prefills.append(ends[0])
        steps.append(steady(ends))
        paces.append(ran.launch_s)
        peaks.append(ran.peak_bytes)
        ran_s = sum(prefills) + sum(map(sum, steps))
        enough = _LEAST_RUNS if ran_s > _SHORT_S else 2 * _LEAST_RUNS
        if len(steps) >= enough and not (scope.on_gpu and _settles(recipe, ran_s)):
            break
    peak_bytes = max(peak or 0 for peak in peaks)
    settled = steps if recipe.recompute is Recompute.NONE else steps[-_LEAST_RUNS:]
    last = [seconds for run in settled for seconds in run]
    pace_s = mean(paces)
    return (
        _measurement("decode", recipe, last, launch_s=pace_s),
        _measurement("prefill", recipe, prefills, peak_bytes, launch_s=pace_s),
    )


def _settles(recipe: Recipe, ran_s: float) -> bool:
    """Whether the card's clocks are still to fall: products of what is recomputed draw all its power, step after step."""
    return recipe.recompute is not Recompute.NONE and ran_s < _SETTLED_S


def steady(step_end_s: Sequence[float]) -> list[float]:
    """Seconds of the decode steps after the first."""
    return [end_s - start_s for start_s, end_s in pairwise(step_end_s[FIRST_STEADY_STEP - 1 :])]


def _measurement(
    family: str, recipe: Recipe, samples: list[float], peak_bytes: int = 0, *, launch_s: float
) -> Measurement:
    spread = Spread.of(samples)
    return Measurement(
        family=family,
        case=recipe.case,
        seconds=spread.seconds,
        low_s=spread.low_s,
        high_s=spread.high_s,
        samples=spread.samples,
        peak_bytes=peak_bytes,
        launch_s=launch_s,
    )

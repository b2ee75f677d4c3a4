"""What captured steps choose: a window's next tokens from a step's weights, pages once the query is known."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from calibration.families.attention import first_step, kinds, narrowed, slots_of
from calibration.families.base import Case, Scope, each
from runtime.graph.recall import RecallSlots
from runtime.graph.window import WindowSlots
from sim.attention import Selector
from sim.capture import is_captured
from sim.plan import Placement, Plan
from sim.profile import Measurement
from sim.recipe import Recipe, plan_of

_LAYERS = 4
_KEPT = (10, 70)  # percent of a window's tokens
_CACHED, _FEW_CACHED, _PAGES_KEPT = 536, 152, 20
_STEPS = 4
_LEAST_S = 1e-7


def cases(scope: Scope) -> Iterator[Case]:
    """A window's, whose heads are summed before, of one kind of heads; pages' of each."""
    for number, (name, _) in enumerate(kinds(scope) if scope.on_gpu else ()):
        recipes = (*(_windows(scope, name) if number == 0 else ()), *_pages(scope, name))
        for recipe in recipes:
            plan = plan_of(recipe, scope.machine)
            if is_captured(plan.setting):
                measure = _recalled if recipe.selector is Selector.PAGES else _selected
                yield Case(family="select", case=recipe.case, measure=partial(measure, plan, recipe, scope))


def _windows(scope: Scope, name: str) -> Iterator[Recipe]:
    for batch in scope.step_batches:
        for keep in _KEPT:
            yield _sparse(scope, name, batch, 512, Selector.SWA, keep)


def _pages(scope: Scope, name: str) -> Iterator[Recipe]:
    for batch in scope.step_batches:
        yield _sparse(scope, name, batch, _CACHED, Selector.PAGES, _PAGES_KEPT)
    if scope.thorough:
        yield _sparse(scope, name, scope.step_batches[1], _FEW_CACHED, Selector.PAGES, _PAGES_KEPT)


def _sparse(scope: Scope, name: str, batch: int, cached: int, selector: Selector, keep: int) -> Recipe:
    """With steps to come after the first: in a plan's last one, newborn tokens that nothing attends to leave HBM."""
    dense = first_step(scope, name, batch, cached)
    return replace(dense, output=_STEPS, selector=selector, keep=keep, placement=Placement.RESIDENT)


def _selected(plan: Plan, recipe: Recipe, scope: Scope) -> tuple[Measurement, ...]:
    """A choice changes what it chooses from, so all is put back before each; what that takes is subtracted."""
    with torch.inference_mode():
        decoder, plan = narrowed(plan, _LAYERS, scope)
        slots, (q, k, v), attended = slots_of(plan, decoder, scope)
        assert isinstance(slots, WindowSlots)
        for layer in range(_LAYERS):
            slots.attend(layer, q, k, v, attended)
        saved = [tensor.clone() for tensor in slots.state]

        def restore(layer: int) -> None:
            for tensor, before in zip(slots.state, saved, strict=True):
                tensor[layer].copy_(before[layer])

        return _difference(recipe, scope, slots.settle, restore)


def _recalled(plan: Plan, recipe: Recipe, scope: Scope) -> tuple[Measurement, ...]:
    """Of pages a step finds nothing in the GPU's cache, so something else is read before each, each time another; what that
    takes is subtracted.
    """
    with torch.inference_mode():
        decoder, plan = narrowed(plan, _LAYERS, scope)
        slots, (q, k, _), _ = slots_of(plan, decoder, scope)
        assert isinstance(slots, RecallSlots)
        others = [scope.normal(scope.cold_bytes // _LAYERS // scope.dtype.size_bytes) for _ in range(_LAYERS)]
        return _difference(recipe, scope, lambda layer: slots.choose(layer, q, k), lambda layer: others[layer].amax())


def _difference(
    recipe: Recipe, scope: Scope, choose: Callable[[int], object], before: Callable[[int], object]
) -> tuple[Measurement, ...]:
    """What ``choose`` adds to ``before``, layer by layer."""

    def after(layer: int) -> None:
        before(layer)
        choose(layer)

    both, alone = (
        scope.timer.time(each(work, range(_LAYERS)), captured=True, budget_s=scope.budget_s) for work in (after, before)
    )
    seconds, low_s, high_s = (max(_LEAST_S, told - alone.seconds) for told in (both.seconds, both.low_s, both.high_s))
    return (
        Measurement(
            family="select", case=recipe.case, seconds=seconds, low_s=low_s, high_s=high_s, samples=both.samples
        ),
    )

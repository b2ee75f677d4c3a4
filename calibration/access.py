"""Access profiles from runs: how many of a selector's picks are new at each step, and how old they are."""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from calibration.families.base import Scope
from calibration.runner import Ran, Runner
from runtime.execute import execute
from runtime.models import load_decoder
from runtime.options import Options, Run
from runtime.prompts import Text, read_prompts
from runtime.recorder import LanePicks, Record
from sim.access import AGES, EARLY_STEPS, AccessProfile, LivingAges, measured_access
from sim.attention import Selector
from sim.plan import Placement, Plan
from sim.recipe import Recipe, plan_for, plan_of
from sim.recording import Flags, RecordedSelection, picked_ages, picked_flags
from sim.spec import MachineSpec

SELECTORS = (Selector.SWA, Selector.H2O, Selector.PAGES, Selector.TOPK)
_KEEPS, _OUTPUT = (5, 10, 20, 40), 64
_QUARTERS = (0.25, 0.5, 0.75)
_DIGITS, _AGE_DIGITS = 4, 3
_RECORD = Record(selections=True, picks=True, mass=True)

Eighths: TypeAlias = NDArray[np.float64]  # picks that fell on the oldest eighth, two eighths, up to all


class Seen(NamedTuple):
    """What a run that keeps so large a share of its tokens picked, and the share of all attention that was paid to what it
    attended to, if that was looked at.
    """

    keep: float
    plan: Plan
    picks: LanePicks | list[Flags]
    mass: float | None


def random_weights_access(
    runner: Runner,
    machine: MachineSpec,
    recipe: Recipe,
    keeps: Sequence[int],
    device: str,
    *,
    selectors: Sequence[Selector] = SELECTORS,
) -> tuple[AccessProfile, ...]:
    """Of every selector, on random weights and tokens: what plans see that are validated with such.

    It holds for ``recipe``'s model if that has all its layers; where any token may return, over about as many tokens.
    """
    profiles, model = list[AccessProfile](), None if "/" in recipe.model else recipe.model
    tokens = recipe.prompt + recipe.output // 2
    for selector in selectors:
        sparse = replace(recipe, selector=selector, placement=Placement.RESIDENT)
        plans = [plan_of(replace(sparse, keep=keep), machine) for keep in keeps]
        seen = [_seen(runner, keep / 100, plan) for keep, plan in zip(keeps, plans, strict=True)]
        found = access_of(selector, seen, f"{_looked_at(recipe)}, {device}, {datetime.date.today()}")
        profiles.append(replace(found, model=model, tokens=tokens if model and selector.recalls else None))
    return tuple(profiles)


def seen_before(
    known: Sequence[AccessProfile], recipe: Recipe, selectors: Sequence[Selector], keeps: Sequence[int]
) -> tuple[AccessProfile, ...]:
    """Of ``known`` what ``random_weights_access`` would find; nothing if that lacks a selector or a share."""
    found = tuple(one for one in known if one.source.startswith(f"{_looked_at(recipe)},"))
    every = {keep / 100 for keep in keeps}
    whole = {one.selector for one in found if every <= set(one.keep_shares)}
    return found if set(selectors) <= whole else ()


def _looked_at(recipe: Recipe) -> str:
    return f"random weights of {recipe.model}, random tokens, prompt {recipe.prompt}, {recipe.output} steps"


def _seen(runner: Runner, keep: float, plan: Plan) -> Seen:
    """Picks of captured steps, where there are such: plans that are validated take those."""
    on_gpu, selector = runner.device.type == "cuda", plan.setting.attention.selector
    if on_gpu and selector is Selector.SWA:
        return Seen(keep, plan, runner.window_picks(plan), None)
    if on_gpu and selector is Selector.PAGES:
        return Seen(keep, plan, runner.page_picks(plan), None)
    return _of_run(keep, plan, runner.run(plan, record=_RECORD))


def _of_run(keep: float, plan: Plan, ran: Ran | Run) -> Seen:
    assert ran.picks is not None
    return Seen(keep, plan, ran.picks, mean(one.mass or 0.0 for wave in ran.stats for one in wave))


def checkpoint_access(folder: Path, prompts: Path, scope: Scope) -> tuple[AccessProfile, ...]:
    """Of every selector, on a checkpoint's own weights and a user's texts."""
    decoder = load_decoder(folder, device=scope.device, dtype=scope.torch_dtype)
    texts = [prompt.tokens for prompt in read_prompts(prompts, Text(folder))]
    longest = max(map(len, texts))
    spec = decoder.spec
    if longest + _OUTPUT > spec.context_tokens:
        raise ValueError(f"{prompts}: prompts of {longest} tokens, must leave {_OUTPUT} of {spec.context_tokens}")
    profiles = list[AccessProfile]()
    for selector in SELECTORS:
        seen = list[Seen]()
        for keep in _KEEPS:
            recipe = Recipe(
                model=spec.name.replace(" ", "-"),
                batch=len(texts),
                prompt=longest,
                output=_OUTPUT,
                dtype=scope.dtype,
                selector=selector,
                keep=keep,
                placement=Placement.RESIDENT,
            )
            plan = plan_for(spec, recipe, scope.machine)
            ran = execute(plan, decoder, texts, options=Options(stop=False, record=_RECORD))
            seen.append(_of_run(keep / 100, plan, ran))
        where = f"{folder.name}, {len(texts)} prompts of {prompts.name}, {_OUTPUT} steps"
        profiles.append(access_of(selector, seen, f"{where}, {datetime.date.today()}"))
    return tuple(profiles)


def access_of(selector: Selector, seen: Sequence[Seen], source: str) -> AccessProfile:
    """From runs of ascending keep shares.

    Perplexity needs a text to be scored, the share that returns captured steps that spill: both stay what they were.
    """
    usual = measured_access(selector)
    mass = ", ".join(f"{one.mass:.0%} at {one.keep:.0%}" for one in seen if one.mass is not None)
    kept = f"; attention kept {mass}" if mass else ""
    found = AccessProfile(
        selector=selector,
        keep_shares=tuple(one.keep for one in seen),
        turnovers=(0.0,) * len(seen),
        perplexity_ratios=tuple(usual.perplexity_ratio(one.keep) for one in seen),
        source=f"{source}{kept}; perplexity: {usual.source}",
    )
    if not selector.recalls:  # what is left out dies: hardly more lives than is picked
        ages = tuple(map(_living_ages, seen)) if selector is Selector.SWA else None
        return replace(found, turnovers=_told(map(_turnover, seen)), living_ages=ages)
    goes_on = all(one.plan.setting.workload.decode_steps >= 2 * EARLY_STEPS for one in seen)
    returned = [_returned(one, goes_on=goes_on) for one in seen]
    quarters = _shares(np.sum([one.picked for one in returned], axis=0))[1::2]
    return replace(
        found,
        turnovers=_told(one.turnover for one in returned),
        early_turnovers=_told(one.early_turnover for one in returned) if goes_on else None,  # as many steps follow
        age_shares=((0.0, 0.0), *zip(_QUARTERS, quarters, strict=True), (1.0, 1.0)),
        living_ages=tuple(one.ages for one in returned),
    )


class _Returned(NamedTuple):
    """Of a run in which any token may return; ``picked`` counts the picks of all steps, others leave the first one out.
    ``turnover`` is of later steps, where runs do not go on of all.
    """

    turnover: float
    early_turnover: float
    ages: LivingAges
    picked: Eighths


def _returned(seen: Seen, *, goes_on: bool) -> _Returned:
    """New is what a lane did not attend to in the step before."""
    counts = seen.plan.setting.token_counts
    position, ends = np.arange(counts.cached[-1]), np.arange(1, AGES + 1)[:, None] / AGES
    first, picked, new = np.zeros(AGES), *np.zeros((2, 2, AGES))  # the latter early and later
    attended: Flags | None = None
    for row, picks in enumerate(_flags(seen), start=1):
        older, later = counts.cached[row] - counts.local[row], int(row > EARLY_STEPS)
        on_oldest = np.clip(older * ends - position, 0.0, 1.0)  # [eighth, token]
        if attended is None:
            first = on_oldest @ picks.sum(axis=0)
        else:
            picked[later] += on_oldest @ picks.sum(axis=0)
            new[later] += on_oldest @ (picks & ~attended).sum(axis=0)
        attended = picks | ((position >= older) & (position < counts.cached[row]))
    later_ones = slice(1 if goes_on else 0, None)
    turnover, early_turnover = (
        float(new[some, -1].sum() / max(1.0, picked[some, -1].sum())) for some in (later_ones, slice(0, 1))
    )
    ages = LivingAges(first=_shares(first), later=_shares(new.sum(axis=0)))
    return _Returned(turnover, early_turnover, ages, first + picked.sum(axis=0))


def _shares(fell: Eighths) -> tuple[float, ...]:
    """Of all picks, on the oldest eighth up to seven; evenly if there are none."""
    shares = fell / fell[-1] if fell[-1] else np.arange(1, AGES + 1) / AGES
    return _told(shares[:-1].tolist(), _AGE_DIGITS)


def _told(shares: Iterable[float], digits: int = _DIGITS) -> tuple[float, ...]:
    """To as many digits as a run tells."""
    return tuple(round(share, digits) for share in shares)


def _flags(seen: Seen) -> Iterator[Flags]:
    """Whether a lane, layer by layer, picks a token, [lane, token] of each step."""
    tokens = seen.plan.setting.token_counts.cached[-1]
    for step in seen.picks:
        yield step if isinstance(step, np.ndarray) else picked_flags(step, tokens)


def _turnover(seen: Seen) -> float:
    """Of a step's picks, those that the step before did not have; the first step has nothing before it."""
    shares = [
        len(set(now) - set(before)) / len(now)
        for steps in pairwise(_lists(seen))
        for layers in zip(*steps, strict=True)
        for before, now in zip(*layers, strict=True)
        if now
    ]
    return mean(shares) if shares else 0.0


def _lists(seen: Seen) -> LanePicks:
    return cast(LanePicks, seen.picks)


def _living_ages(seen: Seen) -> LivingAges:
    """``later`` in the mean over the steps from which on all of the local window has come since the prompt; of a run that has
    fewer, over the last quarter.
    """
    picks = tuple(tuple(tuple(layer) for layer in step) for step in _lists(seen))
    selector, local = seen.plan.setting.attention.selector, seen.plan.setting.token_counts.local
    ages = picked_ages(seen.plan, RecordedSelection(selector=selector, picks=picks))
    last = [of_step for step, of_step in enumerate(ages) if step >= local[step + 1]]
    later = max(last, ages[-max(1, len(ages) // 4) :], key=len)
    return LivingAges(first=_told(ages[0], _AGE_DIGITS), later=_told(map(mean, zip(*later, strict=True)), _AGE_DIGITS))

"""Access profiles from runs: how many of a selector's picks are new at each step, and how old they are."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from calibration.families.base import Scope
from calibration.runner import Ran, Runner
from runtime.execute import execute
from runtime.models import load_decoder
from runtime.options import Options, Run
from runtime.prompts import Text, read_prompts
from runtime.recorder import LanePicks, Record
from sim.access import AccessProfile, LivingAges, measured_access
from sim.attention import Selector, TokenCounts
from sim.plan import Placement, Plan
from sim.recipe import Recipe, plan_for, plan_of
from sim.recording import RecordedSelection, picked_ages
from sim.spec import MachineSpec

SELECTORS = (Selector.SWA, Selector.H2O, Selector.PAGES, Selector.TOPK)
_KEEPS, _OUTPUT = (5, 10, 20, 40), 64
_EVERY_AGE_ALIKE = ((0.0, 0.0), (1.0, 1.0))
_AGES = (0.25, 0.5, 0.75)
_RECORD = Record(selections=True, picks=True, mass=True)


class Seen(NamedTuple):
    """What a run that keeps so large a share of its tokens picked, and the share of all attention that was paid to what it
    attended to, if that was looked at.
    """

    keep: float
    plan: Plan
    picks: LanePicks
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

    It holds for ``recipe``'s model if that has all its layers.
    """
    profiles, model = list[AccessProfile](), None if "/" in recipe.model else recipe.model
    for selector in selectors:
        sparse = replace(recipe, selector=selector, placement=Placement.RESIDENT)
        plans = [plan_of(replace(sparse, keep=keep), machine) for keep in keeps]
        seen = [_seen(runner, keep / 100, plan) for keep, plan in zip(keeps, plans, strict=True)]
        where = f"random weights of {recipe.model}, random tokens, prompt {recipe.prompt}, {recipe.output} steps"
        found = access_of(selector, seen, f"{where}, {device}, {datetime.date.today()}")
        profiles.append(replace(found, model=model))
    return tuple(profiles)


def _seen(runner: Runner, keep: float, plan: Plan) -> Seen:
    """A window's picks of captured steps, where there are such: plans that are validated take those."""
    if plan.setting.attention.selector is Selector.SWA and runner.device.type == "cuda":
        return Seen(keep, plan, runner.window_picks(plan), None)
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
    return AccessProfile(
        selector=selector,
        keep_shares=tuple(one.keep for one in seen),
        turnovers=tuple(_turnover(one.picks) for one in seen),
        perplexity_ratios=tuple(usual.perplexity_ratio(one.keep) for one in seen),
        age_shares=_age_shares([(one.plan.setting.token_counts, one.picks) for one in seen])
        if selector.recalls
        else _EVERY_AGE_ALIKE,  # what other selectors leave out dies: hardly more lives than is picked
        living_ages=tuple(_living_ages(one) for one in seen) if selector is Selector.SWA else None,
        source=f"{source}{kept}; perplexity: {usual.source}",
    )


def _turnover(picks: LanePicks) -> float:
    """Of a step's picks, those that the step before did not have; the first step has nothing before it."""
    shares = [
        len(set(now) - set(before)) / len(now)
        for steps in pairwise(picks)
        for layers in zip(*steps, strict=True)
        for before, now in zip(*layers, strict=True)
        if now
    ]
    return mean(shares) if shares else 0.0


def _living_ages(seen: Seen) -> LivingAges:
    """``later`` in the mean over the steps from which on all of the local window has come since the prompt; of a run that has
    fewer, over the last quarter.
    """
    picks = tuple(tuple(tuple(layer) for layer in step) for step in seen.picks)
    selector, local = seen.plan.setting.attention.selector, seen.plan.setting.token_counts.local
    ages = picked_ages(seen.plan, RecordedSelection(selector=selector, picks=picks))
    last = [of_step for step, of_step in enumerate(ages) if step >= local[step + 1]]
    later = max(last, ages[-max(1, len(ages) // 4) :], key=len)
    return LivingAges(first=ages[0], later=tuple(map(mean, zip(*later, strict=True))))


def _age_shares(runs: Sequence[tuple[TokenCounts, LanePicks]]) -> tuple[tuple[float, float], ...]:
    """Share of the picks that fall on the oldest quarter, half and three quarters of the older tokens, all of which live."""
    below, every = [0] * len(_AGES), 0
    for counts, picks in runs:
        for row, layers in enumerate(picks, start=1):
            older = counts.cached[row] - counts.local[row]
            for token in (token for layer in layers for lane in layer for token in lane):
                every += 1
                for place, share in enumerate(_AGES):
                    below[place] += token < share * older
    if not every:
        return _EVERY_AGE_ALIKE
    return ((0.0, 0.0), *((share, count / every) for share, count in zip(_AGES, below, strict=True)), (1.0, 1.0))

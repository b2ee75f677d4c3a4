"""Access profiles from runs: how many of a selector's picks are new at each step, and how old they are."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from calibration.families.base import Scope
from calibration.runner import Ran, Runner
from runtime.execute import execute
from runtime.models import load_decoder
from runtime.options import Options
from runtime.prompts import Text, read_prompts
from runtime.recorder import LanePicks, Record
from sim.access import AccessProfile, measured_access
from sim.attention import Selector, TokenCounts
from sim.plan import Placement, Plan
from sim.recipe import Recipe, plan_for, plan_of
from sim.spec import MachineSpec

SELECTORS = (Selector.SWA, Selector.H2O, Selector.PAGES, Selector.TOPK)
_KEEPS, _OUTPUT = (5, 10, 20, 40), 64
_EVERY_AGE_ALIKE = ((0.0, 0.0), (1.0, 1.0))
_AGES = (0.25, 0.5, 0.75)
_RECORD = Record(selections=True, picks=True, mass=True)


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
        runs = list[tuple[float, Plan, Ran]]()
        for keep in keeps:
            sparse = replace(recipe, selector=selector, keep=keep, placement=Placement.RESIDENT)
            plan = plan_of(sparse, machine)
            runs.append((keep / 100, plan, runner.run(plan, record=_RECORD)))
        where = f"random weights of {recipe.model}, random tokens, prompt {recipe.prompt}, {recipe.output} steps"
        found = access_of(selector, runs, f"{where}, {device}, {datetime.date.today()}")
        profiles.append(replace(found, model=model))
    return tuple(profiles)


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
        runs = list[tuple[float, Plan, Ran]]()
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
            runs.append((keep / 100, plan, Ran(trace=ran.trace, peak_bytes=None, picks=ran.picks, stats=ran.stats)))
        where = f"{folder.name}, {len(texts)} prompts of {prompts.name}, {_OUTPUT} steps"
        profiles.append(access_of(selector, runs, f"{where}, {datetime.date.today()}"))
    return tuple(profiles)


def access_of(selector: Selector, runs: Sequence[tuple[float, Plan, Ran]], source: str) -> AccessProfile:
    """From (keep share, plan, run) triples, ascending.

    Perplexity needs a text to be scored, the share that returns captured steps that spill: both stay what they were.
    """
    usual = measured_access(selector)
    mass = ", ".join(f"{kept_mass(ran):.0%} at {keep:.0%}" for keep, _, ran in runs)
    return AccessProfile(
        selector=selector,
        keep_shares=tuple(keep for keep, _, _ in runs),
        turnovers=tuple(_turnover(ran) for _, _, ran in runs),
        perplexity_ratios=tuple(usual.perplexity_ratio(keep) for keep, _, _ in runs),
        age_shares=_age_shares([(plan.setting.token_counts, ran.picks or []) for _, plan, ran in runs])
        if selector.recalls
        else _EVERY_AGE_ALIKE,  # what other selectors leave out dies: hardly more lives than is picked
        ages_of_all=_ages_of_all([(plan.setting.token_counts, ran.picks or []) for _, plan, ran in runs])
        if selector is Selector.SWA
        else None,
        source=f"{source}; attention kept {mass}; perplexity: {usual.source}",
    )


def kept_mass(ran: Ran) -> float:
    """Share of the attention to all living tokens that falls on the attended ones."""
    return mean(one.mass or 0.0 for wave in ran.stats for one in wave)


def _turnover(ran: Ran) -> float:
    """From the second decode step on: the first one has nothing before it."""
    shares = [one.turnover for wave in ran.stats for one in wave[1:] if one.picked]
    return min(1.0, mean(shares)) if shares else 0.0


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


def _ages_of_all(runs: Sequence[tuple[TokenCounts, LanePicks]]) -> bool | None:
    """Whether at least half as many picks as would be if all older tokens were picked alike fall on those that have left the
    local window since the prompt.
    """
    left, expected = 0, 0.0
    for counts, picks in runs:
        since = counts.cached[0] - counts.local[0]
        for row, layers in enumerate(picks, start=1):
            older = counts.cached[row] - counts.local[row]
            for picked in (lane for lanes in layers for lane in lanes):
                left += sum(token >= since for token in picked)
                expected += len(picked) * (older - since) / max(1, older)
    return left >= expected / 2 if expected else None

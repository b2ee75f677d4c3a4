"""What selectors pick, before anything is timed: beside other processes where there are such, and the rest by this one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.bench import access_recipes, prepare
from calibration.families.base import Case
from sim.access import AccessProfile
from sim.attention import Selector
from sim.measured import Measured, load_measured
from sim.recipe import Recipe
from tests.calibration.test_without_a_gpu import LikeAGpu
from tests.calibration.tiny import file_of, fingerprint, machine, scope

NOTHING = Measured(fingerprint=fingerprint(), machine=machine())
Tasks = Sequence[Callable[[], Any]]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipes at which was looked; 13B's longest prompts do not fit."""
    cases = list[str]()

    def look(
        _: object, __: object, recipe: Recipe, keeps: Sequence[int], where: str, *, selectors: Sequence[Selector]
    ) -> tuple[AccessProfile, ...]:
        cases.append(recipe.case)
        if recipe.model == "opt-13b" and recipe.prompt == 512:
            raise MemoryError
        return tuple(picks(recipe, one, keeps, where) for one in selectors)

    monkeypatch.setattr("calibration.bench.random_weights_access", look)
    return cases


def picks(recipe: Recipe, selector: Selector, keeps: Sequence[int], where: str = "test") -> AccessProfile:
    source = f"random weights of {recipe.model}, random tokens, prompt {recipe.prompt}, {recipe.output} steps, {where}"
    return AccessProfile(
        selector=selector,
        keep_shares=tuple(keep / 100 for keep in keeps),
        turnovers=(0.1,) * len(keeps),
        perplexity_ratios=(1.0,) * len(keeps),
        source=source,
    )


def everything(card: LikeAGpu) -> list[AccessProfile]:
    return [picks(recipe, one, keeps) for recipe, selectors, keeps in access_recipes(card) for one in selectors]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> LikeAGpu:
    """Its four models, no cases to be compiled."""
    monkeypatch.setattr("calibration.bench.cases", lambda *_: iter(()))
    like = scope(models=("opt-6.7b", "llama-3-8b", "opt-1.3b", "opt-13b"), thorough=True)
    return LikeAGpu(**{name: getattr(like, name) for name in like.__dataclass_fields__})


def test_a_cpu_looks_once_and_the_file_keeps_it(looked: list[str], tmp_path: Path) -> None:
    file = file_of(tmp_path)

    found = prepare(scope(), file, NOTHING)

    assert [one.selector for one in found.random_access] == list(next(access_recipes(scope()))[1])
    assert load_measured(file).random_access == found.random_access
    assert prepare(scope(), file, load_measured(file)).random_access == found.random_access
    assert len(looked) == 1


def test_other_processes_look_at_each_model_and_this_one_at_what_they_left(
    looked: list[str], card: LikeAGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_others = list[list[str]]()

    def done_ahead(_: Callable[[], Iterable[Case]], __: object, others: Tasks) -> Iterator[tuple[int, int, Any]]:
        for number, task in enumerate(others, start=1):
            looked.clear()
            answer = task() if number != 2 else None  # a process that ended
            by_others.append(list(looked))
            yield number, len(others), answer
        looked.clear()

    monkeypatch.setattr("calibration.bench.done_ahead", done_ahead)
    told, failed = list[str](), list[str]()

    found = prepare(card, None, NOTHING, lambda _, __, what: told.append(what), failed.append)

    every = [recipe for recipe, _, _ in access_recipes(card)]
    models = [["opt-1.3b/4"], [], *([name] * 5 for name in ("llama-3-8b", "opt-1.3b", "opt-13b"))]
    assert [[case.partition(" ")[0].removeprefix("model=") for case in cases] for cases in by_others] == models
    longest = next(recipe for recipe in every if recipe.model == "opt-13b" and recipe.prompt == 512)
    assert looked == [*(recipe.case for recipe in every if recipe.model == "opt-6.7b"), longest.case]
    assert failed == [f"what selectors pick of {longest.case}: MemoryError"]
    all_but_one = [one for one in everything(card) if "opt-13b, random tokens, prompt 512" not in one.source]
    assert list(found.random_access) == all_but_one
    assert told[-1] == f"what selectors pick of {longest.case}"


@pytest.mark.parametrize("lacking", ["nothing", "a model's", "a share"])
def test_only_what_is_not_known_is_looked_at_but_kernels_compile(
    lacking: str, looked: list[str], card: LikeAGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Tasks]()

    def done_ahead(_: object, __: object, others: Tasks) -> Iterator[tuple[int, int, Any]]:
        asked.append(others)
        yield 1, 1, None

    monkeypatch.setattr("calibration.bench.done_ahead", done_ahead)
    every, kept = everything(card), everything(card)
    if lacking == "a model's":
        kept = [one for one in every if "opt-1.3b, random tokens, prompt 64" not in one.source]
    if lacking == "a share":
        kept[0] = replace(
            kept[0], keep_shares=(0.1, 0.2, 0.4), turnovers=(0.1,) * 3, perplexity_ratios=(1.0,) * 3
        )  # of a quick look

    found = prepare(card, None, replace(NOTHING, random_access=tuple(kept)))

    expected = {"nothing": [], "a model's": ["model=opt-1.3b batch=8 prompt=64"], "a share": ["model=opt-1.3b/4"]}
    assert [len(others) for others in asked] == [len(expected[lacking])]
    assert [case.startswith(start) for case, start in zip(looked, expected[lacking], strict=True)] == [True] * len(
        looked
    )
    assert list(found.random_access) == every


def test_each_look_is_kept_as_soon_as_it_is_found(
    card: LikeAGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped in the middle, no look is lost."""
    file, looks = file_of(tmp_path), list(access_recipes(card))

    def look(
        _: object, __: object, recipe: Recipe, keeps: Sequence[int], where: str, *, selectors: Sequence[Selector]
    ) -> tuple[AccessProfile, ...]:
        if recipe == looks[3][0]:
            raise KeyboardInterrupt
        return tuple(picks(recipe, one, keeps, where) for one in selectors)

    monkeypatch.setattr("calibration.bench.random_weights_access", look)
    monkeypatch.setattr("calibration.bench.done_ahead", lambda *_: iter(()))
    with pytest.raises(KeyboardInterrupt):
        prepare(card, file, NOTHING)

    kept = load_measured(file).random_access
    assert list(kept) == everything(card)[: sum(len(selectors) for _, selectors, _ in looks[:3])]

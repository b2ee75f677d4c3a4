"""What selectors pick, before anything is timed: beside other processes where there are such, and the rest by this one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.bench import access_recipes, prepare
from calibration.families.base import Case
from sim.access import AccessProfile, measured_access
from sim.attention import Selector
from sim.measured import Measured, load_measured
from sim.recipe import Recipe
from tests.calibration.test_without_a_gpu import LikeAGpu
from tests.calibration.tiny import file_of, fingerprint, machine, scope

NOTHING = Measured(fingerprint=fingerprint(), machine=machine())
Tasks = Sequence[Callable[[], Any]]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipes at which was looked, each of which picks as told by its own source; 13B's longest prompts do not fit."""
    cases = list[str]()

    def look(
        _: object, __: object, recipe: Recipe, *___: object, selectors: Sequence[Selector]
    ) -> tuple[AccessProfile, ...]:
        cases.append(recipe.case)
        if recipe.model == "opt-13b" and recipe.prompt == 512:
            raise MemoryError
        return tuple(replace(measured_access(one), source=recipe.case) for one in selectors)

    monkeypatch.setattr("calibration.bench.random_weights_access", look)
    return cases


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

    every = [recipe for recipe, selectors, _ in access_recipes(card) for _ in selectors]
    models = [["opt-1.3b/4"], [], *([name] * 5 for name in ("llama-3-8b", "opt-1.3b", "opt-13b"))]
    assert [[case.partition(" ")[0].removeprefix("model=") for case in cases] for cases in by_others] == models
    longest = next(recipe for recipe in every if recipe.model == "opt-13b" and recipe.prompt == 512)
    left = [*(recipe.case for recipe in every if recipe.model == "opt-6.7b"), longest.case]
    assert looked == left
    assert failed == [f"what selectors pick of {longest.case}: MemoryError"]
    assert [one.source for one in found.random_access] == [recipe.case for recipe in every if recipe != longest]
    assert told[-1] == f"what selectors pick of {longest.case}"


def test_picks_that_are_known_are_not_looked_at_again_but_kernels_compile(
    looked: list[str], card: LikeAGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Tasks]()

    def done_ahead(_: object, __: object, others: Tasks) -> Iterator[tuple[int, int, Any]]:
        asked.append(others)
        yield 1, 1, None

    monkeypatch.setattr("calibration.bench.done_ahead", done_ahead)
    known = replace(NOTHING, random_access=(measured_access(Selector.SWA),))

    assert prepare(card, None, known) == known
    assert asked == [[]]
    assert looked == []

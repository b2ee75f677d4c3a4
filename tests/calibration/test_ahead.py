"""Done ahead by several processes: each case that waits for the compiler once, and other tasks; nothing is timed."""

import os
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from time import sleep

import pytest
import torch

from calibration import ahead
from calibration.ahead import done_ahead
from calibration.bench import cases, untimed
from calibration.families.base import Case
from calibration.runner import Runner
from calibration.timer import Untimed
from sim.profile import Measurement
from tests.calibration.tiny import CPU, machine, scope

NAMES = [("decode", str(number)) for number in range(9)] + [("copy", "9"), ("attention", "lacking"), ("select", "last")]


def noting(folder: Path, *, ends_at: str | None = None) -> Iterator[Case]:
    """Each leaves a file of its words; a kernel may be lacking, or a process end."""

    def measure(words: str) -> tuple[Measurement, ...]:
        if words == ends_at:
            os._exit(1)
        if words == "lacking":
            raise RuntimeError(words)
        (folder / f"{words}-{os.getpid()}").touch()
        return ()

    for family, words in NAMES:
        yield Case(family=family, case=words, measure=partial(measure, words))


@pytest.fixture(autouse=True)
def _cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.ahead.cores", lambda: 2)


def done(folder: Path) -> list[str]:
    return sorted(file.name.partition("-")[0] for file in folder.iterdir())


def test_each_case_that_takes_the_compiler_long_is_run_once_by_another_process(tmp_path: Path) -> None:
    told = list(done_ahead(partial(noting, tmp_path), list(noting(tmp_path))[1:]))

    assert told == [(1, 3, None), (2, 3, None), (3, 3, None)]
    assert done(tmp_path) == [*map(str, range(1, 9)), "last"]
    processes = {file.name.partition("-")[2] for file in tmp_path.iterdir()}
    assert str(os.getpid()) not in processes
    assert 1 <= len(processes) <= 2


def answer(words: str) -> str:
    if words == "lacking":
        raise RuntimeError(words)
    return f"{words} by {os.getpid()}"


def test_other_tasks_are_answered_by_other_processes_and_one_that_fails_is_not(tmp_path: Path) -> None:
    others = [partial(answer, words) for words in ("first", "lacking", "last")]

    told = list(done_ahead(partial(noting, tmp_path), list(noting(tmp_path))[:4], others))

    assert [(number, total) for number, total, _ in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    answers = [one for _, _, one in told if one is not None]
    assert sorted(one.partition(" by ")[0] for one in answers) == ["first", "last"]
    assert str(os.getpid()) not in {one.partition(" by ")[2] for one in answers}
    assert done(tmp_path) == ["0", "1", "2", "3"]


def endless(folder: Path) -> None:
    (folder / "begun").touch()
    sleep(60)
    (folder / "ended").touch()


def test_whoever_looks_no_further_waits_for_nothing(tmp_path: Path) -> None:
    others = [partial(endless, tmp_path), partial(answer, "first")]
    told = done_ahead(partial(noting, tmp_path), list(noting(tmp_path))[:1], others)
    while not (tmp_path / "begun").exists():
        next(told)
    told.close()  # type: ignore[attr-defined]

    assert not (tmp_path / "ended").exists()
    assert active_children() == []


def in_the_middle(folder: Path) -> None:
    """A process that is killed while others work for it."""
    ahead.cores = lambda: 2  # type: ignore[attr-defined]
    for _ in done_ahead(partial(noting, folder), [], [partial(named, folder), partial(named, folder)]):
        pass


def named(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    sleep(600)


def test_whoever_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    parent = get_context("spawn").Process(target=in_the_middle, args=(tmp_path,))
    parent.start()
    while len(list(tmp_path.iterdir())) < 2:
        sleep(0.05)
    parent.kill()
    parent.join()

    pids, patience_s = [int(file.name) for file in tmp_path.iterdir()], 30.0
    while any(map(is_there, pids)) and patience_s > 0:
        sleep(0.1)
        patience_s -= 0.1
    assert not any(map(is_there, pids))


def is_there(pid: int) -> bool:
    """One that has ended and is not waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_ends_leaves_its_cases_to_whoever_measures_them(tmp_path: Path) -> None:
    told = list(done_ahead(partial(noting, tmp_path, ends_at="0"), list(noting(tmp_path))))

    assert len(told) < 3
    assert "0" not in done(tmp_path)


def test_without_cores_for_several_processes_nothing_is_done_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.ahead.cores", lambda: 1)

    assert list(done_ahead(partial(noting, tmp_path), list(noting(tmp_path)))) == []
    assert done(tmp_path) == []


def test_untimed_cases_are_the_same_ones_and_make_each_call_once() -> None:
    made = list[str]()
    Untimed().time([lambda: made.append("a"), lambda: made.append("b")], captured=True, budget_s=9.0)
    assert made == ["a", "b"]

    usual = [(one.family, one.case) for one in cases(scope(), Runner(device=CPU))]
    once = list(cases(scope(timer=Untimed()), Runner(device=CPU)))
    assert [(one.family, one.case) for one in once] == usual
    step = next(one for one in once if one.family == "decode")
    assert step.measure() == ()
    assert {one.family for one in untimed(torch.device("cpu"), machine(), thorough=False)} >= {"attention", "decode"}

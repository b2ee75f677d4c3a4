"""What is not timed, done ahead by several processes: kernels compiled, which takes one process longer than all that is timed of
them, and whatever else needs the device but not the clock.

The compiler keeps on disk what it has made, where the process that measures finds it.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

import torch

from calibration.beside import beside, cores
from calibration.families.base import FAILURES, Case

_COMPILED = ("attention", "select", "decode")  # families of which a first run takes the compiler longest
_MOST = 8  # processes, each of which may take an eighth of all memory, as a case does
_TOGETHER = 4  # neighbours share weights and kernels

T = TypeVar("T")
Name = tuple[str, str]  # a case's family and words
_cases = dict[Name, Case]()  # of a process


def done_ahead(
    cases: Callable[[], Iterable[Case]], waiting: Sequence[Case], others: Sequence[Callable[[], T]] = ()
) -> Iterator[tuple[int, int, T | None]]:
    """As each is done: how many of how many, and its answer if it is one of ``others``; those come before groups of ``waiting``
    cases, of which ``cases`` are the same ones untimed. Both must be importable.

    Nothing with one core only. What fails, or ends a process, is left to whoever measures it.
    """
    names = [(case.family, case.case) for case in waiting if case.family in _COMPILED]
    groups = [names[first : first + _TOGETHER] for first in range(0, len(names), _TOGETHER)]
    tasks: list[Callable[[], T | None]] = [*others, *(partial(_compile, group) for group in groups)]
    processes = min(_MOST, len(tasks), cores())
    if processes < 2:
        return
    with beside(processes, _begin, cases) as pool:
        futures = [pool.submit(_done, task) for task in tasks]
        for number, done in enumerate(as_completed(futures), start=1):
            if isinstance(done.exception(), BrokenProcessPool):
                return
            yield number, len(tasks), None if done.exception() else done.result()


def _begin(cases: Callable[[], Iterable[Case]]) -> None:
    _cases.update({(case.family, case.case): case for case in cases()})


def _done(task: Callable[[], T]) -> T:
    try:
        return task()
    finally:  # what this process would keep at hand, others may lack
        gc.collect()
        torch.cuda.empty_cache()


def _compile(names: Sequence[Name]) -> None:
    for name in names:
        try:
            _cases[name].measure()
        except FAILURES:
            continue

"""Kernels compiled ahead by several processes: one after the other they take longer than all that is timed of them.

The compiler keeps on disk what it has made, where the process that measures finds it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from os import cpu_count

from calibration.beside import beside
from calibration.families.base import FAILURES, Case

_COMPILED = ("attention", "select", "decode")  # families of which a first run takes the compiler longest
_MOST, _CORES = 6, 2  # processes, each of which may take as much memory as a case does; cores for each of them
_TOGETHER = 4  # neighbours share weights and kernels

Name = tuple[str, str]  # a case's family and words
_cases = dict[Name, Case]()  # of a process


def compiled_ahead(cases: Callable[[], Iterable[Case]], waiting: Sequence[Case]) -> Iterator[tuple[int, int]]:
    """How many of how many groups of those that are ``waiting`` are done, as they are; ``cases``, which must be importable, are
    the same ones untimed.

    Nothing without cores for several processes. What fails, or ends a process, is left to whoever measures it.
    """
    names = [(case.family, case.case) for case in waiting if case.family in _COMPILED]
    groups = [names[first : first + _TOGETHER] for first in range(0, len(names), _TOGETHER)]
    processes = min(_MOST, len(groups), (cpu_count() or 1) // _CORES)
    if processes < 2:
        return
    pool = beside(processes, _begin, cases)
    try:
        futures = [pool.submit(_compile, group) for group in groups]
        for number, done in enumerate(as_completed(futures), start=1):
            if isinstance(done.exception(), BrokenProcessPool):
                return
            yield number, len(groups)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(cases: Callable[[], Iterable[Case]]) -> None:
    _cases.update({(case.family, case.case): case for case in cases()})


def _compile(names: Sequence[Name]) -> None:
    for name in names:
        try:
            _cases[name].measure()
        except FAILURES:
            continue

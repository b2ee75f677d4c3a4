"""Processes beside this one, begun anew: a copy of one that holds a GPU could not use it."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from signal import SIG_IGN, SIGINT, signal
from typing import Any


def beside(processes: int, begin: Callable[..., None], *given: Any) -> ProcessPoolExecutor:
    """Each is begun by ``begin``, importable and with ``given``, and passes over Ctrl-C: whoever waits for it ends it."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(begin, given))


def _begin(begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal(SIGINT, SIG_IGN)
    begin(*given)

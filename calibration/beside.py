"""Processes beside this one, begun anew: a copy of one that holds a GPU could not use it."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any


def cores() -> int:
    """That this process may use: a share of the machine's, where it was given one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def beside(processes: int, begin: Callable[..., None], *given: Any) -> Iterator[ProcessPoolExecutor]:
    """Each is begun by ``begin``, importable and with ``given``, and passes over Ctrl-C: whoever waits for it ends it, and ends
    it in the middle of what it does where nobody waits any longer.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(begin, given))
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal(SIGINT, SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    begin(*given)


def _end_with(parent: BaseProcess | None) -> None:
    """Whoever is killed ends nobody: what waits for it would wait, and hold a GPU, for good."""
    if parent is not None:
        parent.join()
        os._exit(1)

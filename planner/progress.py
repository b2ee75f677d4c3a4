"""A progress bar for work whose end is known, shown when it turns out to take long and somebody watches."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from planner import terminal


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with how much is done, and of how much; it draws on stderr after two seconds."""
    bar = _Bar(task)
    try:
        yield bar.move if sys.stderr.isatty() else lambda _done, _all: None
    finally:
        bar.stop()


class _Bar:
    """rich's bar, imported when it turns out to be needed."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._started = time.perf_counter()
        self._progress: Any = None

    def move(self, done: int, of_all: int) -> None:
        if self._progress is None and time.perf_counter() - self._started > terminal.PATIENCE_S:
            self._start(of_all)
        if self._progress is not None:
            self._progress.update(self._number, completed=done)

    def _start(self, of_all: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._number = self._progress.add_task(self._task, total=of_all)
        self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

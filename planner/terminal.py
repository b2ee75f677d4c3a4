"""What every command does with a terminal: errors as one line with an exit code, progress, answers to screen and file."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import typer

BAD_INPUT = 2
INFEASIBLE = 3
INTERRUPTED = 130
BROKEN_PIPE = 141  # as a program that SIGPIPE ends: 128 + 13
COLUMNS = 100  # widest output
PATIENCE_S = 2.0  # work that takes longer shows that it goes on

_UsageError: Any = typer.BadParameter.__base__  # click's own class, wherever this release of typer keeps it


def exit_code(answer: Callable[[], None], *, program: str = "planner") -> int:
    """Run ``answer``; 0, or the exit code of an error that it printed as one line on stderr.

    ``program`` is the command whose help a usage error points to. What no user can have caused is raised; so is every
    error under ``python -X dev``.
    """
    try:
        _open_what_is_closed()
        _set_forgiving_encoding()
        code = _finished(answer)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except Exception as error:
        code_of_error = _expected(error)
        if code_of_error is None or sys.flags.dev_mode:
            raise
        print(f"error: {one_line(_message(error, program))}", file=sys.stderr)
        _flush_or_discard()
        return code_of_error


def one_line(text: str) -> str:
    """``text`` without line breaks; what cannot be printed is written as an escape."""
    words = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words)


def show(renderable: Any) -> None:
    """Print with rich, at most ``COLUMNS`` wide; colours only on a terminal."""
    from io import StringIO

    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    rendered = (
        StringIO()
    )  # rich ends the process when a pipe breaks; writing the text ourselves keeps that in one place
    console = Console(
        file=rendered, force_terminal=on_terminal or None, width=_width(on_terminal), highlight=False, markup=False
    )
    console.print(renderable)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in rendered.getvalue().splitlines())


def show_json(data: object) -> None:
    """Print one JSON document and nothing else."""
    sys.stdout.write(json_text(data))


def json_text(data: object) -> str:
    """Indented, with a newline at the end."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def write_answer(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all.

    Raises ValueError where ``path`` cannot be a file.
    """
    from sim.files import write_atomically

    write_atomically(path, text)


@contextmanager
def patiently(task: str) -> Iterator[None]:
    """Show a spinner with ``task`` on stderr while work takes longer than two seconds; nothing if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    spinner = _Spinner(task)
    timer = Timer(PATIENCE_S, spinner.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        spinner.stop()


class _Spinner:
    """rich's spinner with the seconds that have passed, imported when it turns out to be needed."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._progress: Any = None

    def start(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.add_task(self._task, total=None)
        self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _finished(answer: Callable[[], None]) -> int:
    try:
        answer()
    except typer.Exit as early:
        return early.exit_code
    return 0


def _expected(error: Exception) -> int | None:
    """The exit code of an error that a user can cause, None for any other."""
    from planner.solution import Infeasible

    if isinstance(error, (ValueError, OverflowError, MemoryError, OSError, _UsageError)):
        return BAD_INPUT
    # Only the engine raises CapacityExceeded, the runtime BudgetExceeded: what has not been loaded has not raised.
    engine, runtime = sys.modules.get("sim.machine"), sys.modules.get("runtime.wave")
    if isinstance(error, Infeasible) or (engine is not None and isinstance(error, engine.CapacityExceeded)):
        return INFEASIBLE
    if runtime is not None and isinstance(error, runtime.BudgetExceeded):
        return INFEASIBLE
    return None


def _message(error: Exception, program: str) -> str:
    if isinstance(error, _UsageError):
        return _usage_message(error, program)
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}, {error.strerror or error}: name another file"
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}): give a smaller one"
    if isinstance(error, MemoryError):
        return f"this machine's memory does not do for it ({str(error) or 'no more'}): ask for less, fewer sequences or tokens"
    return str(error)


def _usage_message(error: Any, program: str) -> str:
    """Click's message, and where the options are listed; Click itself would print four lines."""
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]} (see `{program} --help`)"


def _width(on_terminal: bool) -> int:
    if not on_terminal:
        return COLUMNS
    from shutil import get_terminal_size

    return min(COLUMNS, get_terminal_size().columns)


def _open_what_is_closed() -> None:
    """A program that was begun without a standard output or error prints to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, as long as the process lives


def _set_forgiving_encoding() -> None:
    """A name from the file system may hold bytes that are no text; print them as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _flush_or_discard() -> None:
    """What could not be printed is not tried again when the interpreter ends, which would say so in its own words."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()


def _discard_stdout() -> None:
    """Nobody reads on: let the interpreter's last flush go nowhere, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The command line as tests see it: arguments in, exit code and both streams out."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from planner.cli import app

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal, after ``error: ``; fails where there is anything else."""
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        line = self.err.removeprefix("error: ").removesuffix("\n")
        assert len(self.err.splitlines()) == 1
        assert line.isprintable()
        return line


def run(*words: str) -> Said:
    """Run ``planner`` in this process; a bug in it is raised."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(code=result.exit_code, out=result.stdout, err=result.stderr)


def run_cold(*words: str, code: Sequence[str] = ("-m", "planner")) -> Said:
    """Run ``planner`` as a program of its own."""
    ended = subprocess.run([sys.executable, *code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return Said(code=ended.returncode, out=ended.stdout, err=ended.stderr)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Fail if anything below ``folder`` is not as it was, or new."""
    before = _contents(folder)
    yield
    assert _contents(folder) == before


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its bytes; None for what is no regular file."""
    paths = (Path(top) / name for top, folders, files in os.walk(folder) for name in (*folders, *files))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

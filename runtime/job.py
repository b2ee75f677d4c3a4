"""A file of prompts to a file of completions: wave after wave, each written when it is done, resumed where it stopped."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from runtime.execute import execute, require_prompts
from runtime.graph.execute import Captures
from runtime.memory import memory_limits
from runtime.models import Decoder, as_planned
from runtime.options import Options, Run
from runtime.prompts import Prompt, Text
from sim.plan import Admission, Plan

SMALLER_BUDGET = "solve with a smaller --kv-budget-gib"
SMALLER_BATCH = "solve for a smaller batch, or a host with less memory"


def run_job(
    plan: Plan,
    decoder: Decoder,
    prompts: list[Prompt],
    output: Path,
    text: Text,
    *,
    options: Options,
    on_wave: Callable[[int, Run], None],
) -> int:
    """Append a line for every prompt that ``output`` has none for, and give the number of those it had.

    ``on_wave`` is told how many prompts are done, and the run of the last ones. A wave's lines are on disk before the
    next wave starts. Raises ValueError where ``output`` is another job's, in use, or memory runs out.
    """
    for prompt in prompts:
        _require_prompt(plan, prompt)
    decoder = as_planned(decoder, plan.setting)
    with _appending(output) as file:
        done = _finished(file, output, {prompt.id for prompt in prompts})
        waiting = [prompt for prompt in prompts if prompt.id not in done]
        work, captured = plan.setting, Captures()
        size = work.workload.batch if work.admission is Admission.CONTINUOUS else work.concurrency
        for at in range(0, len(waiting), size):
            wave = waiting[at : at + size]
            run = _run(plan, decoder, wave, options, captured)
            _append(file, wave, run, text)
            on_wave(len(done) + at + len(wave), run)
    return len(done)


def _run(plan: Plan, decoder: Decoder, wave: list[Prompt], options: Options, captured: Captures) -> Run:
    placed = replace(options, places=tuple(prompt.place for prompt in wave))
    with memory_limits(gpu=SMALLER_BUDGET, host=SMALLER_BATCH):
        return execute(plan, decoder, [prompt.tokens for prompt in wave], options=placed, captured=captured)


def _append(file: IO[bytes], wave: list[Prompt], run: Run, text: Text) -> None:
    lines = [
        json.dumps({"id": prompt.id, "tokens": list(tokens), "text": text.decode(tokens)}, ensure_ascii=False)
        for prompt, tokens in zip(wave, run.completions, strict=True)
    ]
    file.write("".join(f"{line}\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _appending(path: Path) -> Iterator[IO[bytes]]:
    """``path``, open for this process alone."""
    try:
        file = open(path, "a+b")  # noqa: SIM115 - closed below, after the lock is known
    except OSError as error:
        raise ValueError(f"{path}, cannot be written ({error.strerror}): choose another place") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}, another run is writing to it: wait for that or choose another file") from None
        yield file


def _finished(file: IO[bytes], path: Path, wanted: set[str | int]) -> set[str | int]:
    """Ids that have a whole line; a last line that was cut short is taken away."""
    file.seek(0)
    whole, newline, _ = file.read().rpartition(b"\n")
    file.truncate(len(whole) + len(newline))
    done = {_id_of(line, f"{path} line {number}") for number, line in enumerate(whole.splitlines(), start=1)}
    foreign = next((name for name in done if name not in wanted), None)
    if foreign is not None:
        raise ValueError(f"{path}, holds id={foreign!r}, which no prompt has: another job's file, choose a new one")
    return done


def _id_of(line: bytes, where: str) -> str | int:
    try:
        name: str | int = json.loads(line)["id"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{where}, is no completion: choose a new file") from None
    return name


def _require_prompt(plan: Plan, prompt: Prompt) -> None:
    try:
        require_prompts(plan, [prompt.tokens])
    except ValueError as error:
        raise ValueError(f"id={prompt.id!r}: {error}") from None

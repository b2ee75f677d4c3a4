"""A solve at every point of a grid over machine, model, work and what the plan may do, on all cores."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

from planner.brief import plan_words
from planner.callable import CallableModule
from planner.inputs import Question, request_of
from planner.request import Request
from planner.solution import Infeasible, Shortage, Solution
from planner.solve import solve

Value: TypeAlias = str | int | float | bool | tuple[str, ...]
Text: TypeAlias = str | bool | tuple[str, ...]
Result: TypeAlias = "Figures | Refusal"

MOST_POINTS = 100_000  # days of solving; more is a slip of the keyboard
SETS = ("selector", "kv_formats")  # fields whose values are sets, written with a plus: int8+int4
ALONE_S = 0.5  # so long this process works by itself; a small grid is done before others have started
START_S = 1.0  # what starting other processes costs about
BATCHES = 8  # that each process gets, so that none waits long for the last one
MOST_IN_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The best plan at a point in numbers and a few words, the throughput of the best lossless one, and what both rest on."""

    tokens_per_s: float
    makespan_s: float
    ttft_s: float
    tpot_s: float | None
    peak_hbm_bytes: int
    peak_host_bytes: int
    plan: str
    is_lossless: bool
    lossless_tokens_per_s: float | None
    gap: float
    profile: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a point has no plan; ``shortage`` is None where its values contradict each other."""

    reason: str
    shortage: Shortage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination of the values that were given, by field in the order of the grid, and what came of it."""

    values: tuple[tuple[str, Text], ...]
    question: Question
    outcome: Result


def sweep(
    *, jobs: int | None = None, on_done: Callable[[int, int], None] | None = None, **grid: Value | Sequence[Value]
) -> tuple[Point, ...]:
    """Every combination of the values given for fields of ``planner.inputs.Question``, the last field varying fastest.

    ``sweep(gpu=("a100-40g", "l40s"), batch=(8, 16), kv_formats="int8+int4", lossless=True)``. A point without a plan has
    a Refusal. ``jobs`` processes work (all cores by default); ``on_done`` is told how many points have
    been solved, and of how many.
    Raises ValueError for a field that there is none of, and for a value that suits none of its points.
    """
    axes = {name: _texts(name, values) for name, values in grid.items()}
    return tuple(solved_points(axes, jobs=jobs, on_done=on_done))


def solved_points(
    axes: Mapping[str, Sequence[Text]], *, jobs: int | None = None, on_done: Callable[[int, int], None] | None = None
) -> Iterator[Point]:
    """The points of ``axes``, one after the other, as they are solved."""
    points = [dict(zip(axes, texts, strict=True)) for texts in _combinations(axes)]
    questions = [_question(point) for point in points]
    requests = _requests(points, questions)
    outcomes = solve_all([one for one in requests if isinstance(one, Request)], jobs=jobs)
    for number, (point, question, asked) in enumerate(zip(points, questions, requests, strict=True), start=1):
        outcome = next(outcomes) if isinstance(asked, Request) else asked
        if on_done is not None:
            on_done(number, len(points))
        yield Point(values=tuple(point.items()), question=question, outcome=outcome)


def solve_all(requests: Sequence[Request], *, jobs: int | None = None) -> Iterator[Result]:
    """What comes of each request, in their order. Other processes are started where that saves time."""
    started, done = time.perf_counter(), 0
    while done < len(requests) and (jobs == 1 or _worth_doing_alone(time.perf_counter() - started, done, requests)):
        yield outcome_of(requests[done])
        done += 1
    yield from _in_processes(requests[done:], jobs)


def outcome_of(request: Request) -> Result:
    """Solve one point."""
    try:
        return _figures(solve(request, suggest=False), request.profile.name)
    except Infeasible as error:
        return Refusal(reason=str(error), shortage=error.shortage)


def _worth_doing_alone(spent_s: float, done: int, requests: Sequence[Request]) -> bool:
    """To begin with, and to the end where that is near."""
    left = len(requests) - done
    return spent_s < ALONE_S or left * spent_s < START_S * done


def _in_processes(requests: Sequence[Request], jobs: int | None) -> Iterator[Result]:
    if not requests:
        return
    from joblib import Parallel, cpu_count, delayed  # heavy, and not needed for a few points

    workers = jobs or cpu_count()
    size = max(1, min(MOST_IN_BATCH, len(requests) // (workers * BATCHES)))
    batches = [requests[first : first + size] for first in range(0, len(requests), size)]
    parallel = Parallel(n_jobs=workers, backend="loky", batch_size=1, return_as="generator")
    with _interrupts_ignored():
        results = parallel(delayed(_outcomes)(batch) for batch in batches)
    for outcomes in results:
        yield from outcomes


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started meanwhile ignores them for good: at Ctrl-C a terminal tells every process, and one is to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what is to be ignored
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _outcomes(requests: Sequence[Request]) -> list[Result]:
    return [outcome_of(request) for request in requests]


def _figures(solution: Solution, profile: str) -> Figures:
    predicted, lossless = solution.predicted, solution.lossless
    return Figures(
        tokens_per_s=predicted.tokens_per_s,
        makespan_s=predicted.makespan_s,
        ttft_s=predicted.ttft_s,
        tpot_s=predicted.tpot_s,
        peak_hbm_bytes=predicted.peak_hbm_bytes,
        peak_host_bytes=predicted.peak_host_bytes,
        plan=plan_words(solution.plan),
        is_lossless=solution.plan.setting.is_lossless,
        lossless_tokens_per_s=None if lossless is None else lossless.predicted.tokens_per_s,
        gap=solution.certificate.gap,
        profile=profile,
    )


def _combinations(axes: Mapping[str, Sequence[Text]]) -> Iterable[tuple[Text, ...]]:
    for name, texts in axes.items():
        if not texts:
            raise ValueError(f"{name}, must have at least one value")
    points = prod(len(texts) for texts in axes.values())
    if points > MOST_POINTS:
        raise ValueError(f"the grid has {points:,} points, must have at most {MOST_POINTS:,}: give fewer values")
    return product(*axes.values())


def _question(point: Mapping[str, Text]) -> Question:
    return Question(**point)  # type: ignore[arg-type]


def _requests(points: Sequence[Mapping[str, Text]], questions: Sequence[Question]) -> list[Request | Refusal]:
    """What each point asks; a Refusal where its values contradict each other.

    Raises ValueError where a value suits no point: then it is at fault itself.
    """
    asked = [_request_or_refusal(question) for question in questions]
    for name in points[0]:
        for value in dict.fromkeys(point[name] for point in points):
            having = [one for point, one in zip(points, asked, strict=True) if point[name] == value]
            refusals = [one for one in having if isinstance(one, Refusal)]
            if len(refusals) == len(having):
                raise ValueError(refusals[0].reason)
    if not points[0] and isinstance(asked[0], Refusal):
        raise ValueError(asked[0].reason)
    return asked


def _request_or_refusal(question: Question) -> Request | Refusal:
    try:
        return request_of(question)
    except ValueError as error:
        return Refusal(reason=str(error))


def _texts(name: str, values: Value | Sequence[Value]) -> tuple[Text, ...]:
    """The values of a field as a command line would give them."""
    if name not in Question.__dataclass_fields__:
        raise ValueError(f"{name}, must be one of {', '.join(Question.__dataclass_fields__)}")
    several = values if isinstance(values, (tuple, list)) else (values,)
    return tuple(dict.fromkeys(_text(name, value) for value in several))


def _text(name: str, value: Value) -> Text:
    if name == "lossless":
        return bool(value)
    if name in SETS:
        return tuple(value.split("+")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    return str(value)


sys.modules[__name__].__class__ = CallableModule

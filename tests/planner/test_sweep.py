"""Grids in Python: which points there are, in which order, and that each is what a solve of its own gives."""

import pickle
import subprocess
import sys

import pytest

import planner
from builders import refuses
from commandline import ROOT
from planner import Question, request_of, solve, sweep
from planner import sweep as sweep_again
from planner.solution import Blame, Infeasible
from planner.sweep import MOST_POINTS, Figures, Point, Refusal, solve_all

QUICK = {"model": "opt-125m", "prompt": 8, "output": 6}


def speeds(points: tuple[Point, ...]) -> list[float]:
    return [point.outcome.tokens_per_s for point in points if isinstance(point.outcome, Figures)]


def reasons(points: tuple[Point, ...]) -> list[str | None]:
    return [point.outcome.reason if isinstance(point.outcome, Refusal) else None for point in points]


def test_every_combination_is_solved_the_last_field_varying_fastest() -> None:
    points = sweep(**QUICK, gpu=("l4", "a100-40g"), batch=(1, 2))

    assert [point.values[-2:] for point in points] == [
        (("gpu", "l4"), ("batch", "1")),
        (("gpu", "l4"), ("batch", "2")),
        (("gpu", "a100-40g"), ("batch", "1")),
        (("gpu", "a100-40g"), ("batch", "2")),
    ]
    alone = [solve(request_of(point.question)).predicted.tokens_per_s for point in points]
    assert speeds(points) == alone


def test_one_point_has_the_figures_of_its_solution() -> None:
    (point,) = sweep(**QUICK, batch=4, lossless=True)
    solution = solve(request_of(Question(model="opt-125m", prompt="8", output="6", batch="4", lossless=True)))

    assert point.outcome == Figures(
        tokens_per_s=solution.predicted.tokens_per_s,
        makespan_s=solution.predicted.makespan_s,
        ttft_s=solution.predicted.ttft_s,
        tpot_s=solution.predicted.tpot_s,
        peak_hbm_bytes=solution.predicted.peak_hbm_bytes,
        peak_host_bytes=0,
        plan="4 at once, dense, native",
        is_lossless=True,
        lossless_tokens_per_s=solution.predicted.tokens_per_s,
        gap=solution.certificate.gap,
        profile="nominal-a100-40g",
    )


def test_processes_give_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {**QUICK, "batch": (1, 2, 3), "kv_formats": ("native", "int8+int4"), "hbm_gib": (0.5, 8)}
    alone = sweep(jobs=1, **grid)
    monkeypatch.setattr("planner.sweep.ALONE_S", 0.0)
    monkeypatch.setattr("planner.sweep.START_S", 0.0)

    assert sweep(jobs=2, **grid) == alone
    assert any(reasons(alone))
    assert any(speeds(alone))


def test_sets_are_joined_with_a_plus_or_given_as_tuples() -> None:
    joined = sweep(**QUICK, batch=2, kv_formats=("int8", "int8+int4"), selector="swa+h2o")
    apart = sweep(**QUICK, batch=2, kv_formats=(("int8",), ("int8", "int4")), selector=(("swa", "h2o"),))

    assert joined == apart
    assert [point.question.kv_formats for point in joined] == [("int8",), ("int8", "int4")]


def test_a_point_that_no_plan_fits_has_its_reason() -> None:
    fits, too_large = sweep(model="llama-2-70b", gpu=("h200", "t4"), batch=2, prompt=8, output=4)

    assert isinstance(fits.outcome, Figures)
    assert isinstance(too_large.outcome, Refusal)
    assert too_large.outcome.shortage is not None
    assert too_large.outcome.shortage.blame is Blame.WEIGHTS
    assert "llama-2-70b (fp16) on t4 does not fit: host memory is" in too_large.outcome.reason
    assert "what fits" not in too_large.outcome.reason


def test_values_that_contradict_each_other_refuse_their_point_alone() -> None:
    points = sweep(**QUICK, batch=(1, 4), concurrency=(1, 3))

    assert reasons(points) == [
        None,
        "--concurrency=3, must be auto, all or a whole number from 1 to the batch, 1",
        None,
        None,
    ]


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"objective": ("ttft", "x")}, "--objective=x, must be one of throughput, tpot, ttft"),
        (
            {"gpu": "v100-16g", "dtype": ("fp16", "bf16")},
            "dtype=bf16, v100-16g has no bf16 arithmetic: use fp16 or fp32",
        ),
        ({"batch": ()}, "batch, must have at least one value"),
        ({"batches": 1}, f"batches, must be one of {', '.join(Question.__dataclass_fields__)}"),
        (
            {"batch": tuple(range(1, 1001)), "output": tuple(range(1, 102))},
            f"the grid has 101,000 points, must have at most {MOST_POINTS:,}: give fewer values",
        ),
    ],
    ids=["value", "every point", "empty", "field", "too many"],
)
def test_what_suits_no_point_is_refused_before_anything_is_solved(grid: dict[str, object], message: str) -> None:
    with refuses(message):
        sweep(**grid)


def test_values_given_twice_are_one_point() -> None:
    assert len(sweep(**QUICK, batch=(2, "2", 2))) == 1


def test_whoever_asks_is_told_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []

    sweep(**QUICK, batch=(1, 2, 3), on_done=lambda done, of_all: told.append((done, of_all)))

    assert told == [(1, 3), (2, 3), (3, 3)]


def test_requests_made_by_hand_can_be_solved_together() -> None:
    asked = [request_of(Question(model="opt-125m", batch=batch, output="4")) for batch in ("1", "2")]

    outcomes = list(solve_all(asked, jobs=1))

    assert [isinstance(outcome, Figures) for outcome in outcomes] == [True, True]
    assert pickle.loads(pickle.dumps(outcomes)) == outcomes


def test_the_package_offers_solve_and_sweep_whatever_was_imported_before() -> None:
    assert planner.sweep is sweep is sweep_again
    assert planner.solve is solve
    assert planner.Infeasible is Infeasible
    with pytest.raises(AttributeError, match="module 'planner' has no attribute 'slove'"):
        _ = planner.slove


def test_importing_the_package_loads_nothing_else() -> None:
    script = (
        "import sys, planner; print([name for name in sys.modules if name.split('.')[0] in ('numpy', 'sim', 'rich')])"
    )

    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert said.stdout == "[]\n"

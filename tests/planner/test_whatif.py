"""``planner whatif``: the table, the rows for programs, files, progress and errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from commandline import ROOT, run, run_cold, unchanged
from planner import progress, terminal
from planner.grid_table import csv_text, grid_table
from planner.solution import Blame, Shortage, Tier
from planner.sweep import Figures, Point, Question, Refusal
from planner.terminal import BAD_INPUT, INTERRUPTED, show

QUICK = ("--model", "opt-125m", "--prompt", "8", "--output", "6")
GRID = (*QUICK, "--gpu", "l4,a100-40g", "--batch", "2,4")
FIGURES = [
    "feasible",
    "reason",
    "tokens_per_s",
    "makespan_s",
    "ttft_s",
    "tpot_s",
    "peak_hbm_bytes",
    "peak_host_bytes",
    "plan",
    "is_lossless",
    "lossless_tokens_per_s",
    "gap",
    "profile",
]


def rows(*words: str) -> list[dict[str, object]]:
    said = run("whatif", *words, "--json")
    assert (said.code, said.err) == (0, "")
    answer: list[dict[str, object]] = json.loads(said.out)
    return answer


def test_the_table_has_the_fields_that_vary_and_the_figures() -> None:
    said = run("whatif", *GRID)

    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[1].split() == ["gpu", "batch", "tokens/s", "TTFT", "TPOT", "GiB", "GiB", "plan", "tokens/s"]
    cells = [line.split() for line in lines[3:]]
    assert [line[:2] for line in cells if line[0] in ("l4", "a100-40g")] == [
        ["l4", "2"],
        ["l4", "4"],
        ["a100-40g", "2"],
        ["a100-40g", "4"],
    ]
    assert "opt-125m" not in said.out
    assert max(map(len, lines)) <= terminal.COLUMNS


def test_rows_for_programs_have_the_given_fields_as_numbers_then_the_figures() -> None:
    first, *others = rows(*GRID, "--link-gb-s", "12.5", "--kv-formats", "int8+int4", "--concurrency", "2")

    assert list(first) == [
        "gpu",
        "link_gb_s",
        "model",
        "batch",
        "prompt",
        "output",
        "kv_formats",
        "concurrency",
        *FIGURES,
    ]
    assert (first["gpu"], first["batch"], first["link_gb_s"]) == ("l4", 2, 12.5)
    assert (first["kv_formats"], first["concurrency"], first["feasible"], first["reason"]) == (
        "int8+int4",
        2,
        True,
        None,
    )
    assert [(row["gpu"], row["batch"]) for row in others] == [("l4", 4), ("a100-40g", 2), ("a100-40g", 4)]


def test_a_row_is_what_solve_says() -> None:
    (row,) = rows(*QUICK, "--batch", "4")

    answer = json.loads(run("solve", *QUICK, "--batch", "4", "--json").out)

    assert row["tokens_per_s"] == answer["predicted"]["tokens_per_s"]
    assert row["peak_hbm_bytes"] == answer["predicted"]["peak_hbm_bytes"]
    assert row["lossless_tokens_per_s"] == answer["lossless"]["tokens_per_s"]


def test_a_point_without_a_plan_is_a_row_with_its_reason() -> None:
    grid = ("--model", "llama-2-70b", "--gpu", "h200,t4", "--batch", "2", "--prompt", "8", "--output", "4")

    fits, too_large = rows(*grid)
    table = run("whatif", *grid).out

    assert (fits["feasible"], too_large["feasible"]) == (True, False)
    assert "on t4 does not fit: host memory is" in str(too_large["reason"])
    assert {too_large[name] for name in FIGURES[2:]} == {None}
    assert "no plan fits: host" in table


def test_csv_has_the_same_rows_and_is_whole_or_absent(tmp_path: Path) -> None:
    file = tmp_path / "grid [1].csv"

    said = run("whatif", *GRID, "--hbm-gib", "0.2,8", "--csv", str(file), "--json")

    answer = json.loads(said.out)
    read = list(csv.DictReader(StringIO(file.read_text())))
    assert [path.name for path in tmp_path.iterdir()] == ["grid [1].csv"]
    assert list(read[0]) == list(answer[0])
    for cells, row in zip(read, answer, strict=True):
        assert cells["gpu"] == row["gpu"]
        assert cells["feasible"] == str(row["feasible"]).lower()
        assert cells["tokens_per_s"] == ("" if row["tokens_per_s"] is None else repr(row["tokens_per_s"]))


def test_lossless_holds_for_every_point() -> None:
    assert all(row["is_lossless"] is True and row["lossless"] is True for row in rows(*GRID, "--lossless"))


def test_commas_and_repeated_options_mean_the_same() -> None:
    assert rows(*QUICK, "--batch", "2,3") == rows(*QUICK, "--batch", "2", "--batch", "3")


@pytest.mark.parametrize(
    "words, part",
    [
        (("--batch", "4,x"), "--batch=x, must be a whole number"),
        (("--batch", "4,"), "--batch='', must be a whole number"),
        (("--gpu", "l4,nope"), "gpu='nope', not in the catalogue"),
        (("--kv-formats", "int8+int3"), "--kv-formats=int3, must be one of"),
        (("--kv-formats", "int8+"), "--kv-formats='', must be one of"),
        (("--gpu", "a100-40g", "--kv-formats", "fp8"), "kv_format=fp8, a100-40g has no fp8 arithmetic"),
        (("--sparsity", "0,1"), "--sparsity=1, must lie in [0, 1)"),
        (("--lossless", "--sparsity", "0.5"), "--lossless forbids that"),
        (("--jobs", "0"), "--jobs=0, must be a whole number from 1 to"),
        (
            ("--batch", ",".join(map(str, range(1, 1001))), "--prompt", ",".join(map(str, range(1, 201)))),
            "200,000 points",
        ),
        (("--bacth", "2"), "no such option"),
    ],
)
def test_bad_values_are_refused_in_one_line(words: tuple[str, ...], part: str) -> None:
    said = run("whatif", "--model", "opt-125m", "--output", "4", *words)

    assert said.code == BAD_INPUT
    assert part in said.error


def test_a_file_that_cannot_be_written_is_refused_before_solving(tmp_path: Path) -> None:
    with unchanged(tmp_path):
        said = run("whatif", *GRID, "--csv", str(tmp_path / "missing" / "grid.csv"))

    assert said.code == BAD_INPUT
    assert "does not exist: create it first" in said.error


def test_processes_print_nothing_of_their_own() -> None:
    several = ",".join(map(str, range(40, 70)))  # enough for other processes to be started
    grid = ("--batch", "16,24", "--output", several, "--lossless", "--concurrency", "all", "--hbm-gib", "26")

    said = run_cold("whatif", *grid, "--jobs", "2", "--json")

    assert (said.code, said.err) == (0, "")
    assert len(json.loads(said.out)) == 60


def test_many_fields_and_long_reasons_stay_within_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("gpu", "model", "batch", "prompt", "output", "link_gb_s", "host_gib", "kv_formats")
    long = ("h100-80g-sxm", "llama-3.1-405b", "1024", "128000", "16384", "450.5", "1024", ("int8", "int4"))
    other = ("l4", "opt-125m", "1", "8", "6", "12", "64", ("native",))
    refusal = Refusal(reason="prompt + output - 1 = 144383 tokens, must fit llama-3.1-405b's context of 131072")
    short = Shortage(blame=Blame.KV, blamed_bytes=1, tier=Tier.HBM, step=0, missing_bytes=3 * 2**30)
    late = Shortage(blame=Blame.LATENCY, blamed_bytes=0, tier=None, step=None, missing_bytes=0)
    outcomes = ((long, refusal), (other, Refusal(reason="", shortage=short)), (long, Refusal(reason="", shortage=late)))
    points = [
        Point(values=tuple(zip(names, texts, strict=True)), question=Question(), outcome=outcome)
        for texts, outcome in outcomes
    ]

    show(grid_table(points))

    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= terminal.COLUMNS
    assert "…" not in out
    words = " ".join(out.split())
    for part in ("l4, opt-125m, batch 1,", "no plan fits:", "too slow"):
        assert part in words


def test_one_token_has_no_time_between_tokens() -> None:
    (row,) = rows("--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "1")

    assert row["tpot_s"] is None
    assert " - " in run("whatif", "--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "1").out


def test_csv_writes_what_a_spreadsheet_reads() -> None:
    figures = Figures(
        tokens_per_s=1.5,
        makespan_s=2.0,
        ttft_s=0.5,
        tpot_s=None,
        peak_hbm_bytes=7,
        peak_host_bytes=0,
        plan="2 at once, dense, native",
        is_lossless=True,
        lossless_tokens_per_s=1.5,
        gap=0.0,
        profile="nominal-l4",
    )
    text = csv_text([Point(values=(("batch", "2"),), question=Question(), outcome=figures)])

    assert text.splitlines() == [
        f"batch,{','.join(FIGURES)}",
        '2,true,,1.5,2.0,0.5,,7,0,"2 at once, dense, native",true,1.5,0.0,nominal-l4',
    ]


# Progress


def test_a_long_grid_shows_a_bar_if_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.counting("solving") as on_done:
        on_done(1, 3)
        time.sleep(0.05)
        on_done(2, 3)
        time.sleep(0.2)

    captured = capsys.readouterr()
    assert "solving" in captured.err
    assert "2/3" in captured.err
    assert captured.out == ""


def test_nobody_watching_sees_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.0)
    with progress.counting("solving") as on_done:
        on_done(1, 2)

    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
def test_an_interrupt_ends_quietly() -> None:
    grid = ("--batch", "32", "--output", ",".join(map(str, range(100, 1100))), "--lossless", "--jobs", "2")
    running = subprocess.Popen(
        [sys.executable, "-m", "planner", "whatif", *grid],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while running.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)

    assert (running.returncode, out, err) == (INTERRUPTED, b"", b"")

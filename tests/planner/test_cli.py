"""``planner`` as its users and other programs meet it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

import planner.solve as solver
from builders import make_setting, newest_in_hbm
from commandline import ROOT, Said, run, run_cold, unchanged
from planner import terminal
from planner.cli import COMMANDS
from planner.solution import Infeasible
from sim import catalogue
from sim.files import load_plan, plan_to_json

QUICK = ("--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "6")
# What other programs read, with the type that each must have.
ANSWER_KEYS = {
    "schema_version": int,
    "machine.name": str,
    "model.name": str,
    "workload.batch": int,
    "workload.prompt_tokens": int,
    "workload.output_tokens": int,
    "dtype": str,
    "concurrency": int,
    "attention.selector": str,
    "attention.sparsity": float,
    "attention.local_fraction": float,
    "kv_format.gpu": str,
    "kv_format.host": str,
    "placement": str,
    "phases": list,
    "predicted.makespan_s": float,
    "predicted.tokens_per_s": float,
    "predicted.ttft_s": float,
    "predicted.tpot_s": float,
    "predicted.peak_hbm_bytes": int,
    "predicted.peak_host_bytes": int,
    "solver.name": str,
    "solver.status": str,
    "solver.objective_s": float,
    "solver.bound_s": float,
    "solver.gap": float,
    "solver.solve_s": float,
    "lossless.tokens_per_s": float,
    "provenance.kvplan_version": str,
    "provenance.command": str,
    "provenance.date": str,
    "provenance.profile.name": str,
    "provenance.profile.basis": str,
    "provenance.sources.gpu": str,
    "provenance.sources.host": str,
    "provenance.sources.model": str,
}
SIMULATED_KEYS = ["makespan_s", "tokens_per_s", "ttft_s", "tpot_s", "peak_hbm_bytes", "peak_host_bytes", "h2d_bytes"]
HEAVY = ("torch", "pandas", "plotly", "scipy", "simpy", "joblib", "hypothesis", "pytest")


def at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[key]
    return data


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A plan written by hand: five sequences in waves of two, KV on the host."""
    file = tmp_path / "plan.json"
    plan = newest_in_hbm(make_setting(batch=5, prompt=4, output=6, concurrency=2), slots=3)
    file.write_text(json.dumps(plan_to_json(plan)))
    return file


# Help


def test_help_shows_every_command_and_how_to_begin() -> None:
    said = run("--help")

    assert said.code == 0
    for name, entry in COMMANDS.items():
        assert f" {name} " in said.out
        assert entry.help in said.out
    assert "planner solve --gpu l4" in said.out
    assert run().out == run("-h").out == said.out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    said = run(name, "--help")

    assert (said.code, said.err) == (0, "")
    assert f"Usage: planner {name} " in said.out
    assert "--json" in said.out


def test_the_help_of_solve_gives_units_defaults_and_examples() -> None:
    words = " ".join(run("solve", "--help").out.replace("│", " ").split())

    for part in ("[default: a100-40g]", "HBM in GiB", "GB/s in each direction", "Examples", "[default: (0.8)]"):
        assert part in words


def test_help_loads_no_command_and_solve_only_what_it_needs() -> None:
    script = "import sys; from planner.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"

    helped = run_cold("--help", code=("-c", script)).err.split()
    solved = run_cold("solve", *QUICK, code=("-c", script)).err.split()

    assert {"numpy", "pydantic", "planner.commands", "sim"}.isdisjoint(helped)
    assert "planner.commands.solve" in solved
    assert {*HEAVY, "planner.commands.simulate"}.isdisjoint(solved)


def test_version() -> None:
    said = run("--version")

    assert said.code == 0
    assert said.out.startswith("planner (kvplan) ")


# solve (with the real solver)


def test_solve_answers_with_no_option_and_keeps_every_promised_key() -> None:
    said = run("solve", "--json")
    answer = json.loads(said.out)

    assert (said.code, said.err) == (0, "")
    for path, kind in ANSWER_KEYS.items():
        assert isinstance(at(answer, path), kind), path
    assert (answer["machine"]["name"], answer["model"]["name"]) == ("a100-40g", "opt-13b")
    assert answer["workload"] == {"batch": 64, "prompt_tokens": 128, "output_tokens": 512}
    assert all(set(phase) == {"name", "first_step"} for phase in answer["phases"])
    assert answer["attention"]["sparsity"] <= 0.8
    assert answer["predicted"]["tokens_per_s"] >= answer["lossless"]["tokens_per_s"]
    assert answer["solver"]["bound_s"] <= answer["solver"]["objective_s"]


def test_json_is_all_that_reaches_stdout() -> None:
    said = run_cold("solve", "--json")  # a program of its own: solvers write past sys.stdout

    assert json.loads(said.out)["schema_version"] == 1
    assert (said.code, said.err) == (0, "")


def test_the_summary_says_what_issue_and_reader_need() -> None:
    said = run("solve", "--gpu", "a100-40g")

    assert (said.code, said.err) == (0, "")
    for part in (
        "opt-13b (fp16) on a100-40g",
        "64 sequences of 128 + 512 tokens",
        "best lossless plan",
        "tokens/s",
        "time to first token",
        "time per output token",
        "80 % sparsity changes the output",
        "limited by",
        "HBM",
        "host memory",
        "optimal",
        "profile nominal-a100-40g",
    ):
        assert part in said.out
    assert max(map(len, said.out.splitlines())) <= 100


def test_the_saved_answer_is_what_json_prints_and_loads_as_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan [1].json"

    said = run("solve", *QUICK, "--json", "-o", str(file))
    summed_up = run("solve", *QUICK, "-o", str(file))

    answer = json.loads(said.out)
    assert plan_to_json(load_plan(file)) == {key: answer[key] for key in plan_to_json(load_plan(file))}
    assert summed_up.out.startswith("opt-125m (fp16) on a100-40g")
    assert [path.name for path in tmp_path.iterdir()] == ["plan [1].json"]


def test_what_is_simulated_is_what_was_predicted(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned = ("--batch", "48", "--prompt", "64", "--output", "40", "--hbm-gib", "32", "--selector", "pages")
    predicted = json.loads(run("solve", *planned, "--json", "-o", str(file)).out)["predicted"]

    simulated = json.loads(run("simulate", str(file), "--json").out)

    assert {*SIMULATED_KEYS, "d2h_bytes"} <= set(simulated)
    assert {"gpu", "h2d", "d2h"} <= set(simulated["utilisation"])
    for key in ("makespan_s", "tokens_per_s", "ttft_s", "tpot_s"):
        assert simulated[key] == pytest.approx(predicted[key], rel=1e-9)
    for key in ("peak_hbm_bytes", "peak_host_bytes"):
        assert simulated[key] == pytest.approx(predicted[key], abs=2)


def test_the_recorded_command_line_gives_the_same_plan_again() -> None:
    first = json.loads(run("solve", *QUICK, "--host-gib", "64", "--lossless", "--json").out)
    program, *words = shlex.split(first["provenance"]["command"])

    second = json.loads(run(*words, "--json").out)

    assert program == "planner"
    for answer in (first, second):
        answer["provenance"].pop("date")
        answer["solver"].pop("solve_s")
    assert second == first


def test_overrides_are_kept_with_the_machine() -> None:
    answer = json.loads(run("solve", *QUICK, "--hbm-gib", "8", "--link-gb-s", "10", "--json").out)

    assert answer["machine"]["name"] == "a100-40g"
    assert answer["machine"]["overrides"] == ["hbm_gib=8", "link_gb_s=10"]
    assert answer["machine"]["gpu"]["hbm_bytes"] == 8 * 2**30


def test_a_lossless_answer_names_itself_as_the_lossless_plan() -> None:
    answer = json.loads(run("solve", *QUICK, "--lossless", "--json").out)

    assert answer["attention"]["selector"] == "dense"
    assert answer["lossless"]["is_this_plan"] is True
    assert answer["lossless"]["tokens_per_s"] == answer["predicted"]["tokens_per_s"]


def test_a_model_folder_with_a_strange_name_is_planned_for(tmp_path: Path) -> None:
    folder = tmp_path / "[red]modèle[bold] 模型"
    folder.mkdir()
    config = {"model_type": "opt", "num_hidden_layers": 2, "hidden_size": 64, "ffn_dim": 256, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500, "max_position_embeddings": 64}))

    said = run("solve", "--model", str(folder), "--batch", "1", "--prompt", "4", "--output", "3")

    assert said.code == 0
    assert said.out.startswith("[red]modèle[bold] 模型 (fp16) on a100-40g")


def test_infeasible_has_an_exit_code_of_its_own_and_leaves_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text("old")

    with unchanged(tmp_path):
        said = run("solve", "--hbm-gib", "0.5", "-o", str(file))

    assert said.code == terminal.INFEASIBLE
    assert said.error


# simulate


def test_simulate_reports_for_people_and_writes_a_trace(plan_file: Path, tmp_path: Path) -> None:
    said = run("simulate", str(plan_file), "--trace", str(tmp_path / "run.json"))

    assert (said.code, said.err) == (0, "")
    assert "5 sequences of 4 + 6 tokens" in said.out
    assert "while busy" in said.out
    trace = json.loads((tmp_path / "run.json").read_text())
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X", "C"}
    assert {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"} >= {"fetch", "write", "head"}


def test_a_plan_that_does_not_fit_its_machine_is_infeasible(plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text())
    plan["kv_budget_bytes"] = 10
    plan_file.write_text(json.dumps(plan))

    said = run("simulate", str(plan_file))

    assert said.code == terminal.INFEASIBLE
    assert "hbm overflows at step 0" in said.error


def test_simulate_says_where_a_plan_was_solved_with_another_profile(plan_file: Path, tmp_path: Path) -> None:
    data = json.loads(plan_file.read_text())
    names = {"same": f"nominal-{data['machine']['name']}", "other": "somebody's\x1b own"}
    for file, name in names.items():
        told = data | {"provenance": {"profile": {"name": name}}}
        (tmp_path / file).write_text(json.dumps(told))

    said = {file: run("simulate", str(tmp_path / file)) for file in names}

    assert "solved with another profile" not in said["same"].out + run("simulate", str(plan_file)).out
    assert "solved with another profile, somebody's\\x1b own: its own prediction differs" in said["other"].out
    assert [one.code for one in said.values()] == [0, 0]


def test_simulate_refuses_a_missing_plan_file() -> None:
    said = run("simulate")

    assert said.code == terminal.BAD_INPUT
    assert said.error == "missing argument 'PLAN' (see `planner simulate --help`)"


# catalogues


@pytest.mark.parametrize("name", ["gpus", "hosts", "models"])
def test_catalogues_list_every_entry_for_people_and_programs(name: str) -> None:
    entries = {"gpus": catalogue.gpus, "hosts": catalogue.hosts, "models": catalogue.models}[name]()

    table = run(name).out.splitlines()
    listed = json.loads(run(name, "--json").out)

    assert [line.split()[0] for line in table if line.split()[0] in {entry.name for entry in entries}] == [
        entry.name for entry in entries
    ]
    assert [entry["name"] for entry in listed] == [entry.name for entry in entries]
    assert all(entry["source"] for entry in listed)
    assert max(map(len, table)) <= 100


def test_tables_have_units_in_their_headings() -> None:
    assert {"GiB", "GB/s", "TFLOP/s", "TOP/s"} <= set(run("gpus").out.split())
    assert {"GiB", "KiB/token", "tokens", "10^9"} <= set(run("models").out.split())


# Errors


@pytest.mark.parametrize(
    "words, parts",
    [
        (("slove",), ("no such command", "slove", "'solve'", "`planner --help`")),
        (("solve", "--gpuu", "l4"), ("no such option", "--gpuu", "`planner solve --help`")),
        (("solve", "--gpu"), ("option '--gpu' requires an argument", "`planner solve --help`")),
        (("solve", "l4"), ("unexpected extra argument", "(l4)", "`planner solve --help`")),
        (("--jsn",), ("no such option", "--jsn", "`planner --help`")),
        (("solve", "--batch", "0"), ("--batch=0, must be a whole number from 1 to 100,000",)),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_where_to_look(
    words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    said = run(*words)

    assert said.code == terminal.BAD_INPUT
    assert all(part in said.error for part in parts), said.error


def test_brackets_and_control_characters_in_names_are_shown_as_they_are_or_escaped() -> None:
    said = run("simulate", "[bold]\x1b[31m\nplan[/bold].json")

    assert said.error == "[bold]\\x1b[31m plan[/bold].json, does not exist: give the path of a JSON file"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (Infeasible("HBM is short\nby 3 GiB"), 3, "error: HBM is short by 3 GiB\n"),
        (
            MemoryError("8 TB for an array"),
            2,
            "error: this machine's memory does not do for it (8 TB for an array): ask for less, fewer sequences or tokens\n",
        ),
        (ValueError("batch=0"), 2, "error: batch=0\n"),
        (OverflowError("too large"), 2, "error: a number is too large (too large): give a smaller one\n"),
        (OSError(28, "No space left on device"), 2, "error: output, No space left on device: name another file\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_cause_ends_in_a_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("planner.solve.solve", fail)

    assert run("solve") == Said(code=code, out="", err=line)


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.solve.solve", lambda _: {}["no such key"])

    with pytest.raises(KeyError):
        run("solve")


def test_development_mode_shows_where_an_error_comes_from() -> None:
    said = run_cold("solve", "--batch", "0", code=("-X", "dev", "-m", "planner"))

    assert "Traceback" in said.err
    assert "ValueError: --batch=0" in said.err


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with (tmp_path / "errors").open("w+") as errors:
        code = subprocess.call([sys.executable, "-m", "planner", "models"], cwd=ROOT, stdout=writer, stderr=errors)
        os.close(writer)
        errors.seek(0)
        assert (code, errors.read()) == (terminal.BROKEN_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_cannot_be_printed_is_an_error(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "planner", "gpus"],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert ended.returncode == terminal.BAD_INPUT
    assert ended.stderr == "error: output, No space left on device: name another file\n"


def test_an_interrupt_ends_quietly(tmp_path: Path) -> None:
    endless = tmp_path / "endless.json"
    os.mkfifo(endless)  # reading it blocks until someone writes
    run = subprocess.Popen(
        [sys.executable, "-m", "planner", "simulate", str(endless)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with endless.open("w"):  # opens once the command reads
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=30)

    assert (run.returncode, out, err) == (terminal.INTERRUPTED, b"", b"")


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    device = tmp_path / "pipe"
    os.mkfifo(device)

    said = run("solve", *QUICK, "-o", str(device))

    assert said.code == terminal.BAD_INPUT
    assert "is not a regular file" in said.error
    assert device.is_fifo()


# Progress


def test_work_of_more_than_two_seconds_shows_that_it_goes_on_if_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.patiently("simulating"):
        time.sleep(0.5)

    captured = capsys.readouterr()
    assert "simulating" in captured.err
    assert captured.out == ""


def test_nobody_watching_sees_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.01)
    with terminal.patiently("simulating"):
        time.sleep(0.1)

    assert capsys.readouterr() == ("", "")


# What is shipped


def test_the_installed_packages_are_the_ones_that_there_are() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.split(".")[0] for name in shipped}

    there = {
        ".".join(file.parent.relative_to(ROOT).parts) for top in tops for file in (ROOT / top).rglob("__init__.py")
    }

    assert set(shipped) == there


def test_the_solver_is_the_real_one() -> None:
    assert solver.__file__ == str(ROOT / "planner" / "solve.py")

"""``planner run`` from a plan file."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim import catalogue
from sim.attention import Selector
from sim.files import load_trace, plan_to_json
from sim.model_config import load_model_config
from sim.plan import Admission, Placement
from sim.spec import DType, ModelSpec, WeightFormat
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.plans import Choice, all_in_hbm, draw_plan, with_budget
from tests.runtime.where import Where

typer = pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")


def write_plan(folder: Path, model: ModelSpec, choice: Choice) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan_to_json(draw_plan(random.Random(0), model, choice))))
    return path


def planner_run(*arguments: object) -> Any:
    from runtime.cli_run import run

    program = typer.Typer()
    program.command()(run)
    return testing.CliRunner().invoke(program, [str(argument) for argument in arguments])


def test_opt_125m_with_random_weights_prints_predicted_beside_measured(tmp_path: Path, where: Where) -> None:
    choice = Choice(selector=Selector.SWA, placement=Placement.RESIDENT, sparsity=0.8, batch=4, prompt=32, output=16)
    plan = write_plan(tmp_path, catalogue.model("opt-125m"), replace(choice, concurrency=4))
    files = ("--trace", tmp_path / "trace.json", "--save-trace", tmp_path / "run.json")
    result = planner_run(plan, "--random-weights", "--device", where.device.type, *files)
    assert result.exit_code == 0, result.output
    assert load_trace(tmp_path / "run.json").output_tokens == 16
    assert "predicted" in result.output
    assert "tokens/s" in result.output
    steps = [
        event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["name"] == "step"
    ]
    assert [event["args"]["step"] for event in steps] == list(range(1, 16))


@pytest.mark.parametrize("weights", [WeightFormat.NATIVE, WeightFormat.INT8])
def test_a_continuous_plan_runs(weights: WeightFormat, tmp_path: Path, where: Where) -> None:
    """By a captured step on a GPU, but not with quantised weights."""
    choice = Choice(batch=3, prompt=8, output=4, admission=Admission.CONTINUOUS, weight_format=weights)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_json(all_in_hbm(catalogue.model("opt-125m"), choice))))
    result = planner_run(path, "--random-weights", "--device", where.device.type, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["generated_tokens"] == 12


def test_a_plan_over_its_budget_ends_in_one_line(tmp_path: Path) -> None:
    plan = with_budget(all_in_hbm(catalogue.model("opt-125m"), Choice(dtype=DType.FP32)), 10)
    (tmp_path / "plan.json").write_text(json.dumps(plan_to_json(plan)))
    command = [sys.executable, "-m", "planner", "run", str(tmp_path / "plan.json"), "--random-weights"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 3
    assert shown.stderr.startswith("error: KV of ")
    assert shown.stderr.count("\n") == 1


def test_a_plan_for_a_folders_config_runs_its_checkpoint(tmp_path: Path, where: Where) -> None:
    save_checkpoint("qwen2", tmp_path)
    plan = write_plan(tmp_path, load_model_config(tmp_path), Choice())
    (tmp_path / "in.jsonl").write_text('{"id": 7, "tokens": [1, 2]}\n')
    options = ("--prompts", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--device", where.device.type)
    result = planner_run(plan, *options)
    assert result.exit_code == 0, result.output
    assert "1 completions, 0 of them from before" in result.output
    assert "8 tokens generated" in result.output
    again = json.loads(planner_run(plan, *options, "--json").output)
    assert (again["generated_tokens"], again["measured"]) == (0, None)
    assert again["predicted"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "is known by its shape only: give --checkpoint DIR or --random-weights"),
        (("--random-weights", "--device", "tpu"), "device=tpu, must be cpu or cuda"),
        (("--random-weights", "--prompts", "in.jsonl"), "--prompts and --output, one is missing"),
        (("--random-weights", "--checkpoint", "x"), "exclude each other"),
        (("--checkpoint", "nowhere"), "checkpoint='nowhere', is no folder"),
        (("--random-weights", "--temperature", "-1"), "temperature=-1.0, must be a finite number of at least 0"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, catalogue.model("opt-125m"), Choice())
    result = planner_run(plan, *arguments)
    assert isinstance(result.exception, ValueError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_host_memory_that_cannot_be_had_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError("9000 bytes of host memory, could not be pinned: error 2")

    monkeypatch.setattr("runtime.execute.execute", refuse)
    plan = write_plan(tmp_path, catalogue.model("opt-125m"), Choice())
    result = planner_run(plan, "--random-weights")
    assert isinstance(result.exception, ValueError)
    assert "could not be pinned: error 2): solve for a smaller batch" in str(result.exception)


def test_weights_that_no_memory_does_for_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.memory.os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10_000}[name])
    plan = write_plan(tmp_path, catalogue.model("opt-125m"), Choice())

    result = planner_run(plan, "--random-weights")

    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith("out of host memory (")
    assert "OPT-125M has" in str(result.exception) or "opt-125m has" in str(result.exception)


def test_the_runtime_imports_neither_solver_nor_engine_nor_figures() -> None:
    modules = "runtime.execute, runtime.job, runtime.models, runtime.recorder"
    code = f"import sys, {modules}; print(sorted({{'pulp', 'simpy', 'plotly', 'typer', 'highspy'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_plan_is_read_before_torch_is_loaded() -> None:
    code = "import sys, runtime.cli_run; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"

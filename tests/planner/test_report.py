"""``planner report`` and ``planner whatif --html``: pages from files, and refusals of one line."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import make_setting, newest_in_hbm
from commandline import run, run_cold
from planner.inputs import Question, question_of
from sim.files import load_plan, load_trace, plan_to_json, save_trace
from sim.measured import load_measured, measurements_file, save_measured
from sim.profile import Estimate, Evidence, Fingerprint, Profile
from sim.profile_files import PROFILE_SCHEMA_VERSION, SHIPPED, load_profile, save_profile
from sim.units import GIB
from sim.verdict import verdict_to_json
from studies import make_verdict

QUICK = ("--model", "opt-125m", "--batch", "4", "--prompt", "8", "--output", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A solved plan and a run of it."""
    folder = tmp_path_factory.mktemp("report")
    assert run("solve", *QUICK, "-o", str(folder / "plan.json")).code == 0
    assert run("simulate", str(folder / "plan.json"), "--save-trace", str(folder / "run.json")).code == 0
    return folder


@pytest.fixture
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("reports", "plotly")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "reports"]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_plan_becomes_a_page(folder: Path) -> None:
    page = folder / "plain.html"
    said = run("report", str(folder / "plan.json"), "-o", str(page), "--json")
    text = page.read_text()

    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == {"file": str(page), "size_bytes": page.stat().st_size}
    assert page.stat().st_size < 6_000_000
    assert "opt-125m on a100-40g" in text
    assert "Against the others" not in text
    assert "Simulated against measured" not in text


def test_a_run_and_the_rivals_are_shown_where_wanted(folder: Path) -> None:
    page = folder / "full.html"
    command = (
        "report",
        str(folder / "plan.json"),
        str(folder / "run.json"),
        "--compare",
        "--steps",
        "1-3",
        "-o",
        str(page),
    )
    said = run(*command)
    text = page.read_text()

    assert said.code == 0
    assert f"{page}: " in said.out
    for words in ("Against the others", "Simulated against measured", "flexgen", "--steps 1-3", '"last_step":3'):
        assert words in text


def test_the_page_says_what_the_answer_says(folder: Path) -> None:
    page = folder / "answer.html"
    run("report", str(folder / "plan.json"), "-o", str(page))
    answer, text = json.loads((folder / "plan.json").read_text()), page.read_text()

    assert f"{answer['predicted']['tokens_per_s']:,.0f} tokens/s" in text
    assert f"{answer['solver']['options']:,} options" in text
    assert answer["provenance"]["command"].split(" --")[0] in text
    assert "one more GiB of HBM" in text
    assert answer["machine"]["gpu"]["source"].split(";")[0].split("&")[0] in text


def test_a_plan_by_hand_has_a_page_without_certificate(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_to_json(newest_in_hbm(make_setting(batch=5, output=6, concurrency=2), slots=3))))

    assert run("report", str(file), "-o", str(tmp_path / "page.html")).code == 0
    assert "has no certificate" in (tmp_path / "page.html").read_text()
    error = run("report", str(file), "--compare", "-o", str(tmp_path / "page.html")).error
    assert error == f"{file}: provenance.command, missing: --compare needs a plan of `planner solve -o`"


def test_a_profile_prices_the_page(folder: Path, tmp_path: Path) -> None:
    plan = load_plan(folder / "plan.json")
    said_by = Estimate(parameter="step_overhead_s", low=0.008, high=0.012, evidence="fitted to 9 steps")
    printed = Fingerprint(
        gpu=plan.setting.machine.gpu.name, device="", cpu="", cores=1, driver="", torch="", clocks="", date=""
    )
    slow = replace(
        Profile.nominal(plan.setting.machine),
        name="slow",
        basis="measured here",
        step_overhead_s=0.01,
        evidence=Evidence(fingerprint=printed, estimates=(said_by,)),
    )
    save_profile(tmp_path / "slow.json", slow)
    page = tmp_path / "page.html"
    said = run(
        "report", str(folder / "plan.json"), "--profile", str(tmp_path / "slow.json"), "--compare", "-o", str(page)
    )

    assert said.code == 0
    assert load_profile(tmp_path / "slow.json") == slow
    assert "95 %: 0.008 to 0.012; fitted to 9 steps" in page.read_text()
    for words in ("Every number rests on profile slow (measured here)", "this version and profile", "--profile"):
        assert words in page.read_text()
    (tmp_path / "slow.json").write_text(
        f'{{"schema_version": {PROFILE_SCHEMA_VERSION}, "name": "x", "basis": "y", "link_efficiency": 2}}'
    )
    error = run("report", str(folder / "plan.json"), "--profile", str(tmp_path / "slow.json"), "-o", str(page)).error
    assert error == f"{tmp_path / 'slow.json'}: profile.link_efficiency=2.0, must lie in [0, 1]"


def test_a_page_from_a_shell_takes_its_time_in_seconds(folder: Path) -> None:
    said = run_cold("report", str(folder / "plan.json"), "-o", str(folder / "cold.html"))

    assert (said.code, said.err) == (0, "")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("missing.json",), "missing.json, does not exist"),
        (("PLAN", "PLAN"), "no trace of schema version 1"),
        (("PLAN", "missing.json"), "missing.json, does not exist"),
        (("PLAN", "--steps", "3-1"), "--steps='3-1', must begin before it ends"),
        (("PLAN", "--steps", "-"), "must be a step or two"),
        (("PLAN", "-o", "no/such/page.html"), "its folder no/such does not exist"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(folder: Path, words: tuple[str, ...], part: str) -> None:
    arguments = [str(folder / "plan.json") if word == "PLAN" else word for word in words]
    said = run("report", *arguments)

    assert said.code == 2
    assert part in said.error


def test_a_run_of_other_work_is_refused(folder: Path, tmp_path: Path) -> None:
    run("solve", *QUICK[:-1], "9", "-o", str(tmp_path / "other.json"))
    said = run("report", str(tmp_path / "other.json"), str(folder / "run.json"))

    assert said.code == 2
    assert said.error == f"{folder / 'run.json'}: 6 output tokens, must be the plan's 9"


@pytest.mark.usefixtures("no_plotly")
def test_without_plotly_the_extra_is_named(folder: Path) -> None:
    for command in (("report", str(folder / "plan.json")), ("whatif", *QUICK, "--html", str(folder / "sweep.html"))):
        said = run(*command)

        assert said.code == 2
        assert said.error == "plotly is not installed, pages are made with it: pip install 'kvplan[reports]'"


def test_a_saved_run_is_read_back_exactly(folder: Path, tmp_path: Path) -> None:
    trace = load_trace(folder / "run.json")
    save_trace(tmp_path / "again.json", trace)

    assert load_trace(tmp_path / "again.json") == trace


def test_a_sweep_becomes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    quick = ("--model", "opt-125m", "--prompt", "8", "--output", "6")
    said = run("whatif", *quick, "--batch", "2,4", "--kv-budget-gib", "1,2", "--html", str(page), "--json")
    text = page.read_text()

    assert said.code == 0
    assert [row["batch"] for row in json.loads(said.out)] == [2, 4, 2, 4]
    for words in ("What if: 4 plans", "KV budget, GiB", "Throughput by KV budget (GiB) and batch", "--batch 2,4"):
        assert words in text
    budgets = drawn(text)["tables"]["pareto-memory"]["columns"][2]
    assert budgets == [GIB, GIB, 2 * GIB, 2 * GIB]


def drawn(page: str) -> Any:
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


@pytest.mark.parametrize(
    "question",
    [
        Question(),
        Question(lossless=True, objective="tpot", concurrency="all"),
        Question(
            selector=("swa", "pages"), kv_formats=("int8", "int4"), sparsity="0.9", hbm_gib="20", max_tpot_ms="50"
        ),
    ],
)
def test_a_question_is_read_back_from_its_command(question: Question) -> None:
    assert question_of(question.command_line).command_line == question.command_line


@pytest.mark.parametrize("command", ["planner gpus", "rm -rf x", "planner solve --nonsense 3"])
def test_other_commands_are_no_questions(command: str) -> None:
    with pytest.raises(ValueError, match=r"^command "):
        question_of(command)


# What a measured profile rests on


@pytest.fixture(scope="module")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for a card that has been measured."""
    file = tmp_path_factory.mktemp("h100") / "plan.json"
    assert run("solve", "--gpu", "h100-80g-sxm", *QUICK, "-o", str(file)).code == 0
    return file


def test_a_measured_profile_shows_its_measurements(h100: Path, tmp_path: Path) -> None:
    page, verdict = tmp_path / "page.html", tmp_path / "verdict.json"
    verdict.write_text(json.dumps(verdict_to_json(make_verdict(), None)))
    assert run("report", str(h100), "--verdict", str(verdict), "-o", str(page)).code == 0
    text = page.read_text()

    for words in ("The profile against its measurements", "fit-products", "fit-copies", "fit-attention", "fit-gathers"):
        assert words in text
    for words in ("Predictions against runs", "campaign-parity", f"--verdict {verdict}"):
        assert words in text
    assert page.stat().st_size < 6_000_000
    assert run("report", str(h100), "--profile", "nominal", "-o", str(page)).code == 0
    assert "The profile against its measurements" not in page.read_text()


def test_a_profile_without_its_measurements_shows_errors_alone(h100: Path, tmp_path: Path) -> None:
    profile, page = tmp_path / "mine.json", tmp_path / "page.html"
    save_profile(profile, load_profile(SHIPPED / "h100-80g-sxm.json"))
    assert run("report", str(h100), "--profile", str(profile), "-o", str(page)).code == 0

    assert "no curve is drawn" in page.read_text()


def test_what_another_machine_gave_is_refused(h100: Path, folder: Path, tmp_path: Path) -> None:
    profile, verdict, page = tmp_path / "mine.json", tmp_path / "verdict.json", str(tmp_path / "page.html")
    shipped = SHIPPED / "h100-80g-sxm.json"
    save_profile(profile, load_profile(shipped))
    raw = load_measured(measurements_file(shipped))
    save_measured(measurements_file(profile), replace(raw, fingerprint=replace(raw.fingerprint, date="2001-01-01")))
    error = run("report", str(h100), "--profile", str(profile), "-o", page).error
    assert error.startswith(f"{measurements_file(profile)}: measured on NVIDIA H100 80GB HBM3, 2001-01-01, ")

    verdict.write_text(json.dumps(verdict_to_json(make_verdict(), None)))
    error = run("report", str(folder / "plan.json"), "--verdict", str(verdict), "-o", page).error
    assert error == (
        f"{verdict}: plans were run on h100-80g-sxm, this plan is for a100-40g: give a verdict on a100-40g"
    )
    assert run("report", str(h100), "--verdict", str(h100), "-o", page).error.startswith(f"{h100}.")

"""``--profile``: which constants an answer rests on, and that it says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from builders import make_machine
from commandline import run
from sim import catalogue, profile_files
from sim.profile import Evidence, Fingerprint, Profile
from sim.profile_files import save_profile
from sim.spec import MachineSpec

QUICK = ("--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "6")


def measured(gpu: str, machine: MachineSpec | None = None) -> Profile:
    fingerprint = Fingerprint(
        gpu=gpu, device=gpu, cpu="cpu", cores=2, driver="1", torch="2", clocks="-", date="2026-11-25"
    )
    return Profile(
        name=f"measured-{gpu}",
        basis=f"measured on {gpu}, 2026-11-25",
        evidence=Evidence(fingerprint=fingerprint, machine=machine),
        step_overhead_s=1.0,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_profile(tmp_path / "l4.json", measured("l4"))
    return tmp_path / "l4.json"


def test_an_answer_rests_on_the_profile_it_names(file: Path) -> None:
    answer = json.loads(run("solve", "--gpu", "l4", "--profile", str(file), *QUICK, "--json").out)

    assert answer["provenance"]["profile"] == {"name": "measured-l4", "basis": "measured on l4, 2026-11-25"}
    assert answer["predicted"]["makespan_s"] > 6
    assert f"--profile {file}" in answer["provenance"]["command"]
    assert "measured-l4: measured on l4, 2026-11-25" in run("solve", "--gpu", "l4", "--profile", str(file), *QUICK).out


def test_simulate_and_compare_and_whatif_take_one(file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("solve", "--gpu", "l4", *QUICK, "-o", str(plan)).code == 0

    simulated = json.loads(run("simulate", str(plan), "--profile", str(file), "--json").out)
    nominal = json.loads(run("simulate", str(plan), "--profile", "nominal", "--json").out)
    compared = json.loads(run("compare", "--gpu", "l4", "--profile", str(file), *QUICK, "--json").out)
    points = json.loads(run("whatif", "--gpu", "l4", "--profile", f"{file},nominal", *QUICK, "--json").out)

    assert simulated["makespan_s"] > 6 > nominal["makespan_s"]
    assert all(row["predicted"]["makespan_s"] > 6 for row in compared if row.get("predicted"))
    assert len(points) == 2


def test_another_cards_profile_is_refused_in_one_line(file: Path) -> None:
    assert run("solve", "--gpu", "a10", "--profile", str(file), *QUICK).error == (
        f"{file}: measured on l4, the machine asked about is a10: give --gpu l4, or another profile"
    )
    assert run("solve", "--profile", "", *QUICK).error.startswith("--profile='', must be nominal or the path")
    assert run("solve", "--profile", str(file.parent / "none.json"), *QUICK).error.endswith(
        "give the path of a JSON file"
    )


def test_a_shipped_profile_is_taken_unless_nominal_is_asked_for(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(profile_files, "SHIPPED", file.parent)

    assert "profile measured-l4: measured on l4" in run("solve", "--gpu", "l4", *QUICK).out
    assert "profile nominal-l4: nominal" in run("solve", "--gpu", "l4", "--profile", "nominal", *QUICK).out
    assert "profile nominal-a10: nominal" in run("solve", "--gpu", "a10", *QUICK).out


def test_a_profile_may_describe_a_machine_of_its_own(tmp_path: Path) -> None:
    card = catalogue.gpu("l4")
    machine = replace(make_machine(), name="cpu-2-cores", gpu=replace(card, name="cpu-2-cores"), host=catalogue.host())
    file = tmp_path / "cpu.json"
    save_profile(file, measured("cpu-2-cores", machine))

    answer = json.loads(run("solve", "--gpu", "cpu-2-cores", "--profile", str(file), *QUICK, "--json").out)

    assert answer["machine"]["gpu"]["name"] == "cpu-2-cores"
    assert run("solve", "--profile", str(file), *QUICK).error.endswith("give --gpu cpu-2-cores, or another profile")

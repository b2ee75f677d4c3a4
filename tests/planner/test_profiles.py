"""``--profile``: which constants an answer rests on, and that it says so."""

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from builders import make_homes, make_machine, make_setting
from commandline import run
from sim import catalogue, profile_files
from sim.attention import Selector
from sim.files import plan_to_json
from sim.plan import Placement, Plan
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
    assert all(row["makespan_s"] > 6 for row in compared if row["feasible"])
    assert [point["profile"] for point in points] == ["measured-l4", "nominal-l4"]
    assert "profile measured-l4: measured on l4" in run("compare", "--gpu", "l4", "--profile", str(file), *QUICK).out
    assert "profiles: nominal-l4" in run("whatif", "--gpu", "l4", "--batch", "1,2", *QUICK[:2], *QUICK[4:]).out


def test_another_cards_profile_is_refused_in_one_line(file: Path) -> None:
    assert run("solve", "--gpu", "a10", "--profile", str(file), *QUICK).error == (
        f"{file}: measured on l4, the machine asked about is a10: give another profile, or ask about l4"
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
    assert run("solve", "--profile", str(file), *QUICK).error.endswith("give another profile, or ask about cpu-2-cores")


def test_a_plan_is_stressed_by_an_assumed_turnover(tmp_path: Path) -> None:
    setting = make_setting(Selector.PAGES, batch=2, prompt=64, output=8, sparsity=0.5, placement=Placement.RESIDENT)
    counts = setting.token_counts
    rest = (cached - near - far for cached, near, far in zip(counts.cached, counts.local, counts.selected, strict=True))
    off = list(accumulate(rest, max))
    hbm = [cached - gone for cached, gone in zip(counts.cached, off, strict=True)]
    copies = [max(0, needed - near) for needed, near in zip(setting.slots_needed, hbm, strict=True)]
    homes = make_homes(hbm, host_kv=off, copies=copies)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_to_json(Plan(setting=setting, homes=homes))))

    first, *moved = (
        json.loads(run("simulate", str(file), "--turnover", share, "--json").out)["h2d_bytes"]
        for share in ("0", "0.2", "0.4")
    )

    assert first > 0  # of the first step's picks none has a copy
    assert moved[1] - first == pytest.approx(2 * (moved[0] - first), rel=0.1)
    assert run("simulate", str(file), "--turnover", "2").error.startswith("--turnover=2, must be a number above 0")

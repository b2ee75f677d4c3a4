"""The whole loop on this CPU, tiny: measure, fit, draw, run, simulate, compare; and that each part can be taken up again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from builders import refuses
from calibration import campaign as campaigns
from calibration.bench import begin, cases, measure
from calibration.campaign import Campaign, Drawn, Results, prepare, run_campaign
from calibration.fit import fit
from calibration.machine import device_name, fingerprint_of, name_at
from calibration.runner import Runner
from calibration.verdict import judge
from commandline import run
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.measured import SCHEMA_VERSION as MEASURED_SCHEMA_VERSION
from sim.measured import load_measured, save_measured
from sim.plan import Placement
from sim.predict import RECORDED_ONLY, predictable
from sim.profile import Evidence, Profile
from sim.profile_files import PROFILE_SCHEMA_VERSION, content_hash, load_profile, save_profile
from sim.recipe import Recipe, plan_of
from sim.spec import DType
from sim.verdict import Figures, Stratum, by_stratum
from tests.calibration.tiny import CPU, MODEL, file_of, fingerprint, machine, nothing_yet, scope

TINY = Recipe(model=MODEL, batch=2, prompt=12, output=5, dtype=DType.FP32)
RECIPES = (TINY, replace(TINY, selector=Selector.SWA, keep=40, placement=Placement.RESIDENT, hbm=60, output=6))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = file_of(tmp_path_factory.mktemp("measured"))
    measure(scope(), path, nothing_yet())
    return path


@pytest.fixture
def profile() -> Profile:
    """As if measured: what is tested with it does not depend on how well it fits."""
    evidence = Evidence(fingerprint=fingerprint(), machine=machine())
    return replace(Profile.nominal(machine()), name="tiny", basis="a test", evidence=evidence)


def campaign_of(profile: Profile) -> Campaign:
    return Campaign(
        profile=profile.name,
        profile_hash=content_hash(profile),
        gpu="cpu-test",
        seed=0,
        prepared="2026-11-25",
        plans=tuple(Drawn(stratum=Stratum.LAUNCH, recipe=one.case, predicted_s=0.1) for one in RECIPES),
    )


def run_all(campaign: Campaign, profile: Profile, before: Results | None = None) -> tuple[Results, list[int]]:
    heard = list[int]()
    results = run_campaign(
        campaign,
        profile,
        machine(),
        CPU,
        before or Results(campaign_hash=campaigns.campaign_hash(campaign)),
        lambda results, _: heard.append(len(results.results)),
    )
    return results, heard


def test_measured_fitted_run_and_compared(file: Path) -> None:
    profile = fit(load_measured(file), name="tiny", basis="a test")
    campaign = campaign_of(profile)
    results, heard = run_all(campaign, profile)

    verdict = judge(campaign, results, profile, machine(), on_gpu=False)

    assert heard == [1, 2]
    moved = campaigns.drift(profile, machine(), CPU)
    assert moved is not None
    assert 0.05 < moved < 20
    assert campaigns.drift(replace(profile, evidence=None), machine(), CPU) is None
    assert len(verdict.plans) == 2
    assert verdict.failed == ()
    assert 0 < verdict.median_error < 10  # of a loaded machine; what it is on a quiet one stands with the profile
    assert abs(verdict.plans[0].makespan) == verdict.worst_error
    assert all(one.simulated.makespan_s > 0 < one.measured.makespan_s for one in verdict.plans)
    assert [name for name, _ in by_stratum(verdict.plans)] == ["all", "launch"]
    assert all(one.peak_hbm is None for one in verdict.plans)
    dense, sparse = sorted(verdict.plans, key=lambda one: "swa" in one.recipe)
    assert dense.moved is None
    assert dense.replayed is None
    assert sparse.replayed is not None
    assert sparse.replayed.measured_d2h_bytes > 0
    assert verdict.replays == "replayed selections: bytes of 1 of 1 plans exact"


def test_every_family_that_a_cpu_has_was_measured(file: Path) -> None:
    measured = load_measured(file)

    families = {one.family for one in measured.measurements}
    assert families >= {"dram", "host_attention", "launch", "copy", "gather", "quantise", "dequantise", "product"}
    assert families >= {"attention", "decode", "prefill"}
    priced = {one.family for one, _ in predictable(measured.measurements, machine())}
    assert families - priced == {*RECORDED_ONLY} & families
    assert all(one.low_s <= one.seconds <= one.high_s for one in measured.measurements)
    assert all(one.size_bytes > 0 for one in measured.measurements if one.family in ("copy", "product", "attention"))


def test_measuring_goes_on_where_it_stopped(file: Path, tmp_path: Path) -> None:
    whole = load_measured(file)
    half = replace(whole, measurements=whole.measurements[:-4])
    begun, again = list[str](), tmp_path / "again.json"
    save_measured(again, half)

    resumed = measure(scope(), again, load_measured(again), lambda _, __, what: begun.append(what))

    lacking = {f"{one.family} {one.case}" for one in whole.measurements[-4:] if one.family != "prefill"}
    assert set(begun) == lacking
    assert len(resumed.measurements) == len(whole.measurements)
    assert not [case for case in cases(scope(), Runner(device=CPU)) if not resumed.has(case.family, case.case)]


def test_a_campaign_goes_on_where_it_stopped(profile: Profile, tmp_path: Path) -> None:
    campaign = campaign_of(profile)
    campaigns.save(tmp_path / "c.json", campaign)
    results, _ = run_all(campaign, profile)
    begun = replace(results, results=results.results[:1])
    campaigns.save(campaigns.results_file(tmp_path / "c.json"), begun)

    loaded = campaigns.load_campaign(tmp_path / "c.json")
    before = campaigns.load_results(campaigns.results_file(tmp_path / "c.json"), loaded)
    after, heard = run_all(loaded, profile, before)

    assert loaded == campaign
    with pytest.raises(ValueError, match="not measured at all: run `planner calibrate` first"):
        campaigns.machine_of(replace(profile, evidence=None))
    assert before == begun
    assert heard == [2]
    assert after.results[0] == begun.results[0]


def test_a_campaign_runs_the_profile_it_was_prepared_for(profile: Profile, tmp_path: Path) -> None:
    campaign = campaign_of(profile)
    other = replace(profile, step_overhead_s=1.0)

    with pytest.raises(ValueError, match=r"not the one that the campaign was prepared for \(tiny, sha256:"):
        run_all(campaign, other)
    campaigns.save(tmp_path / "r.json", Results(campaign_hash="sha256:0"))
    with refuses(f"{tmp_path / 'r.json'}: results of another campaign: move the file away, or give that campaign"):
        campaigns.load_results(tmp_path / "r.json", campaign)


def test_plans_that_cannot_run_are_told_apart(profile: Profile) -> None:
    campaign = campaign_of(profile)
    broken = replace(campaign.plans[0], recipe=TINY.case.replace(MODEL, "phi-2/2/80"))
    results, _ = run_all(replace(campaign, plans=(broken,)), profile)

    assert results.results[0].figures is None
    assert "of family phi" in results.results[0].reason
    with pytest.raises(ValueError, match="campaign of 2 plans, none has run: model="):
        judge(campaign, results, profile, machine(), on_gpu=False)


def test_drawing_again_gives_the_same_plans(profile: Profile) -> None:
    slow = replace(profile, kernels_per_layer=3000.0)

    first, second = (prepare(slow, machine(), seed=5, plans=3) for _ in range(2))

    assert first == second != prepare(slow, machine(), seed=6, plans=3)
    assert len({one.recipe for one in first.plans}) == 3
    models = [Recipe.of(one.recipe).model for one in first.plans]
    assert models == sorted(models)
    assert all(campaigns.SHORTEST_S["cpu"] < one.predicted_s < campaigns.LONGEST_S["cpu"] for one in first.plans)


def test_no_plan_is_drawn_that_runs_longer_than_is_asked(profile: Profile) -> None:
    drawn = prepare(profile, machine(), seed=5, plans=3)
    longest_s = max(one.predicted_s for one in drawn.plans)

    shorter = prepare(profile, machine(), seed=5, plans=3, longest_s=longest_s)

    assert max(one.predicted_s for one in shorter.plans) < longest_s
    with pytest.raises(ValueError, match=r"plans=3, only \d+ fit this machine and 0\.001 s: ask for fewer"):
        prepare(profile, machine(), seed=5, plans=3, longest_s=0.001)


def test_measurements_of_another_machine_are_not_gone_on_with(tmp_path: Path) -> None:
    here = replace(nothing_yet(), fingerprint=fingerprint_of(CPU, machine()))
    save_measured(file_of(tmp_path), here)

    assert begin(CPU, file_of(tmp_path)) == here
    for name, cpu in (("NVIDIA H200", here.fingerprint.cpu), ("Another CPU", "Another CPU")):
        save_measured(file_of(tmp_path), replace(here, fingerprint=replace(here.fingerprint, device=name, cpu=cpu)))
        with pytest.raises(ValueError, match=f"measured on {name}, this is .*: name another file by -o"):
            begin(CPU, file_of(tmp_path))


def test_a_profile_of_another_cpu_with_as_many_cores_is_not_of_this_machine(profile: Profile) -> None:
    own = fingerprint_of(CPU, machine())
    card = replace(machine().gpu, name=name_at(CPU))
    evidence = Evidence(fingerprint=own, machine=replace(machine(), gpu=card))
    campaigns.require_here(replace(profile, evidence=evidence), CPU)

    other = replace(evidence, fingerprint=replace(own, device="Another CPU"))
    with pytest.raises(
        ValueError, match=r"profile tiny: measured on Another CPU, this machine is .*: run `planner cal"
    ):
        campaigns.require_here(replace(profile, evidence=other), CPU)


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "MemoryError"), (RuntimeError("first\nsecond"), "first")]
)
def test_a_plan_that_cannot_be_run_is_a_result_with_a_reason(
    error: Exception, reason: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("calibration.campaign.measured_figures", fail)

    results, _ = run_all(campaign_of(profile), profile)

    assert [(one.figures, one.reason) for one in results.results] == [(None, reason)] * len(RECIPES)
    assert {one.device for one in results.results} == {device_name(CPU)}


def test_a_campaign_ends_where_the_device_no_longer_answers_and_goes_on_behind_the_plan_that_did_it(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    told, campaign = list[Results](), campaign_of(profile)
    nothing = Results(campaign_hash=campaigns.campaign_hash(campaign))
    monkeypatch.setattr(campaigns, "measured_figures", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(campaigns, "Runner", lambda **_: None)
    monkeypatch.setattr(campaigns, "device_name", lambda _: "a card")
    card = torch.device("cuda")

    with pytest.raises(
        ValueError, match=r"cuda no longer answers \(an illegal memory access .*: run the same command again"
    ):
        run_campaign(campaign, profile, machine(), card, nothing, lambda results, _: told.append(results))

    assert [len(results.results) for results in told] == [1]
    with pytest.raises(ValueError, match="no longer answers"):
        run_campaign(campaign, profile, machine(), card, told[0], lambda results, _: told.append(results))
    assert [one.recipe for one in told[1].results] == [one.recipe for one in campaign.plans]


def test_a_campaign_is_not_written_over_one_that_has_results(profile: Profile, tmp_path: Path) -> None:
    saved, file = tmp_path / "tiny.json", tmp_path / "c.json"
    save_profile(saved, profile)
    campaigns.save(file, campaign_of(profile))
    before = file.read_text()
    campaigns.results_file(file).write_text("what was measured")

    error = run("validate", str(saved), "--prepare", str(file)).error

    assert error == f"{file}, c.results.json beside it has results of what it was: name another file"
    assert file.read_text() == before


@pytest.mark.parametrize("more", ["--device cpu", "--quick", "--measure-only", "--checkpoint x --prompts y"])
def test_what_is_fitted_again_is_not_measured(more: str) -> None:
    error = run("calibrate", "--from", "x.json", *more.split()).error

    assert error == f"--from and {more.split()[0]}, exclude each other: --from measures nothing"


def test_the_command_line_says_what_is_wrong(profile: Profile, tmp_path: Path) -> None:
    saved = tmp_path / "tiny.json"
    save_profile(saved, profile)

    campaigns.save(tmp_path / "c.json", campaign_of(profile))
    assert (
        "profile tiny: measured on cpu-test, this machine is cpu-"
        in run("validate", str(saved), "--campaign", str(tmp_path / "c.json")).error
    )
    assert run("validate", str(saved), "--plans", "0").error == "--plans=0, must be at least 1"
    assert run("validate", str(saved), "--prepare", "a", "--campaign", "b").error.startswith("--prepare and --campaign")
    assert run("validate", str(saved), "--longest", "0").error == "--longest=0, must be above 0 seconds"
    assert run("validate", str(saved), "--longest", "2", "--campaign", "b").error.startswith(
        "--longest, is of plans to"
    )
    assert run("calibrate", "--device", "tpu", "-o", str(tmp_path / "x.json")).error.startswith("--device=tpu, must be")
    assert "--checkpoint and --prompts" in run("calibrate", "--checkpoint", "x").error
    assert run("calibrate", "--from", str(saved)).error.startswith(
        f"{saved}: schema_version={PROFILE_SCHEMA_VERSION}, must be {MEASURED_SCHEMA_VERSION}"
    )
    if not torch.cuda.is_available():
        assert "torch finds no GPU here" in run("validate", str(saved), "--device", "cuda").error


def test_raw_measurements_are_fitted_by_themselves(file: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "fitted.json", load_measured(file)
    copies = tuple(one for one in whole.measurements if one.family in ("copy", "gather"))
    file = file_of(tmp_path)
    save_measured(file, replace(whole, measurements=copies))

    said = run("calibrate", "--from", str(file), "-o", str(out), "--compare", str(file))
    assert said.code == 0
    assert "Repeatability" in said.out
    assert not out.exists()

    said = run("calibrate", "--from", str(file), "-o", str(out))
    assert said.code == 0
    assert "Fit, by kernel family" in said.out
    assert load_profile(out).basis.startswith("measured on test, 2026-11-25")
    assert json.loads(out.read_text())["evidence"]["machine"]["name"] == "cpu-test"


def test_a_campaign_is_prepared_and_judged_anywhere(profile: Profile, tmp_path: Path) -> None:
    saved, file = tmp_path / "tiny.json", tmp_path / "c.json"
    save_profile(saved, replace(profile, kernels_per_layer=3000.0))
    said = run("validate", str(saved), "--plans", "3", "--seed", "4", "--prepare", str(file))
    assert said.code == 0
    assert said.out.startswith(f"{file}: 3 plans of seed 4 for sha256:")
    drawn, slow = campaigns.load_campaign(file), load_profile(saved)
    results = [
        campaigns.Result(
            recipe=one.recipe,
            figures=Figures.of(simulate(plan_of(Recipe.of(one.recipe), machine(), slow), cost_of(slow))),
            reason="",
            date="2026-11-25",
            device="test",
        )
        for one in drawn.plans
    ]
    whole = Results(campaign_hash=campaigns.campaign_hash(drawn), results=tuple(results))
    campaigns.save(campaigns.results_file(file), whole)

    said = run("validate", str(saved), "--campaign", str(file))

    assert said.code == 0
    assert "makespan: median error 0.0%, worst 0.0%, 3 plans of seed 4, profile tiny" in said.out.replace("\n", " ")


def cost_of(profile: Profile) -> CostModel:
    return CostModel(machine=machine(), profile=profile)

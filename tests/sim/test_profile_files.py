"""Profile files: exactly what was measured, or one line that says why not and what to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from builders import make_machine, refuses
from sim import profile_files
from sim.access import AccessProfile
from sim.attention import Selector
from sim.profile import Estimate, Evidence, FamilyError, Fingerprint, MeasuredProduct, Measurement, Profile
from sim.profile_files import PROFILE_SCHEMA_VERSION, content_hash, load_profile, profile_for, save_profile
from sim.spec import DType

AGAIN = "run `planner calibrate -o FILE` on the machine"
WINDOW = AccessProfile(
    selector=Selector.SWA,
    keep_shares=(0.2,),
    turnovers=(0.01,),
    perplexity_ratios=(1.0,),
    source="of model[1 2], [3, 4]",
)


def measured(gpu: str = "card") -> Profile:
    fingerprint = Fingerprint(
        gpu=gpu, device="Card 9000", cpu="cpu", cores=2, driver="1", torch="2", clocks="-", date="2026-11-25"
    )
    evidence = Evidence(
        fingerprint=fingerprint,
        machine=make_machine(),
        estimates=(
            Estimate(parameter="copy_setup_s", low=1e-6, high=3e-6, evidence="8 copies"),
            Estimate(parameter="gather_setup_s", low=None, high=None, evidence="nothing measured depends on it"),
        ),
        errors=(FamilyError(family="copy", measurements=8, median=0.01, worst=0.1, worst_case="bytes=1"),),
        access=(WINDOW,),
    )
    product = MeasuredProduct(inputs=16, outputs=48, dtype=DType.BF16, rows=(1, 64), seconds=(0.1 + 0.2, 1e-5))
    basis = "measured on Card 9000, 2026-11-25"
    return Profile(name="mine", basis=basis, copy_setup_s=2e-6, products=(product,), evidence=evidence)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    save_profile(path, measured())
    return path


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_profile_comes_back_whole(file: Path) -> None:
    profile = load_profile(file)

    assert profile == measured()
    assert profile.evidence == measured().evidence
    assert content_hash(profile) == content_hash(measured()) == json.loads(file.read_text())["content_hash"]


def test_a_whole_number_counts_as_it_is_read(tmp_path: Path) -> None:
    save_profile(tmp_path / "p.json", replace(measured(), reserve_bytes=2**30, kernels_per_layer=3))

    assert load_profile(tmp_path / "p.json").kernels_per_layer == 3.0


def test_a_key_that_came_later_leaves_the_hash_of_what_lacks_it(tmp_path: Path) -> None:
    """A measurement without peak_bytes, as files of before have it, is one of which nobody asked that."""
    asked = Measurement(family="decode", case="x", seconds=1.0, low_s=1.0, high_s=1.0, samples=1, peak_bytes=5)
    profile = measured()
    assert profile.evidence
    with_peak, without = (
        replace(profile, evidence=replace(profile.evidence, reference=replace(asked, peak_bytes=peak_bytes)))
        for peak_bytes in (5, 0)
    )
    save_profile(tmp_path / "p.json", without)
    older = json.loads((tmp_path / "p.json").read_text())
    del older["evidence"]["reference"]["peak_bytes"]
    (tmp_path / "p.json").write_text(json.dumps(older))

    assert load_profile(tmp_path / "p.json") == without
    assert content_hash(with_peak) != content_hash(without)


def test_an_older_schema_is_refused(file: Path) -> None:
    rewrite(file, schema_version=1)

    with refuses(f"{file}: schema_version=1, an older profile, must be {PROFILE_SCHEMA_VERSION}: {AGAIN}"):
        load_profile(file)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")

    with refuses(f"{tmp_path / 'x.json'}: schema_version=None, no profile, must be {PROFILE_SCHEMA_VERSION}: {AGAIN}"):
        load_profile(tmp_path / "x.json")


def test_a_constant_changed_by_hand_is_refused(file: Path) -> None:
    rewrite(file, copy_setup_s=1e-6)

    with refuses(f"{file}: altered since it was written (its content_hash differs): {AGAIN}"):
        load_profile(file)


def test_a_product_changed_by_hand_is_refused(file: Path) -> None:
    (product,) = json.loads(file.read_text())["products"]
    rewrite(file, products=[product | {"seconds": [0.3, 1e-5]}])

    with refuses(f"{file}: altered since it was written (its content_hash differs): {AGAIN}"):
        load_profile(file)


def test_half_a_file_is_refused(file: Path) -> None:
    file.write_text(file.read_text()[:200])

    with pytest.raises(ValueError, match="is not complete JSON"):
        load_profile(file)


def test_another_card_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "h200.json"
    save_profile(file, measured("h200"))

    with refuses(f"{file}: measured on h200, the machine asked about is card: give another profile, or ask about h200"):
        profile_for(make_machine(), file)


def test_a_card_that_was_measured_has_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_files, "SHIPPED", tmp_path)
    machine = make_machine()
    assert profile_for(machine) == Profile.nominal(machine)

    save_profile(tmp_path / "card.json", measured())

    assert profile_for(machine) == measured()
    assert profile_for(machine).access(Selector.SWA) == WINDOW
    assert profile_for(machine).access(Selector.H2O).source.startswith("91M-parameter")


def test_a_measurement_names_its_case() -> None:
    took = Measurement(family="copy", case="to=gpu bytes=4096", seconds=1e-5, low_s=9e-6, high_s=2e-5, samples=5)

    assert (took.text("to"), took.number("bytes")) == ("gpu", 4096)
    with refuses("measurement copy.seconds=0.0, must be a finite number above 0"):
        replace(took, seconds=0.0)

"""The profiles that are shipped: each loads, is of the card its file is named after, and has its raw measurements beside it."""

import json
from pathlib import Path

import pytest

from commandline import run
from sim import catalogue
from sim.measured import load_measured
from sim.predict import predictable
from sim.profile_files import SHIPPED, load_profile, shipped_file

FILES = sorted(path for path in SHIPPED.glob("*.json") if not path.name.endswith(".measurements.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_shipped_profile_can_be_made_again(file: Path) -> None:
    profile, raw = load_profile(file), load_measured(file.with_suffix(".measurements.json"))

    assert profile.evidence
    assert profile.evidence.fingerprint == raw.fingerprint
    assert profile.evidence.fingerprint.gpu == file.stem
    assert profile.evidence.machine or catalogue.gpu(file.stem)
    assert sum(one.measurements for one in profile.evidence.errors) == len(predictable(raw.measurements, raw.machine))
    assert file.stat().st_size + file.with_suffix(".measurements.json").stat().st_size < 200_000


def test_the_example_of_a_cpu_answers_by_its_name() -> None:
    assert shipped_file("cpu-2-cores") is not None

    answer = json.loads(
        run("solve", "--gpu", "cpu-2-cores", "--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "6",
            "--dtype", "fp32", "--json").out
    )  # fmt: skip

    assert answer["provenance"]["profile"]["name"].startswith("measured-cpu-2-cores-")
    assert answer["machine"]["gpu"]["link"]["name"] == "copy within memory"

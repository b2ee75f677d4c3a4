"""Which measurements constants are held against."""

import pytest

from builders import make_machine
from sim.predict import predictable
from sim.profile import Measurement

MACHINE = make_machine(hbm_bytes_per_s=1e12, flop_per_s=1e14, link_bytes_per_s=5e10)


def families(model: str, words: str) -> list[str]:
    """Those that are priced of a step's two measurements."""
    case = f"model={model} batch=2 prompt=64 output=6 {words}".strip()
    steps = [
        Measurement(family=family, case=case, seconds=1.0, low_s=1.0, high_s=1.0, samples=3)
        for family in ("decode", "prefill")
    ]
    return [one.family for one, _ in predictable(steps, MACHINE)]


@pytest.mark.parametrize("selector", ["topk", "pages"])
def test_steps_that_fetch_what_first_layers_alone_pick_are_left_out(selector: str) -> None:
    words = f"selector={selector} keep=50 placement=resident hbm=60"

    assert families("opt-13b/6", words) == ["prefill"]
    assert families("opt-13b", words) == ["decode", "prefill"]


@pytest.mark.parametrize(
    "words",
    [
        "selector=pages keep=50 placement=resident",  # nothing is fetched
        "selector=swa keep=50 placement=resident hbm=60",  # what is fetched is known beforehand
        "hbm=60",
    ],
)
def test_first_layers_stand_for_all_where_no_fetch_hangs_on_their_picks(words: str) -> None:
    assert families("opt-13b/6", words) == ["decode", "prefill"]

"""Measurements as they are kept: what a file gives back is what is fitted before it is written."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sim.measured import Measured, load_measured, save_measured, told
from sim.profile import Measurement
from tests.calibration.tiny import fingerprint, machine

seconds = st.floats(min_value=1e-8, max_value=1e3, allow_nan=False)


@given(st.lists(seconds, min_size=3, max_size=3).map(sorted), st.floats(min_value=0, max_value=1e15))
def test_bounds_hold_what_was_measured_however_few_digits_are_kept(times: list[float], size_bytes: float) -> None:
    low_s, seconds_, high_s = times
    one = Measurement(
        family="copy",
        case="bytes=1",
        seconds=seconds_,
        low_s=low_s,
        high_s=high_s,
        samples=5,
        size_bytes=size_bytes,
        launch_s=seconds_,
    )

    kept = told(one)

    assert kept.low_s <= kept.seconds <= kept.high_s
    assert told(kept) == kept
    for name, digits in (("seconds", 5), ("low_s", 4), ("high_s", 4), ("launch_s", 4)):
        assert abs(getattr(kept, name) / getattr(one, name) - 1) <= 10 ** (1 - digits) + 1e-9


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    one = told(Measurement(family="copy", case="bytes=1", seconds=1.23456789, low_s=1.23446, high_s=1.23498, samples=5))
    measured = Measured(fingerprint=fingerprint(), machine=machine(), measurements=(one,))

    save_measured(tmp_path / "m.json", measured)

    assert load_measured(tmp_path / "m.json") == measured
    assert (one.seconds, one.low_s, one.high_s) == (1.2346, 1.234, 1.235)

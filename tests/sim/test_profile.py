"""Profiles: constants within their range, each with a reason."""

from dataclasses import fields

import pytest

from builders import make_machine, refuses
from sim.profile import MeasuredProduct, Profile
from sim.spec import DType

NO_CONSTANTS = ("name", "basis", "evidence", "products")
CONSTANTS = [member.name for member in fields(Profile) if member.name not in NO_CONSTANTS]
SHARES = [name for name, kind in Profile.constants().items() if kind == "share"]
AMOUNTS = [name for name, kind in Profile.constants().items() if kind == "amount"]


def test_every_constant_is_a_share_or_an_amount_with_a_reason() -> None:
    reasons = Profile.reasons()

    assert sorted(SHARES + AMOUNTS) == sorted(reasons) == sorted(CONSTANTS)
    assert all(len(reason) > 20 for reason in reasons.values())


def test_the_nominal_profile_says_on_what_it_rests() -> None:
    profile = Profile.nominal(make_machine())

    assert profile.name == "nominal-card"
    assert profile.basis.startswith("nominal: datasheet rates")
    assert all(
        0 < getattr(profile, name) < 1
        for name in SHARES
        if name not in ("selection_exposed_share", "gemm_sustained_share", "prefill_sustained_share")
    )


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_lies_between_0_and_1(name: str, value: float) -> None:
    with refuses(f"profile.{name}={value}, must lie in [0, 1]"):
        Profile(name="p", basis="test", **{name: value})


@pytest.mark.parametrize("name", [name for name in SHARES if not name.endswith("sm_share")])
def test_nothing_works_at_an_efficiency_of_0(name: str) -> None:
    with refuses(f"profile.{name}=0, must be a finite number above 0"):
        Profile(name="p", basis="test", **{name: 0})


def test_a_gather_may_hold_no_sm_at_all() -> None:
    assert Profile(name="p", basis="test", gather_sm_share=0.0).gather_sm_share == 0.0


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_an_amount_is_finite_and_not_negative(name: str, value: float) -> None:
    with refuses(f"profile.{name}={value}, must be a finite number of at least 0"):
        Profile(name="p", basis="test", **{name: value})


def test_a_product_is_measured_at_rows_that_ascend() -> None:
    product = MeasuredProduct(inputs=16, outputs=48, dtype=DType.FP16, rows=(1, 4, 64), seconds=(3.0, 2.0, 9.0))

    assert product.seconds == (3.0, 2.0, 9.0)  # nothing says that more rows take longer


@pytest.mark.parametrize(
    ("rows", "seconds", "fault"),
    [
        ((), (), "0 rows, 0 seconds: must be as many, at least one"),
        ((1, 2), (1.0,), "2 rows, 1 seconds: must be as many, at least one"),
        ((4, 1), (1.0, 1.0), "rows=(4, 1), must ascend from at least 1"),
        ((1, 1), (1.0, 1.0), "rows=(1, 1), must ascend from at least 1"),
        ((0, 1), (1.0, 1.0), "rows=(0, 1), must ascend from at least 1"),
        ((1, 2), (1.0, 0.0), "seconds=0.0, must be a finite number above 0"),
        ((1,), (float("inf"),), "seconds=inf, must be a finite number above 0"),
    ],
)
def test_a_product_that_cannot_have_been_measured_is_refused(
    rows: tuple[int, ...], seconds: tuple[float, ...], fault: str
) -> None:
    with refuses(f"product of 16 x 48: {fault}"):
        MeasuredProduct(inputs=16, outputs=48, dtype=DType.FP16, rows=rows, seconds=seconds)

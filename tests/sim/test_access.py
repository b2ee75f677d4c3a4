"""Access profiles: straight lines between measured points, the nearest one outside."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import refuses
from sim.access import AccessProfile, LivingAges, at_tokens, measured_access, parametric_access
from sim.attention import Selector
from sim.codec import from_plain, to_plain
from strategies import accesses

POINTS: dict[str, Any] = {
    "selector": Selector.TOPK,
    "keep_shares": (0.1, 0.3),
    "turnovers": (0.4, 0.2),
    "perplexity_ratios": (1.4, 1.2),
    "source": "test",
}
ALIKE = LivingAges(**dict.fromkeys(("first", "later"), tuple(eighth / 8 for eighth in range(1, 8))))


@pytest.mark.parametrize(
    ("keep_share", "turnover", "perplexity_ratio"),
    [
        (0.0, 0.4, 1.4),
        (0.1, 0.4, 1.4),
        (0.15, 0.35, 1.35),
        (0.2, 0.3, 1.3),
        (0.3, 0.2, 1.2),
        (0.65, 0.2, 1.1),  # halfway to keeping all, which changes nothing
        (1.0, 0.2, 1.0),
    ],
)
def test_between_two_points(keep_share: float, turnover: float, perplexity_ratio: float) -> None:
    access = AccessProfile(**POINTS)

    assert access.turnover(keep_share) == pytest.approx(turnover)
    assert access.perplexity_ratio(keep_share) == pytest.approx(perplexity_ratio)


@pytest.mark.parametrize(("selector", "returning"), [(Selector.SWA, 0.01), (Selector.H2O, 1.0), (Selector.PAGES, 1.0)])
def test_where_it_is_not_measured_hardly_any_pick_of_swa_returns_from_outside_hbm(
    selector: Selector, returning: float
) -> None:
    usual = measured_access(selector)

    assert usual.returning == parametric_access(selector, 0.5).returning == returning
    assert replace(usual, returned_share=0.25).returning == 0.25


def test_a_share_that_is_not_measured_is_not_written() -> None:
    """So that profiles of before it was are what they were, to the hash."""
    unknown, known = measured_access(Selector.SWA), replace(measured_access(Selector.SWA), returned_share=0.0)

    assert "returned_share" not in to_plain(unknown)
    assert to_plain(known)["returned_share"] == 0.0
    assert [from_plain(AccessProfile, to_plain(one), "access") for one in (unknown, known)] == [unknown, known]


def test_picks_by_age() -> None:
    """The oldest half of the older tokens gets a fifth of the picks."""
    access = AccessProfile(**POINTS, age_shares=((0, 0), (0.5, 0.2), (1, 1)))

    assert [access.picks_among_oldest(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [0, 0.1, 0.2, 0.6, 1]
    )
    assert not access.picks_every_age_alike
    assert AccessProfile(**POINTS).picks_every_age_alike
    assert AccessProfile(**POINTS).picks_among_oldest(0.3) == pytest.approx(0.3)


def test_between_numbers_of_tokens_by_their_logarithms() -> None:
    """Halfway from 100 to 400 are 200; beyond them the nearest holds, and where numbers are not known the first."""
    older, newer = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9), (0.0, 0.0, 0.1, 0.2, 0.4, 0.6, 0.7)
    few = AccessProfile(
        **POINTS,
        tokens=100,
        living_ages=(LivingAges(first=older, later=older),) * 2,
        age_shares=((0, 0), (0.5, 0.4), (1, 1)),
    )
    many = replace(
        few,
        turnovers=(0.2, 0.0),
        tokens=400,
        early_turnovers=(0.4, 0.1),
        living_ages=(LivingAges(first=newer, later=older),) * 2,
        age_shares=((0, 0), (0.25, 0.1), (1, 1)),
        source="longer",
    )

    between = at_tokens([many, few], 200)

    assert between.turnovers == pytest.approx((0.3, 0.1))
    assert between.early_turnovers == pytest.approx((0.4, 0.15))  # of the former always as later
    assert at_tokens([few, replace(many, early_turnovers=None)], 200).early_turnovers is None
    (ages, _) = between.living_ages or ()
    assert ages.first == pytest.approx([(a + b) / 2 for a, b in zip(older, newer, strict=True)])
    assert ages.later == pytest.approx(older)
    assert [between.picks_among_oldest(share) for share in (0.25, 0.5)] == pytest.approx(
        [(0.2 + 0.1) / 2, (0.4 + 0.4) / 2]
    )
    assert between.source == "test; 50% of the way to: longer"
    assert [at_tokens([many, few], tokens) for tokens in (50, 100, 400, 900)] == [few, few, many, many]
    unknown = replace(many, tokens=None)
    assert at_tokens([unknown, replace(few, tokens=None)], 100) == unknown
    assert at_tokens([many, replace(few, living_ages=None)], 200).living_ages is None


def test_one_of_two_over_as_many_tokens_stands_for_both() -> None:
    one, other = (AccessProfile(**POINTS | {"source": source}, tokens=100) for source in ("one", "other"))

    assert [at_tokens([one, other], tokens) for tokens in (50, 100, 200)] == [one] * 3


def test_shares_that_are_equal_stay_so_whatever_rounding_takes_off() -> None:
    """At a tenth kept 0.2959 and 0.6497 both come to 0.8215, the one by an ulp more than the other."""
    few, many = (0.0, 0.0, 0.2959, 0.6497, 0.6497, 0.8215, 0.8215), (0.0, 0.0, *[0.8215] * 5)
    ages = tuple(LivingAges(first=shares, later=shares) for shares in (few, many))
    points = POINTS | {"keep_shares": (0.05, 0.1)}

    found = AccessProfile(**points, living_ages=ages).ages_at(0.1)

    assert found is not None
    assert found.first == pytest.approx(many, abs=1e-12)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_tokens_are_a_whole_number(tokens: Any) -> None:
    with refuses(f"access.tokens={tokens}, must be a whole number of at least 1"):
        AccessProfile(**POINTS, tokens=tokens)


def test_one_point_holds_everywhere() -> None:
    dense = measured_access(Selector.DENSE)

    assert (dense.turnover(0.2), dense.perplexity_ratio(1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("selector", Selector)
def test_every_selector_has_measured_defaults(selector: Selector) -> None:
    """The facts: recall renews a fifth to a third of its picks at every step, the others next to nothing."""
    access = measured_access(selector)

    assert access.selector is selector
    assert (0.2 < access.turnover(0.2) < 0.35) if selector.recalls else (access.turnover(0.2) < 0.01)
    assert access.perplexity_ratio(0.05) >= access.perplexity_ratio(0.1) >= access.perplexity_ratio(0.2) >= 1


def test_the_measured_figures_of_swa_and_of_top_k() -> None:
    swa, topk = measured_access(Selector.SWA), measured_access(Selector.TOPK)

    assert (swa.turnover(0.2), swa.perplexity_ratio(0.2)) == pytest.approx((0.0006, 1.190))
    assert (topk.turnover(0.05), topk.perplexity_ratio(0.05)) == pytest.approx((0.33, 1.042))


@given(accesses(Selector.PAGES), st.floats(0, 1), st.floats(0, 1))
def test_older_shares_never_get_fewer_picks(access: AccessProfile, one: float, other: float) -> None:
    fewer, more = sorted((one, other))

    assert 0 <= access.picks_among_oldest(fewer) <= access.picks_among_oldest(more) + 1e-12 <= 1 + 2e-12
    assert min(access.turnovers) - 1e-12 <= access.turnover(one) <= max(access.turnovers) + 1e-12


def test_where_a_turnover_comes_to_nothing_it_is_none_at_all() -> None:
    """3/8 at a tenth kept, 0 at a half: not a rounding error less, which would be a fetch of less than no time."""
    access = AccessProfile(**POINTS | {"keep_shares": (0.1, 0.5), "turnovers": (0.375, 0.0)})

    assert access.turnover(0.5) == 0
    assert access.turnover(0.5 - 2**-53) >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turnovers": (0.4,)}, "access.keep_shares=(0.1, 0.3), needs one turnover and one perplexity ratio for each"),
        (
            {"keep_shares": (), "turnovers": (), "perplexity_ratios": ()},
            "access.keep_shares=(), needs one turnover and one perplexity ratio for each",
        ),
        ({"keep_shares": (0.3, 0.1)}, "access.keep_shares=(0.3, 0.1), must ascend"),
        ({"keep_shares": (0.1, 0.1)}, "access.keep_shares=(0.1, 0.1), must ascend"),
        ({"turnovers": (0.4, 1.5)}, "access share=1.5, must lie in [0, 1]"),
        ({"returned_share": 1.5}, "access.returned_share=1.5, must lie in [0, 1]"),
        ({"living_ages": (ALIKE,)}, "access.living_ages, 1 entries, needs one for each of 2 keep shares"),
        ({"early_turnovers": (0.1,)}, "access.early_turnovers, 1 entries, needs one for each of 2 keep shares"),
        ({"early_turnovers": (0.1, -0.1)}, "access share=-0.1, must lie in [0, 1]"),
        ({"age_shares": ((0, 0),)}, "access.age_shares=((0, 0),), must ascend from (0, 0) to (1, 1)"),
        (
            {"age_shares": ((0, 0), (0.5, 0.6), (0.4, 0.7), (1, 1))},
            "access.age_shares=((0, 0), (0.5, 0.6), (0.4, 0.7), (1, 1)), must ascend from (0, 0) to (1, 1)",
        ),
        ({"age_shares": ((0, 0.1), (1, 1))}, "access.age_shares=((0, 0.1), (1, 1)), must ascend from (0, 0) to (1, 1)"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with refuses(message):
        AccessProfile(**(POINTS | changes))


def test_ages_between_two_keep_shares() -> None:
    newest = LivingAges(first=(0.0,) * 7, later=(0.0,) * 7)
    access = AccessProfile(**POINTS, living_ages=(newest, ALIKE))

    found = access.ages_at(0.25)

    assert found is not None
    assert found.first == found.later == pytest.approx([0.75 * eighth / 8 for eighth in range(1, 8)])
    assert access.ages_at(0.5) == ALIKE
    assert AccessProfile(**POINTS).ages_at(0.25) is None


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.4, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0, 1.5)])
def test_ages_are_seven_ascending_shares(shares: tuple[float, ...]) -> None:
    with refuses(f"access.living_ages.later={shares}, must be 7 ascending shares in [0, 1]"):
        replace(ALIKE, later=shares)

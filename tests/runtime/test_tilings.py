"""Which products run in tiles: those whose programs keep all multiprocessors busy to the end."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.graph.products import MOST_ROWS, Tiling
from runtime.graph.step import Tilings
from sim.capture import FUSED_ROWS
from sim.gemms import TILE_COLUMNS, TILE_PARTS

H200 = 132  # multiprocessors
TILINGS = Tilings()
LARGE = Tiling(columns=64, inner=128, parts=1, stages=4)  # 128 KiB beside more than 16 rows: a program a multiprocessor


def test_prices_know_of_how_many_rows_products_are_in_tiles() -> None:
    assert FUSED_ROWS == MOST_ROWS


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("out", 4096),  # 128 programs, one on each multiprocessor
        ("down", 4096),
        ("qkv", 12288),  # 192 programs, of which 264 run at once
        ("up", 16384),  # 256
        ("qkv", 15360),  # 240
    ],
)
def test_programs_that_all_run_at_once_are_even(name: str, columns: int) -> None:
    assert getattr(TILINGS, name).is_even(32, columns, H200)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("out", 5120),  # 160 programs: 28 of the second round
        ("down", 5120),
        ("up", 20480),  # 320, of which 264 run at once
    ],
)
def test_a_round_that_is_hardly_begun_is_uneven(name: str, columns: int) -> None:
    assert not getattr(TILINGS, name).is_even(32, columns, H200)


@pytest.mark.parametrize(("name", "columns"), [("qkv", 15360), ("out", 5120), ("up", 20480), ("down", 5120)])
def test_with_few_rows_opt_13b_fits_at_once(name: str, columns: int) -> None:
    """Tiles of 16 rows rather than 64 leave room for another program on each multiprocessor."""
    assert getattr(TILINGS, name).is_even(4, columns, H200)


@given(st.integers(17, MOST_ROWS), st.integers(1, 700), st.integers(1, 160))
def test_rounds_are_even_where_a_tenth_idles_at_most(rows: int, programs: int, multiprocessors: int) -> None:
    """Programs are given out one by one, each to whoever has had the fewest."""
    had = [0] * multiprocessors
    for number in range(programs):
        had[number % multiprocessors] += 1
    idle = sum(max(had) - one for one in had)
    assume(10 * idle != max(had) * multiprocessors)

    even = LARGE.is_even(rows, programs * LARGE.columns, multiprocessors)

    assert even == (max(had) == 1 or 10 * idle < max(had) * multiprocessors)


@given(st.integers(1, 16), st.integers(1, 400))
def test_rounds_of_two_programs_each_are_full_where_all_have_two(rows: int, multiprocessors: int) -> None:
    """Beside 16 rows two such programs have room."""
    at_once = 2 * multiprocessors * LARGE.columns

    assert LARGE.is_even(rows, at_once, multiprocessors)
    assert LARGE.is_even(rows, 2 * at_once, multiprocessors)
    assert not LARGE.is_even(rows, at_once + LARGE.columns, multiprocessors)


def test_programs_are_as_many_as_prices_count() -> None:
    assert {name: getattr(TILINGS, name).parts for name in TILE_PARTS} == TILE_PARTS
    assert {getattr(TILINGS, name).columns for name in TILE_PARTS} == {TILE_COLUMNS}

"""What a power limit leaves of products' clocks: by the energy that it allows, and as pieces that the program can read."""

from dataclasses import replace
from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import in_hbm, make_cost, make_machine, make_setting
from sim.cost import Pieces
from sim.flows import flows_of, home_columns
from sim.layer import layer_times
from sim.layer_prices import layer_prices, priced_layer
from sim.plan import Recompute
from sim.power import lost_after, recomputed

SECONDS = st.floats(1e-6, 1e3)
LIMITED = {"gemm_sustained_share": 0.7, "other_power_share": 0.55}


def test_products_alone_keep_the_sustained_rate() -> None:
    assert make_cost(**LIMITED).power_capped_s(7.0, 0.0) == pytest.approx(10.0)


def test_few_products_among_other_work_run_at_full_clocks() -> None:
    assert make_cost(**LIMITED).power_capped_s(1.0, 100.0) == 1.0


def test_a_card_without_a_limit_is_never_held_back() -> None:
    assert make_cost(gemm_sustained_share=1.0, other_power_share=0.2).power_capped_s(7.0, 3.0) == 7.0


@given(SECONDS, SECONDS)
def test_the_limit_is_kept_and_where_it_binds_used_up(arithmetic_s: float, beside_s: float) -> None:
    """Energy in seconds at the limit: products draw the square of their clocks, other work its share."""
    products_s = make_cost(**LIMITED).power_capped_s(arithmetic_s, beside_s)

    drawn = products_s * (arithmetic_s / 0.7 / products_s) ** 2 + 0.55 * beside_s
    allowed = products_s + beside_s
    assert drawn <= allowed * (1 + 1e-9)
    assert products_s == arithmetic_s or drawn == pytest.approx(allowed)


@given(st.floats(1e-5, 1e-2), st.floats(0, 1e-2), st.floats(0, 1.0), st.integers(1, 64), st.integers(8, 4096))
def test_what_is_recomputed_is_priced_by_tangents_of_the_limit(
    row_s: float, passes_s: float, beside_s: float, sequences: int, most: int
) -> None:
    """Pieces lie below the curve, by 2 % at most from a twentieth of the tokens on, and never below full clocks."""
    cost, product = make_cost(**LIMITED), Pieces(pieces=((0.5 * row_s, row_s),), free_at_zero=True)

    pieces = recomputed(
        cost, product, passes_s, sequences=sequences, beside_s=beside_s, most_tokens=most, layer_steps=None
    )

    for tokens in np.linspace(max(1.0, 0.05 * most), most, 20):
        rows = sequences * tokens
        besides_s = 0.5 * row_s + passes_s * rows
        exact_s = besides_s + cost.power_capped_s(row_s * rows, beside_s + besides_s)
        assert exact_s * 0.98 <= pieces.at_one(tokens) <= exact_s * (1 + 1e-6)
        assert pieces.at_one(tokens) >= (besides_s + row_s * rows) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("layer_steps", "share"),
    [
        (0, 0.0),  # no step decodes
        (1, 1 - (1 - exp(-5)) / 5),
        (4, 1 - (1 - exp(-20)) / 20),
        (10**9, 1.0),
        (None, 1.0),
    ],
)
def test_the_limit_is_felt_for_as_long_as_clocks_have_fallen(layer_steps: int | None, share: float) -> None:
    """1/10 s a row, 8 rows at most: 4 of them, half of the most, take 0.4 s a layer; clocks fall as exp(-t / 0.08 s), by 3/10.

    Alone, products take the same share longer whatever their number.
    """
    cost, product = make_cost(**LIMITED), Pieces(pieces=((0.0, 0.1),), free_at_zero=True)

    pieces = recomputed(cost, product, 0.0, sequences=1, beside_s=0.0, most_tokens=8, layer_steps=layer_steps)

    row_s = 0.1 + share * (0.1 / 0.7 - 0.1)
    assert [pieces.at_one(rows) for rows in (0, 1, 4, 8)] == pytest.approx([0, row_s, 4 * row_s, 8 * row_s], rel=1e-6)


def test_what_is_beside_takes_time_in_which_clocks_fall() -> None:
    """Products of 8 rows and their passes take 0.4 and 0.2 s in the mean of half of them, the rest of a layer 0.2 s."""
    cost, product = make_cost(gemm_sustained_share=0.7), Pieces(pieces=((0.0, 0.1),), free_at_zero=True)

    pieces = recomputed(cost, product, 0.05, sequences=1, beside_s=0.2, most_tokens=8, layer_steps=3)

    share = 1 - (1 - exp(-30)) / 30
    assert pieces.at_one(8) == pytest.approx(8 * 0.15 + share * (cost.power_capped_s(0.8, 0.2 + 0.4) - 0.8), rel=1e-6)


def test_a_run_that_is_repeated_until_clocks_fall_no_more_feels_all_of_the_limit() -> None:
    """As calibration measures; three steps of two layers are over sooner."""
    machine = make_machine(hbm_bytes_per_s=8192e3, flop_per_s=1024e3)
    setting = make_setting(machine=machine, recompute=Recompute.ACTIVATIONS_HOST)
    free, limited = make_cost(setting.machine), make_cost(setting.machine, **LIMITED)

    never, soon, settled = (
        priced_layer(cost, setting, 1, settled=ended).reproject.at_one(4)
        for cost, ended in ((free, True), (limited, False), (limited, True))
    )

    assert never < soon < settled
    assert soon - never < 0.5 * (settled - never)
    assert priced_layer(limited, setting, 1) == layer_prices(limited, setting, 1)


@pytest.mark.parametrize(
    ("recompute", "slowed"),
    [(Recompute.ACTIVATIONS_HOST, "reproject"), (Recompute.TOKENS, "forward")],
)
def test_a_limit_slows_what_is_recomputed_and_nothing_else(recompute: Recompute, slowed: str) -> None:
    setting = make_setting(batch=8, machine=make_machine(flop_per_s=64.0), recompute=recompute)
    plan = in_hbm(setting)
    free, limited = make_cost(setting.machine), make_cost(setting.machine, **LIMITED)

    prices = [layer_prices(cost, setting, 8) for cost in (free, limited)]
    steps = [
        layer_times(one, flows_of(plan, home_columns(plan.homes)), cost).layer_s
        for one, cost in zip(prices, (free, limited), strict=True)
    ]

    assert getattr(prices[0], slowed).at_one(4) < getattr(prices[1], slowed).at_one(4)
    assert replace(prices[1], **{slowed: getattr(prices[0], slowed)}) == prices[0]
    assert steps[0].tolist() == steps[1].tolist()


@given(st.floats(0, 1e3))
def test_a_prefill_that_the_limit_never_reaches_keeps_its_clocks(whole_s: float) -> None:
    assert make_cost(prefill_sustained_share=1.0, **LIMITED).settling(whole_s) == 1.0


def test_a_short_prefill_ends_before_its_clocks_fall_and_a_long_one_has_few_seconds_before() -> None:
    cost = make_cost(prefill_sustained_share=0.8)

    assert cost.settling(0.0) == 1.0
    assert cost.settling(1e-7) == pytest.approx(1.0, abs=1e-6)
    assert cost.settling(1e6) == pytest.approx(1 / 0.8, abs=1e-6)


@given(st.floats(0.1, 0.99), st.floats(1e-4, 10.0), st.floats(1.01, 100.0))
def test_the_longer_a_prefill_the_slower_are_its_products(share: float, whole_s: float, times: float) -> None:
    cost = make_cost(prefill_sustained_share=share)

    assert 1 < cost.settling(whole_s) < cost.settling(times * whole_s) < 1 / share


@pytest.mark.parametrize("whole_s", [0.01, 0.05, 0.2])
def test_clocks_fall_as_fast_as_there_is_left_to_fall(whole_s: float) -> None:
    """What is lost grows by what clocks have fallen; of what they will, twice the time leaves the square of the share."""
    cost, moment_s, slowest = make_cost(prefill_sustained_share=0.8), 1e-4, 1 / 0.8

    def lost_s(seconds: float) -> float:
        return seconds * (cost.settling(seconds) - 1)

    def left(seconds: float) -> float:
        growth = (lost_s(seconds + moment_s) - lost_s(seconds - moment_s)) / (2 * moment_s)
        return 1 - growth / (slowest - 1)

    assert left(2 * whole_s) == pytest.approx(left(whole_s) ** 2, rel=1e-3)
    assert 0 < left(whole_s) < 1


def test_a_prefills_products_settle_over_the_work_of_all_its_layers_and_nothing_else_does() -> None:
    """Some hundredths of a second long: clocks are on their way, after another such prefill. While the GPU waits for launches they
    do not fall. The steps after it take many seconds each: clocks have long risen again.
    """
    setting = make_setting(batch=8, machine=make_machine(hbm_bytes_per_s=1e6, launch_s=0.5))
    constants = {"kernels_per_layer": 3.0, "host_operation_s": 0.1}
    kept, falling = (make_cost(setting.machine, prefill_sustained_share=share, **constants) for share in (1.0, 0.5))

    free, limited = (layer_prices(cost, setting, 8) for cost in (kept, falling))

    products, beside = ("qkv", "out", "mlp"), ("attention", "norms")
    whole_s = setting.model.layers * sum(free.prefill[name] for name in (*products, *beside))
    slower = falling.settling(whole_s, whole_s)
    assert 1.05 < slower < 1.95
    assert free.prefill["launch"] > 1.0
    assert limited.prefill == pytest.approx(free.prefill | {name: slower * free.prefill[name] for name in products})
    assert limited.lost == pytest.approx((0.0,) * 4, abs=1e-6)
    assert replace(limited, prefill=free.prefill, lost=()) == free


@given(st.floats(0.1, 0.99), st.floats(1e-3, 10.0), st.floats(1.01, 100.0), st.lists(st.floats(1e-4, 0.1), min_size=2))
def test_steps_after_a_prefill_lose_the_more_the_longer_it_was_and_the_sooner_they_come(
    share: float, prefill_s: float, times: float, steps: list[float]
) -> None:
    """Never more than a prefill's products do in the end."""
    cost, step_s = make_cost(prefill_sustained_share=share), np.array(steps)

    soon, late = (lost_after(cost, seconds, step_s) for seconds in (prefill_s, times * prefill_s))

    assert np.all((soon >= 0) & (soon <= late) & (late < 1 / share - 1))
    assert np.all(np.diff(soon) <= 0)


def test_clocks_rise_again_as_fast_as_there_is_left_to_rise() -> None:
    """In a hundredth of a second as in the next: by the same share of what is left."""
    cost = make_cost(prefill_sustained_share=0.5)

    left = lost_after(cost, 1e6, np.full(4, 0.01))

    assert left[0] == pytest.approx(exp(-0.005 / 0.034))
    assert left[1:] / left[:-1] == pytest.approx(exp(-0.01 / 0.034))

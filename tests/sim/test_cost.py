"""The cost model's pieces: by hand at round numbers, and monotone and convex everywhere."""

from dataclasses import replace
from math import exp, log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import hypotenuse, make_cost, make_machine, make_model, make_products
from sim.cost import CostModel, Pieces, fallen_share
from sim.kv import KvFormat
from sim.plan import Mechanism
from sim.profile import MeasuredProduct, Profile
from sim.spec import DType, WeightFormat
from strategies import costs, machines

FP16 = DType.FP16
NATIVE = WeightFormat.NATIVE


@st.composite
def any_pieces(draw: st.DrawFn) -> Pieces:
    """A price of any operation by count, on any machine."""
    cost: CostModel = draw(costs(draw(machines())))
    inputs, outputs = draw(st.integers(1, 8192)), draw(st.integers(1, 8192))
    return draw(
        st.sampled_from(
            (
                cost.gemm(inputs, outputs, draw(st.sampled_from(DType)), draw(st.sampled_from(WeightFormat))),
                cost.host_attention(float(inputs), float(outputs)),
                cost.transfer(Mechanism.COPY_ENGINE),
                cost.transfer(Mechanism.COPY_ENGINE, handed_over=True),
                cost.transfer(Mechanism.GATHER_KERNEL),
            )
        )
    )


def test_the_largest_piece_counts() -> None:
    pieces = Pieces(pieces=((10.0, 0.0), (8.0, 1.0)))

    assert pieces.at(np.array([0.0, 1.0, 2.0, 5.0])).tolist() == [10, 10, 10, 13]
    assert [pieces.at_one(count) for count in (0, 1, 2, 5)] == [10, 10, 10, 13]


def test_nothing_to_do_is_free_where_it_may_be() -> None:
    pieces = Pieces(pieces=((10.0, 0.0), (8.0, 1.0)), free_at_zero=True)

    assert pieces.at(np.array([0.0, 1.0, 0.0])).tolist() == [0, 10, 0]
    assert pieces.at(np.zeros(3)).tolist() == [0, 0, 0]
    assert (pieces.at_one(0), pieces.at_one(0.5)) == (0, 10)


def test_a_count_may_stand_for_several() -> None:
    pieces = Pieces(pieces=((1.0, 2.0), (0.0, 3.0)), free_at_zero=True).scaled(4)

    assert pieces == Pieces(pieces=((1.0, 8.0), (0.0, 12.0)), free_at_zero=True)


@given(any_pieces(), st.floats(0, 1e12), st.floats(0, 1e12))
def test_more_takes_no_less_time(pieces: Pieces, one: float, other: float) -> None:
    fewer, more = sorted((one, other))

    assert 0 <= pieces.at_one(fewer) <= pieces.at_one(more)


@given(any_pieces(), st.floats(1e-3, 1e12), st.floats(1e-3, 1e12), st.floats(0, 1))
def test_prices_are_convex_so_that_a_linear_program_may_read_them(
    pieces: Pieces, one: float, other: float, share: float
) -> None:
    between = share * one + (1 - share) * other

    line_s = share * pieces.at_one(one) + (1 - share) * pieces.at_one(other)
    assert pieces.at_one(between) <= line_s * (1 + 1e-9)


@given(any_pieces(), st.lists(st.one_of(st.just(0.0), st.floats(0, 1e12)), min_size=1, max_size=5))
def test_a_column_is_priced_as_its_entries_are(pieces: Pieces, counts: list[float]) -> None:
    assert pieces.at(np.array(counts)).tolist() == [pieces.at_one(count) for count in counts]


def test_a_gemm_streams_its_weights_or_is_bound_by_arithmetic() -> None:
    """[rows, 100] x [100, 50]: 10,000 bytes at 80 % of 1,000 B/s; 10,000 FLOP a row at half of 2,000, 3 rows lost.

    Both are felt where they take about as long, at 2 rows most; of many rows only the arithmetic.
    """
    machine = make_machine(hbm_bytes_per_s=1000.0, flop_per_s=2000.0)
    cost = make_cost(machine, gemm_hbm_efficiency=0.8, gemm_peak_efficiency=0.5, gemm_half_rows=3.0)

    gemm = cost.gemm(100, 50, FP16, NATIVE)

    expected = [hypotenuse(12.5, 10.0 * (rows + 3)) for rows in (0, 1, 2, 100)]
    assert [gemm.at_one(rows) for rows in (0, 1, 2, 100)] == pytest.approx(expected)
    assert expected[-1] == 1030
    assert replace(cost, machine=make_machine(hbm_bytes_per_s=1000.0)).gemm(100, 50, FP16, NATIVE).at_one(9) == 12.5


def test_native_weights_are_streamed() -> None:
    assert make_cost().gemm(64, 8, FP16, NATIVE).at_one(1) == 64 * 8 * 2 / 512


@pytest.mark.parametrize(
    ("weight_format", "weight_bytes"), [(WeightFormat.INT8, 1 + 4 / 64), (WeightFormat.INT4, 0.5 + 4 / 64)]
)
def test_smaller_weights_are_widened_at_each_use(weight_format: WeightFormat, weight_bytes: float) -> None:
    """Read as they are stored and written in 16 bit, at half of HBM's rate, by a kernel for each product that starts in
    3 s; then streamed as wide as any, however many rows there are.
    """
    machine = make_machine(flop_per_s=1024.0, launch_s=3.0)
    cost = make_cost(machine, widening_efficiency=0.5, gemm_hbm_efficiency=0.8)

    gemm = cost.gemm(64, 8, FP16, weight_format)

    widened_s = 64 * 8 * (weight_bytes + 2) / 256 + 3
    assert gemm.at_one(1) == pytest.approx(widened_s + hypotenuse(64 * 8 * 2 / (512 * 0.8), 2 * 64 * 8 / 1024))
    assert gemm.at_one(99) == pytest.approx(widened_s + 99 * 2 * 64 * 8 / 1024)
    quick = replace(cost, profile=replace(cost.profile, weight_widening_efficiency=0.25)).gemm
    once = quick(64, 8, FP16, weight_format, one_pass=True)
    assert once.at_one(1) == pytest.approx(gemm.at_one(1) + 64 * 8 * (weight_bytes + 2) / 256)
    assert cost.gemm(64, 8, FP16, weight_format, products=2).at_one(1) == pytest.approx(gemm.at_one(1) + 3)


@pytest.mark.parametrize(
    ("whole_bytes", "found"), [(0, 0), (256, 0), (512, 0), (600, 2 - 1024 / 600), (1024, 1), (9999, 1)]
)
def test_a_product_finds_what_was_just_widened_in_the_cache(whole_bytes: float, found: float) -> None:
    """Of 1,024 bytes, whose reading takes 2 s; where they are of two matrices each is half as large. Of so many rows that their
    arithmetic hides the reading it saves nothing.
    """

    def gemm(found_bytes: float, weight_format: WeightFormat = WeightFormat.INT8, **more: Any) -> Pieces:
        cost = make_cost(make_machine(flop_per_s=1024.0), widened_found_bytes=found_bytes)
        return cost.gemm(64, 8, FP16, weight_format, **more)

    nothing_s, found_s = ([gemm(size, one_pass=True).at_one(rows) for rows in (1e-9, 1e9)] for size in (0, whole_bytes))

    assert nothing_s[0] - found_s[0] == pytest.approx(2 * found)
    assert nothing_s[1] == found_s[1]
    assert gemm(whole_bytes / 2, one_pass=True, products=2) == gemm(whole_bytes, one_pass=True)  # nothing to launch
    assert gemm(whole_bytes) == gemm(0)  # widened as keys and values are
    assert gemm(whole_bytes, NATIVE, one_pass=True) == gemm(0, NATIVE)


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "dtype", "times"),
    [
        (64, 8, 2, FP16, 2.0),  # 4 s, where the curve says 2
        (64, 8, 8, FP16, 1.0),
        (64, 8, 32, FP16, 3.0),
        (64, 8, 4, FP16, 1.5),  # halfway in the number of times that rows double
        (64, 8, 16, FP16, 2.0),
        (64, 8, 1, FP16, 2.0),  # below what was measured
        (64, 8, 64, FP16, 2.0),  # on the way to what the curve says, at four times as many
        (64, 8, 128, FP16, 1.0),
        (64, 8, 9999, FP16, 1.0),
        (8, 64, 2, FP16, 1.0),  # another matrix
        (64, 8, 2, DType.FP32, 1.0),  # or the same, wider
    ],
)
def test_a_product_takes_so_many_times_its_curve_as_when_it_was_measured(
    inputs: int, outputs: int, rows: int, dtype: DType, times: float
) -> None:
    """1024 bytes of weights take 2 s at 512 B/s, whatever the rows."""
    measured = MeasuredProduct(inputs=64, outputs=8, dtype=FP16, rows=(2, 8, 32), seconds=(4.0, 2.0, 6.0))

    cost = make_cost(products=(measured,))

    assert cost.as_measured(inputs, outputs, rows, dtype) == pytest.approx(times, rel=1e-12)


@given(machines(), st.floats(0.1, 10), st.integers(1, 300))
def test_what_was_measured_as_so_many_times_the_curve_is_that_for_any_rows_and_fades_beyond_them(
    machine: object, times: float, rows: int
) -> None:
    """At 1 to 64 rows; by the number of times that they double, nothing is left of it at 256."""
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))  # type: ignore[arg-type]
    products = make_products(cost, make_model(), {1: times, 16: times, 64: times})

    known = replace(cost, profile=replace(cost.profile, products=products))

    left = min(1.0, max(0.0, log2(256 / rows) / 2))
    assert known.as_measured(16, 48, rows, FP16) == pytest.approx(1 + (times - 1) * left)
    assert known.gemm(16, 48, FP16, NATIVE) == cost.gemm(16, 48, FP16, NATIVE)


def test_passes_over_hbm() -> None:
    cost = make_cost(elementwise_efficiency=0.5, gather_efficiency=0.25)

    assert cost.elementwise_s(256) == 256 / 256
    assert cost.gather_s(256) == 2 * 256 / 128  # read and written


def test_attention_reads_its_keys_or_is_bound_by_arithmetic() -> None:
    machine = make_machine(flop_per_s=1000.0)
    cost = make_cost(machine, attention_efficiency=0.5, quantised_attention_efficiency=0.25)

    assert cost.attention_s(1024, 100, FP16, KvFormat.NATIVE) == 1024 / 256
    assert cost.attention_s(1024, 100, FP16, KvFormat.INT8) == 1024 / 128
    assert cost.attention_s(1024, 8000, FP16, KvFormat.NATIVE) == 8
    assert cost.attention_s(1024, 8000, DType.FP32, KvFormat.NATIVE) == 16


@pytest.mark.parametrize(
    ("sequences", "tokens", "seconds"),
    [
        (1, 1, 2 * 7.5),  # two heads: a program of 64 queries each, however few there are
        (1, 64, 2 * 7.5),
        (1, 65, 2 * 2 * 7.5),
        (3, 64, 3 * 2 * 7.5),  # no sequence shares a tile with another
        (3, 65, 3 * 2 * 2 * 7.5),
        (1, 1024, 2 * 16 * 7.5),
        (1, 2048, 2 * 2 * 64 * 2048**2 / 2e6),  # from some 1,830 on by arithmetic: half of each square
        (3, 2048, 3 * 2 * 2 * 64 * 2048**2 / 2e6),
    ],
)
def test_a_prompts_attention_is_bound_by_arithmetic_or_by_tiles_of_queries(
    sequences: int, tokens: int, seconds: float
) -> None:
    """Two heads of 64 channels; 10 multiprocessors that take 100 s for a tile of 128 channels and three quarters of that here."""
    cost = make_cost(make_machine(flop_per_s=4e6), prefill_attention_efficiency=0.5, prompt_tile_s=100.0)

    assert cost.prompt_attention_s(2, 64, sequences, tokens, FP16) == pytest.approx(seconds, rel=1e-12)
    column = cost.prompt_attention_s(2, 64, np.array([1.0, sequences]), np.array([1.0, tokens]), FP16)
    assert column.tolist() == pytest.approx([15.0, seconds], rel=1e-12)
    wider_s = cost.prompt_attention_s(2, 128, sequences, 64, FP16)  # by tiles
    assert wider_s == pytest.approx(sequences * 2 * 10.0, rel=1e-12)


def test_no_token_of_a_prompt_waits_for_a_tile_where_tiles_take_no_time() -> None:
    """As on a CPU, of whose attention arithmetic is all."""
    cost = make_cost(make_machine(flop_per_s=4e6), prefill_attention_efficiency=0.5)

    seconds = cost.prompt_attention_s(2, 64, np.array([3.0, 3.0, 0.0]), np.array([0.0, 5.0, 5.0]), FP16)

    assert seconds.tolist() == [0, 3 * 2 * 2 * 64 * 25 / 2e6, 0]


def test_launches() -> None:
    assert make_cost(make_machine(launch_s=2.0)).launch_s(3) == 6


def test_the_cpu_reads_dram_or_is_bound_by_arithmetic_after_a_round_trip() -> None:
    machine = make_machine(dram_bytes_per_s=64.0, host_flop_per_s=10.0)
    cost = make_cost(machine, host_attention_efficiency=0.5, host_round_trip_s=3.0)

    assert [cost.host_attention(64, 1).at_one(tokens) for tokens in (0, 1, 2)] == [0, 5, 7]
    assert cost.host_attention(64, 50).at_one(1) == 13


def test_a_copy_has_a_start_and_a_floor() -> None:
    """64 B/s at 50 %: 32 bytes a second behind 2 s of set-up, and nothing under 5 s."""
    copy = make_cost(link_efficiency=0.5, copy_setup_s=2.0, copy_floor_s=5.0).transfer(Mechanism.COPY_ENGINE)

    assert [copy.at_one(size) for size in (0, 1, 96, 128)] == [0, 5, 5, 6]


def test_a_copy_that_is_handed_over_waits_first_however_large_it_is() -> None:
    """Another 3 s, the floor's copies too; gather kernels are of one stream."""
    cost = make_cost(link_efficiency=0.5, copy_setup_s=2.0, copy_floor_s=5.0, copy_handover_s=3.0, gather_setup_s=1.0)

    copy, gather = (cost.transfer(by, handed_over=True) for by in (Mechanism.COPY_ENGINE, Mechanism.GATHER_KERNEL))

    assert [copy.at_one(size) for size in (0, 1, 96, 128)] == [0, 8, 8, 9]
    assert gather == cost.transfer(Mechanism.GATHER_KERNEL)
    assert cost.transfer(Mechanism.COPY_ENGINE).at_one(128) == 6


def test_clocks_have_fallen_by_the_mean_of_their_way_down() -> None:
    """Of 1 - exp(-t / 2 s), from 0 to 1, 2 and 4 s; nothing at once, all in the end."""
    whole_s = np.array([0.0, 1.0, 2.0, 4.0])

    shares = fallen_share(whole_s, 2.0)

    expected = [0.0, *(1 - (1 - exp(-times)) / times for times in (0.5, 1.0, 2.0))]
    assert shares.tolist() == pytest.approx(expected)
    assert [fallen_share(float(seconds), 2.0) for seconds in whole_s] == shares.tolist()
    assert fallen_share(1e9, 2.0) == pytest.approx(1.0, abs=1e-8)


def test_a_gather_kernel_starts_sooner_and_moves_slower() -> None:
    cost = make_cost(link_efficiency=0.5, gather_link_efficiency=0.5, gather_setup_s=1.0, copy_floor_s=5.0)

    assert [cost.transfer(Mechanism.GATHER_KERNEL).at_one(size) for size in (0, 16, 64)] == [0, 2, 5]


def test_both_directions_at_once_slow_each_other_down() -> None:
    """64 bytes against 32: while those 32 pass, at 80 % of 64 B/s, each direction loses 0.5 / 0.8 - 0.5 s."""
    cost = make_cost(link_duplex_efficiency=0.8)

    sizes, opposite = np.array([64.0, 32.0, 64.0]), np.array([32.0, 64.0, 0.0])
    assert cost.duplex_delay_s(sizes, opposite).tolist() == pytest.approx([0.125, 0.125, 0])


@given(machines(), st.floats(1, 1e9))
def test_the_nominal_gather_kernel_wins_where_copies_are_small(machine: object, size_bytes: float) -> None:
    """It has no floor; only its rate is lower, by 8 %."""
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))  # type: ignore[arg-type]
    copy_s = cost.transfer(Mechanism.COPY_ENGINE).at_one(size_bytes)
    gather_s = cost.transfer(Mechanism.GATHER_KERNEL).at_one(size_bytes)

    assert gather_s < copy_s or gather_s <= copy_s / 0.92

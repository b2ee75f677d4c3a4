"""What one layer's operations take, by hand: HBM 512 B/s, link 64 B/s, arithmetic in no time unless a test slows it.

The tiny model's layer has 768 + 256 + 256 parameters; its key and value take 64 bytes a token, 37 in int8.
"""

from dataclasses import replace
from math import exp, hypot
from typing import Any

import numpy as np
import pytest

from builders import hypotenuse, in_hbm, make_cost, make_homes, make_machine, make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.capture import captures_prefill, evicts_least_wanted, gathers_ahead, is_captured
from sim.cost import CostModel
from sim.counts import counts_of
from sim.flows import flows_of, home_columns
from sim.forecast import forecast
from sim.kv import KvFormat, KvFormats
from sim.launches import (
    Operations,
    begin_operations,
    choice_operations,
    decode_operations,
    end_operations,
    prefill_operations,
)
from sim.layer import ATTEND_OPS, QUERY_OPS, REST_OPS, LayerTimes, layer_times
from sim.layer_prices import layer_prices
from sim.plan import Admission, Mechanism, Placement, Plan, Recompute, Setting, WriteBack
from sim.spec import CPU_LINK, WeightFormat

# Of 10 multiprocessors, by a product's one or two programs.
FILLED = (768 * 1 + 256 * 2 + 128 * 1 + 128 * 2) / 1280 / 10


def times_of(plan: Plan, cost: CostModel | None = None) -> LayerTimes:
    setting = plan.setting
    cost = cost or make_cost(setting.machine)
    return layer_times(layer_prices(cost, setting, setting.concurrency), flows_of(plan, home_columns(plan.homes)), cost)


def op(plan: Plan, name: str, **constants: float) -> list[float]:
    """Seconds of one operation in each step."""
    column = times_of(plan, make_cost(plan.setting.machine, **constants)).ops[name]
    return [float(seconds) for seconds in column]


def slow_arithmetic(**changes: Any) -> Any:
    return make_machine(flop_per_s=64.0, **changes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("recompute", "passed_s"), [(Recompute.ACTIVATIONS_HOST, 0.15), (Recompute.ACTIVATIONS_HBM, 1.625)]
)
def test_inputs_are_projected_to_keys_and_values(batch: int, recompute: Recompute, passed_s: float) -> None:
    """1024 bytes of weights take 2 s, 2 x 16 x 32 FLOP a row at 1024 a second 1 s for each token of each sequence.

    Captured steps save inputs normed: a kernel that turns a token's key of 16 entries moves 64 bytes, and sines and cosines
    take a fifth more, 0.15 s. Otherwise the norm's and the rotation's 12 and 14 passes move 832 bytes, 1.625 s.
    """
    setting = make_setting(batch=batch, machine=make_machine(flop_per_s=1024.0), recompute=recompute)
    plan = Plan(setting=setting, homes=make_homes((4, 4, 3, 2), activations=(0, 1, 3, 5)))

    rows = [batch * tokens for tokens in (1, 3, 5)]
    assert is_captured(setting) == (recompute is Recompute.ACTIVATIONS_HOST)
    assert op(plan, "reproject") == [0] + [pytest.approx(hypotenuse(2, some) + passed_s * some) for some in rows]


@pytest.mark.parametrize(("captured", "passed_s"), [(True, 1.175), (False, 3.9375)])
def test_a_prefix_is_forwarded_through_all_of_a_layer(captured: bool, passed_s: float) -> None:
    """2560 FLOP a token through its matrices, 2 x 16 x tokens^2 for causal attention, at 64 a second.

    Between them a token's entries pass HBM 300.8 times: both norms and residual sums 144, the rotation of query and key 76.8,
    what is stored 64, the activation 16; 1.175 s. Launched kernel by kernel 1008 times, 480 and 448 of them; 3.9375 s. A
    captured step's price is that of a token more or less; here one of a prompt of 4 that has all of its others beside it.
    Of 3 tokens that of the chord between 2 and 4, half a second above it.
    """
    changes: dict[str, Any] = {} if captured else {"kv_format": KvFormats(gpu=KvFormat.INT8)}
    setting = make_setting(machine=slow_arithmetic(), recompute=Recompute.TOKENS, **changes)
    plan = Plan(setting=setting, homes=make_homes((4, 5, 4, 4), dropped=(0, 0, 2, 3)))

    two, three, four = (tokens * (40 + passed_s) + tokens**2 / 2 for tokens in (2, 3, 4))
    mean = 2.5 * (40 + passed_s) + (1 + 4 + 9 + 16) / 4 / 2
    assert is_captured(setting) == captured
    assert op(plan, "forward") == [0, 0, *map(pytest.approx, (mean, mean) if captured else (two, (two + four) / 2))]
    assert (two + four) / 2 == pytest.approx(three + 0.5)


def test_what_is_projected_hides_most_of_the_begin_of_a_piece() -> None:
    """0.6 of it, and no more than it takes itself; with nothing to project a step feels all of it."""
    setting = make_setting(output=3, machine=slow_arithmetic(), recompute=Recompute.ACTIVATIONS_HOST)
    plan = Plan(setting=setting, homes=make_homes((4, 5, 4), activations=(0, 0, 2)))

    projected, behind, long = (op(plan, "reproject", piece_setup_s=seconds) for seconds in (0.0, 3.0, 1e9))

    assert projected[2] > 1.8
    assert (behind[1], behind[2]) == (0, pytest.approx(projected[2] - 1.8))
    assert long[2] == 0


def test_a_captured_prefix_is_made_up_to_eights_and_its_kernels_begin_one_after_the_other() -> None:
    """Of prefixes of 8 to 16 tokens those above 8 are made up, to 16; one sequence's are evened out over all of them. Three kernels
    of 2 s and two of its own; six more are felt beside the passes as the other side of a triangle.
    """
    setting = make_setting(prompt=16, output=3, machine=slow_arithmetic(launch_s=2.0), recompute=Recompute.TOKENS)
    plan = Plan(setting=setting, homes=make_homes((16, 8, 6), dropped=(0, 9, 12)))

    forwarded = [8, *[16] * 8]
    mean_s = sum(rows * 40 + hypot(rows * 1.175, 6 * 2) + rows**2 / 2 for rows in forwarded) / 9
    assert is_captured(setting)
    assert op(plan, "forward", kernels_per_layer=3.0) == [0, *[pytest.approx((3 + 2) * 2 + mean_s)] * 2]


@pytest.mark.parametrize(
    ("changes", "host_kv", "launched"),
    [
        ({}, (0, 0), (False, False)),  # one graph
        ({}, (0, 1), (True, True)),  # in pieces, from one layer's attention to the next one's
        ({"write_back": WriteBack.AT_BIRTH}, (0, 0), (True, True)),
        ({"kv_format": KvFormats(gpu=KvFormat.INT8)}, (0, 0), (True, True)),
    ],
)
def test_the_host_launches_nothing_for_a_prefix_alone(
    changes: dict[str, Any], host_kv: tuple[int, int], launched: tuple[bool, bool]
) -> None:
    setting = make_setting(prompt=4, output=3, recompute=Recompute.TOKENS, **changes)
    hbm = [cached - kept - 2 for cached, kept in zip((5, 6), host_kv, strict=True)]
    plan = Plan(setting=setting, homes=make_homes((2, *hbm), host_kv=(0, *host_kv), dropped=(2, 2, 2)))

    times = times_of(plan, make_cost(setting.machine, host_operation_s=1.0))

    assert tuple(bool(seconds > 0) for seconds in times.launched_s[1:]) == launched


@pytest.mark.parametrize(("host_kv", "pieces"), [((0, 0), 0), ((0, 1), 2)])
def test_a_prefix_beside_what_the_host_has_waits_for_two_begins_of_a_piece(
    host_kv: tuple[int, int], pieces: int
) -> None:
    """In each layer of every step, also of one that fetches nothing yet; alone it is part of the step's one graph."""
    setting = make_setting(prompt=4, output=3, recompute=Recompute.TOKENS)
    hbm = [cached - kept - 2 for cached, kept in zip((5, 6), host_kv, strict=True)]
    plan = Plan(setting=setting, homes=make_homes((2, *hbm), host_kv=(0, *host_kv), dropped=(2, 2, 2)))

    begun, free = (op(plan, "launch", piece_setup_s=seconds)[1:] for seconds in (3.0, 0.0))

    assert [one - other for one, other in zip(begun, free, strict=True)] == [pytest.approx(pieces * 3)] * 2


def test_a_prefills_products_slow_down_as_clocks_settle() -> None:
    """Clocks fall by 1 - exp(-t / 0.08 s) of what they fall in the end, here by half; from T to 2 T, after another such prefill,
    on average by 1 - (exp(-x) - exp(-2 x)) / x of it, x = T / 0.08 s. At 256 times the usual rate T is of two layers with 5/256 s
    of products and 4 tokens' passes. The steps that follow find clocks lower until they
    have risen, of which products feel a quarter.
    """
    plan = in_hbm(make_setting(machine=make_machine(hbm_bytes_per_s=256 * 512.0)))
    passed_s = 4 * 1.175 / 256
    settled = 2 * (5 / 256 + passed_s) / 0.08
    slower = 1 + (1 - (exp(-settled) - exp(-2 * settled)) / settled)

    found = {name: op(plan, name, prefill_sustained_share=0.5) for name in ("qkv", "out", "mlp", "norms")}

    assert found["qkv"][0] == pytest.approx(slower * 3 / 256)
    assert found["out"][0] == found["mlp"][0] == pytest.approx(slower / 256)
    assert found["norms"] == [pytest.approx(passed_s), 0, 0, 0]
    at_full_clocks = times_of(plan, make_cost(plan.setting.machine))
    prefill_s = 2 * 2 * (slower * 5 / 256 + passed_s)
    steps_s = 2 * at_full_clocks.layer_s[1:] + at_full_clocks.head_s[1:]
    later = 1 + 0.25 * (1 - exp(-prefill_s / 0.08)) * np.exp(-(steps_s.cumsum() - steps_s / 2) / 0.034)
    assert found["mlp"][1:] == pytest.approx(later / 256)
    assert later[0] > later[1] > later[2] > 1
    assert times_of(plan, make_cost(plan.setting.machine, prefill_sustained_share=0.5)).head_s[1:] == pytest.approx(
        later * at_full_clocks.head_s[1:]
    )


ROUNDED = 37 * (1 + 45 / 16) / (1 + 45 / 128)


def test_conversion_takes_a_pass_over_the_newborn_and_two_over_what_moves() -> None:
    """int8 in HBM (37 bytes), fp16 on the host (64): a launch of 1 s, then 101 bytes for each token that crosses.

    Rounded, a head's ranges count as 45 channels more; rates are those of 128 channels.
    """
    formats = KvFormats(gpu=KvFormat.INT8)
    setting = make_setting(machine=make_machine(launch_s=1.0), kv_format=formats)

    ops = op(newest_in_hbm(setting, slots=2), "convert")

    crossing = [3 + 1, 4 + 1, 5 + 0]  # fetched and written
    assert ops == pytest.approx(
        [4 * 3 * ROUNDED / 512] + [1 + (3 * ROUNDED + 101 * tokens) / 512 for tokens in crossing]
    )


def test_the_same_format_on_both_tiers_crosses_as_it_is() -> None:
    both = make_setting(kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8))

    newborn = [
        0,
        0,
        0,
    ]  # a captured step's attention rounds them; a kernel reads the prompt once, and levels are copied
    assert op(newest_in_hbm(both, slots=2), "convert") == pytest.approx([4 * (64 + 3 * 37) / 512, *newborn])
    eager = replace(both, model=make_model(layers=3), weights_on_host=0.5)
    assert op(newest_in_hbm(eager, slots=2), "convert") == pytest.approx([12 * ROUNDED / 512] + 3 * [3 * ROUNDED / 512])
    assert not any(op(newest_in_hbm(make_setting(), slots=2), "convert"))


def test_a_gather_kernel_holds_a_share_of_the_sms_while_it_fetches() -> None:
    """3, 4 and 5 tokens at a token a second; a quarter of that is lost to the GPU stream. A captured step's attention reads
    them itself.
    """
    gathering = make_setting(fetch_by=Mechanism.GATHER_KERNEL)
    eager = newest_in_hbm(replace(gathering, model=make_model(layers=3), weights_on_host=0.5), slots=2)
    in_place, copied = (newest_in_hbm(setting, slots=2) for setting in (gathering, make_setting()))

    assert op(eager, "gather_sms", gather_sm_share=0.25) == [0, 3 / 4, 4 / 4, 5 / 4]
    for plan in (in_place, copied):
        assert op(plan, "gather_sms", gather_sm_share=0.25) == [0, 0, 0, 0]


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("fetch_by", Mechanism)
def test_a_captured_window_gathers_from_the_host_alone_and_by_kernels(captured: bool, fetch_by: Mechanism) -> None:
    """Launched kernel by kernel the selected, two and then three, are copied together within HBM, 128 bytes each."""
    write_back = WriteBack.AT_EVICTION if captured else WriteBack.AT_BIRTH
    changes: dict[str, Any] = {"write_back": write_back, "fetch_by": fetch_by}
    setting = make_setting(Selector.SWA, prompt=8, output=3, sparsity=0.5, **changes)
    plan, by_kernel = newest_in_hbm(setting, slots=3), captured or fetch_by is Mechanism.GATHER_KERNEL
    cost = make_cost(gather_setup_s=2.0)

    assert is_captured(setting) == gathers_ahead(setting) == captured
    assert not evicts_least_wanted(setting)  # homes go by age
    assert op(plan, "gather") == [0, *(0 if captured else tokens * 128 / 512 for tokens in (2, 3))]
    fetched = flows_of(plan, home_columns(plan.homes)).fetched_kv
    assert times_of(plan, cost).prefetch_s.tolist() == pytest.approx([0, *(2.0 * by_kernel + fetched[1:])])
    share = 0.05 if captured else 0.25 * by_kernel  # few small programs
    assert op(plan, "gather_sms", gather_sm_share=0.25) == pytest.approx([0, *(share * fetched[1:])])


@pytest.mark.parametrize("captured", [True, False])
def test_a_captured_window_over_int8_gathers_levels_and_its_attention_rounds(captured: bool) -> None:
    """36 bytes a token, at 64 a second, and nothing launched by the host; eagerly 37, for ranges of keys come along."""
    write_back, int8 = (WriteBack.AT_EVICTION if captured else WriteBack.AT_BIRTH), KvFormat.INT8
    changes: dict[str, Any] = {"write_back": write_back, "kv_format": KvFormats(gpu=int8, host=int8)}
    plan = newest_in_hbm(make_setting(Selector.SWA, prompt=8, output=3, sparsity=0.5, **changes), slots=3)
    fetched, cost = flows_of(plan, home_columns(plan.homes)).fetched_kv, make_cost(host_operation_s=1.0)

    assert is_captured(plan.setting) == gathers_ahead(plan.setting) == captured
    crossing = (36 if captured else 37) / 64 * fetched
    assert times_of(plan, cost).prefetch_s.tolist() == pytest.approx(crossing.tolist())
    assert all((seconds == 0) == captured for name in ("gather", "convert") for seconds in op(plan, name)[1:])
    assert all((times_of(plan, cost).launched_s[1:] == 0) == captured)


@pytest.mark.parametrize(
    ("selector", "bytes_per_kept", "first_bytes"),
    [
        # Weights written and read, newest row in and oldest out, top-k over fp32 scores.
        (Selector.SWA, 4 + 4 + 16, 9 * 4 * 2 * 8),
        (Selector.H2O, 4 + 8 + 16, 9 * 4 * 8 * 8),  # instead of rows a running sum, read and written
        (Selector.LOCAL, 0, 0),
        (Selector.STRIDED, 0, 0),
        (Selector.PAGES, 0, 21 * 2 * 16 * 8),
    ],
)
def test_the_next_selection_is_made_from_this_steps_weights(
    selector: Selector, bytes_per_kept: float, first_bytes: float
) -> None:
    """Four kernels of 1 s, then a pass over the kept tokens (2 newest and 2 older ones, or 4 newest).

    The prompt's first choice takes a kernel of 1 s an operation and passes nine times over the float32 weights that its
    last k queries, or all, pay 8 tokens. Digests of pages, which choose nothing yet, pass 21 times over its 8 keys of 16.
    """
    machine, eager = make_machine(launch_s=1.0), WriteBack.AT_BIRTH  # a captured window writes at eviction
    setting = make_setting(selector, prompt=8, output=2, sparsity=0.5, machine=machine, write_back=eager)

    launches = 4 if bytes_per_kept else 0
    kept = setting.token_counts.local[1] + setting.token_counts.selected[1]
    assert op(in_hbm(setting), "select", kernels_per_selection=4) == [
        (choice_operations(setting) if bytes_per_kept else 0) + first_bytes / 512,
        launches + bytes_per_kept / 512 * kept,
    ]


@pytest.mark.parametrize("placement", Placement)
def test_a_captured_steps_window_chooses_from_a_prompt_in_fewer_operations_and_passes(placement: Placement) -> None:
    changes: dict[str, Any] = {"prompt": 8, "output": 2, "sparsity": 0.5, "machine": make_machine(launch_s=1.0)}
    eager = make_setting(Selector.SWA, write_back=WriteBack.AT_BIRTH, **changes)
    captured = make_setting(Selector.SWA, placement=placement, **changes)

    weights_s = 4 * 2 * 8 / 512
    assert choice_operations(captured) < choice_operations(eager) / 4
    assert op(in_hbm(eager), "select")[0] == choice_operations(eager) + 9 * weights_s
    assert op(in_hbm(captured), "select")[0] == choice_operations(captured) + 7 * weights_s


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize(
    ("prompt", "heads", "passes", "read_bytes"),
    [
        (8, 1, 2 * (1 + 8 / 1024), 4 * 4 + 2 * 2 * 7),
        (300, 20, (2 + 5) * (1 + 256 / 1024) + 3, 20 * 4 * 152 + 2 * 76 * 227),
    ],
)
def test_a_captured_windows_choice_passes_over_all_that_may_be_chosen(
    batch: int, prompt: int, heads: int, passes: float, read_bytes: int
) -> None:
    """Sixteen heads at a time, then as many past queries: of 8 entries, 7 of which may live, and 2 queries, or of 256 and 76. They
    take twice as long over 1,024; 256 are of eight warps, which agree in as many passes as there are doublings. However many
    sequences, but for what they read: scores of the kept, and the past queries' weights.
    """
    model = make_model(heads=heads, kv_heads=heads)
    setting = make_setting(
        Selector.SWA,
        batch=batch,
        prompt=prompt,
        output=3 if prompt == 300 else 2,
        sparsity=0.5,
        placement=Placement.RESIDENT,
        model=model,
        machine=make_machine(launch_s=1.0),
    )

    found = op(in_hbm(setting), "select", selection_pass_s=0.25, kernels_per_selection=3)

    assert is_captured(setting)
    assert found[1] == pytest.approx(3 + 0.25 * passes + batch * read_bytes / 512)


def test_attention_reads_and_waits_for_the_programs_of_a_head() -> None:
    """64 bytes of each of 5 tokens, and 4 s of 128 channels, 5/3 s of 16: (64 + 16) / 192 of it; both are felt."""
    setting = make_setting(output=2, model=make_model(heads=1, kv_heads=1), machine=make_machine(launch_s=1.0))

    found = op(in_hbm(setting), "attention", attention_token_s=4.0, attention_setup_s=7.0)

    assert found[1] == pytest.approx(7 + 5 * hypot(64 / 512, 5 / 3))


@pytest.mark.parametrize(
    ("batch", "parts", "rounds"),
    [
        (1, 16, 1),
        (128, 4, 12.8),
        (1000, 2, 50),
    ],  # 16 parts are the most, two the least; 512 programs are wanted, 40 a round
)
@pytest.mark.parametrize("listed", [False, True])
def test_programs_over_heads_that_share_keys_begin_while_others_read(
    batch: int, parts: int, rounds: float, listed: bool
) -> None:
    """A round of them begins in two launches of 1 s; tokens of 64 bytes, read 5 % slower than they lie, or 28 % where a list
    names them, which takes three tenths of a launch. A token's turn is 5/3 s, by so many side by side less than a fifth of it.

    5 to 8 tokens, or 4 of 9: what comes between the first step and the last lies on a line.
    """
    model, machine = make_model(heads=2, kv_heads=1), make_machine(launch_s=1.0)
    changes: dict[str, Any] = {"batch": batch, "output": 5, "model": model, "machine": machine}
    if listed:
        changes |= {"prompt": 8, "output": 2, "sparsity": 0.5, "placement": Placement.RESIDENT}
    setting = make_setting(Selector.PAGES if listed else Selector.DENSE, **changes)
    slower, begun_s = (1.28, 0.3) if listed else (1.05, 0.0)

    found = op(in_hbm(setting), "attention", attention_token_s=4.0, attention_setup_s=7.0)[1:]

    def together_s(tokens: int) -> float:
        return hypot(2 * rounds, slower * batch * tokens * 64 / 512)

    few, most = (4, 4) if listed else (5, 8)  # of 9 cached tokens, or all
    turn_s = 0.18 * 5 / 3 / parts
    assert setting.attention.kept_tokens(9 if listed else 8) == most
    assert found[0] == pytest.approx(7 + begun_s + together_s(few) + few * turn_s)
    assert found[-1] == pytest.approx(7 + begun_s + together_s(most) + most * turn_s)
    if not listed:
        assert found[2] - found[1] == pytest.approx(found[1] - found[0])
        assert found[1] > 7 + together_s(6) + 6 * turn_s


@pytest.mark.parametrize(("batch", "rounds"), [(1, [1]), (120, [120]), (121, [120, 1])])
def test_programs_over_listed_tokens_of_many_channels_are_fewer_at_once(batch: int, rounds: list[int]) -> None:
    """4 tokens of 512 bytes, of one head of 128 channels, whose turn is 4.4 s in place of 4; 10 multiprocessors take 12 programs
    each. Half a launch, of 1 s, and twenty turns of 120 programs go by before their first.
    """
    setting = make_setting(
        Selector.PAGES,
        batch=batch,
        prompt=8,
        output=2,
        sparsity=0.5,
        placement=Placement.RESIDENT,
        model=make_model(heads=1, kv_heads=1, head_dim=128),
        machine=make_machine(launch_s=1.0),
    )

    found = op(in_hbm(setting), "attention", attention_token_s=4.0, attention_setup_s=7.0)

    assert setting.attention.kept_tokens(9) == 4
    waited_s = 0.5 + 20 * 4.4 * batch / 120 + 4 * sum(hypot(programs * 512 / 512, 4.4) for programs in rounds)
    assert found[1] == pytest.approx(7 + waited_s)


def test_a_window_is_attended_to_in_a_lists_order_and_writes_its_weights() -> None:
    """4 tokens of 64 bytes and 1.15 turns; ten of those of 240 programs go by before the first."""
    setting = make_setting(Selector.SWA, prompt=8, output=2, sparsity=0.5, placement=Placement.RESIDENT)

    found = op(in_hbm(setting), "attention", attention_token_s=4.0, attention_setup_s=7.0)

    turn_s = 1.15 * 5 / 3
    assert found[1] == pytest.approx(7 + 10 * turn_s / 240 + 4 * hypot(64 / 512, turn_s))


@pytest.mark.parametrize(("batch", "rounds"), [(1, []), (120, [120]), (121, [120, 1]), (360, [120, 120, 120])])
def test_programs_that_widen_their_tokens_are_gone_through_in_rounds(batch: int, rounds: list[int]) -> None:
    """37 bytes of each sequence's token, 5/3 s of 16 channels; 10 multiprocessors take 12 programs each at once, 100 turns of
    which go by before their first.
    """
    setting = make_setting(batch=batch, output=2, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8))

    found = op(in_hbm(setting), "attention", quantised_token_s=4.0, attention_setup_s=7.0)

    token_s = sum(hypot(programs * 37 / 512, 5 / 3) for programs in rounds or [batch])
    assert found[1] == pytest.approx(7 + 100 * 5 / 3 * batch / 120 + 5 * token_s)


@pytest.mark.parametrize(("batch", "rounds"), [(1, [1]), (240, [240]), (241, [240, 1]), (500, [240, 240, 20])])
def test_programs_over_native_tokens_are_too_of_which_more_run_at_once(batch: int, rounds: list[int]) -> None:
    """64 bytes of each sequence's token; of few channels 24 programs each."""
    found = op(in_hbm(make_setting(batch=batch, output=2)), "attention", attention_token_s=4.0, attention_setup_s=7.0)

    assert found[1] == pytest.approx(7 + 5 * sum(hypot(programs * 64 / 512, 5 / 3) for programs in rounds))


@pytest.mark.parametrize(("batch", "parts", "rounds"), [(1, 16, 1), (128, 4, 12.8), (1000, 2, 50)])
def test_levels_that_queries_share_are_read_once_in_parts(batch: int, parts: int, rounds: float) -> None:
    """37 bytes of each sequence's token, 5/3 s of 16 channels by a program for each part, 40 a round; launches for each."""
    model, machine = make_model(heads=2, kv_heads=1), make_machine(launch_s=1.0)
    formats = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    setting = make_setting(batch=batch, output=2, kv_format=formats, model=model, machine=machine)

    found = op(in_hbm(setting), "attention", quantised_token_s=4.0, attention_setup_s=7.0)

    launched = 0.5 + 1.4 * rounds
    assert found[1] == pytest.approx(7 + launched + 5 * hypot(batch * 37 / 512, 5 / 3 * rounds / parts))


@pytest.mark.parametrize(
    ("heads", "turn_s", "before_s"),
    [(1, 1.1 * 5 / 3, 125 * 1.1 * 5 / 3 / 120), (2, 2.15 * 5 / 3 / 16, 0.8 + 2.2)],
)
def test_a_window_over_int8_is_attended_to_in_a_lists_order(heads: int, turn_s: float, before_s: float) -> None:
    """4 of 9 tokens, with whose levels ranges come: a quarter more, after 125 turns of 120 programs. Where heads share keys 16
    parts take turns of more than twice the time, set up in launches of 1 s. Nothing is converted beside.
    """
    placed = {"model": make_model(heads=heads, kv_heads=1), "placement": Placement.RESIDENT}
    levels, machine = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8), make_machine(launch_s=1.0)
    setting = make_setting(Selector.SWA, prompt=8, output=2, sparsity=0.5, kv_format=levels, machine=machine, **placed)

    found = op(in_hbm(setting), "attention", quantised_token_s=4.0, attention_setup_s=7.0)

    assert is_captured(setting)
    assert setting.attention.kept_tokens(9) == 4
    assert found[1] == pytest.approx(7 + before_s + 4 * hypot(1.25 * 37 / 512, turn_s))
    assert op(in_hbm(setting), "convert")[1] == 0


def test_attention_of_a_step_in_pieces_and_over_pages_goes_over_a_heads_tokens_in_one_part() -> None:
    """Two query heads share a key head: 5 tokens of 64 bytes; pages are read half again.

    A token of 128 channels takes 4 s, 8 s more in a step in pieces, 2 s more from a page; one of 16 takes 5/12 of that.
    A piece begins after 3 s.
    """
    model, machine = make_model(heads=2, kv_heads=1), make_machine(launch_s=1.0)
    constants = {"attention_token_s": 4.0, "streamed_token_s": 8.0, "paged_token_s": 2.0, "piece_setup_s": 3.0}
    constants |= {"attention_setup_s": 7.0, "paged_again_share": 0.5}
    streamed = newest_in_hbm(make_setting(output=2, model=model, machine=machine), slots=2)
    paged = in_hbm(make_setting(output=2, model=model, machine=machine, admission=Admission.CONTINUOUS))

    assert op(streamed, "attention", **constants)[1] == pytest.approx(7 + 3 + 5 * hypot(64 / 512, 5))
    assert op(paged, "attention", **constants)[1] == pytest.approx(7 + 5 * hypot(96 / 512, 2.5))


@pytest.mark.parametrize("batch", [1, 4, 200])
def test_attention_takes_no_less_where_tokens_stream_in(batch: int) -> None:
    """Though its programs over heads that share keys begin in one round, those of a plan in HBM in twenty (200 sequences)."""
    setting = make_setting(
        batch=batch, prompt=4, output=9, model=make_model(heads=2, kv_heads=1), machine=make_machine(launch_s=1.0)
    )

    streamed, still = (
        op(plan, "attention", attention_token_s=4.0) for plan in (newest_in_hbm(setting, slots=2), in_hbm(setting))
    )

    assert all(away >= near - 1e-9 for away, near in zip(streamed[1:], still[1:], strict=True))
    ends = (streamed[1] - still[1], streamed[-1] - still[-1])
    assert min(ends) == pytest.approx(0) if batch == 200 else min(ends) > 0


@pytest.mark.parametrize(
    ("recompute", "on_host", "pieces_s"),
    [(Recompute.ACTIVATIONS_HOST, 1, 3), (Recompute.TOKENS, 1, 0), (Recompute.TOKENS, 0, 0)],
)
def test_attention_over_int8_beside_what_is_computed_again_has_a_kernel_ahead(
    recompute: Recompute, on_host: int, pieces_s: float
) -> None:
    """Which stores the newborn token: 1.2 launches of 1 s; 5 tokens of 37 bytes, each with a turn of 4 + 8 s, 5/12 of that for
    16 channels. A piece begins after 3 s; a prefix beside what the host has takes its pieces among the launches.
    """
    again, setting = (0, 2), make_setting(output=2, machine=make_machine(launch_s=1.0), recompute=recompute)
    setting = replace(setting, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8))
    gone = {"dropped" if recompute is Recompute.TOKENS else "activations": again}
    plan = Plan(setting=setting, homes=make_homes((4, 3 - on_host), host_kv=(0, on_host), **gone))
    constants = {"attention_setup_s": 7.0, "quantised_token_s": 4.0, "streamed_token_s": 8.0, "piece_setup_s": 3.0}

    attention_s = op(plan, "attention", **constants)[1]

    assert attention_s == pytest.approx(7 + pieces_s + 1.2 + 5 * hypot(37 / 512, 5))


@pytest.mark.parametrize(
    ("selector", "bytes_per_cached"),
    [(Selector.PAGES, 4 + 16), (Selector.TOPK, 32 + 16), (Selector.SWA, 0)],  # digests, or keys; and top-k
)
def test_recall_scores_every_token_before_it_attends(selector: Selector, bytes_per_cached: float) -> None:
    setting = make_setting(selector, prompt=8, output=2, sparsity=0.5, machine=make_machine(launch_s=1.0))

    launches = 4 if bytes_per_cached else 0
    assert op(in_hbm(setting), "score", kernels_per_selection=4) == [
        0,
        launches + bytes_per_cached * 9 / 512,
    ]


@pytest.mark.parametrize(("prompt", "doublings"), [(64, 0), (511, 0), (512, 1), (1024, 2)])
@pytest.mark.parametrize(("heads", "again"), [(1, 0.0), (4, 0.75)])
def test_a_captured_steps_digests_are_scored_as_keys_and_values_are_attended_to(
    prompt: int, doublings: int, heads: int, again: float
) -> None:
    """A page's digest is 64 bytes, read at half of HBM's rate and once more by a quarter for each further query head; seven
    pages go by before the first. Its choice takes a launch and 5 s, 3 s more for each doubling beyond 512 tokens.
    """
    model = make_model(heads=heads, kv_heads=1)
    changes: dict[str, Any] = {"machine": make_machine(launch_s=1.0), "placement": Placement.RESIDENT, "batch": 2}
    setting = make_setting(Selector.PAGES, prompt=prompt, output=2, sparsity=0.5, model=model, **changes)

    constants = {
        "attention_efficiency": 0.5,
        "recall_setup_s": 5.0,
        "recall_doubling_s": 3.0,
        "paged_again_share": 0.25,
    }
    scored_s = op(in_hbm(setting), "score", kernels_per_selection=1, **constants)

    assert is_captured(setting)
    pages_s = (7 + (prompt + 1) / 16) * 2 * 64 * (1 + again) / 256
    assert scored_s == [0, pytest.approx(1 + 5 + 3 * doublings + pages_s)]


@pytest.mark.parametrize("batch", [1, 40])
def test_a_fetch_of_pages_begins_in_full_only_where_there_are_any(batch: int) -> None:
    """Else it takes four tenths of 10 s. Each sequence picks 3.4 to 4 tokens of the host's anew, wherever they lie: as many
    sixteenths of a page.
    """
    setting = make_setting(Selector.PAGES, batch=batch, prompt=64, output=6, sparsity=0.5, placement=Placement.RESIDENT)
    setting = replace(setting, fetch_by=Mechanism.GATHER_KERNEL)
    counts = counts_of(setting)
    some = 1 - np.exp(-batch * (counts.fetch_rate * counts.pool)[2:] / 16).mean()
    assert 0.15 < some < 1
    assert (some > 0.99) == (batch == 40)

    ((begun_s, byte_s),) = layer_prices(make_cost(gather_setup_s=10.0), setting, batch).fetch.pieces

    assert is_captured(setting)
    assert begun_s == pytest.approx(10 * (0.4 + 0.6 * some))
    assert byte_s == make_cost().transfer(Mechanism.GATHER_KERNEL).pieces[0][1] > 0


@pytest.mark.parametrize(
    ("batch", "felt"), [(1, 0.25), (8, 0.25), (9, 0.25 + 0.75 * (1 - 0.1 / (0.9 * FILLED))), (20, 1.0)]
)
def test_a_captured_steps_choice_is_felt_by_the_multiprocessors_that_it_holds(batch: int, felt: float) -> None:
    """A quarter of it in any case; of the rest what products lose that have fewer than nine tenths of what they have programs
    for. Each sequence, whose choice reads 44 bytes, holds one of 10.
    """
    setting = make_setting(Selector.SWA, batch=batch, prompt=8, output=2, sparsity=0.5, placement=Placement.RESIDENT)

    found = op(in_hbm(setting), "select", selection_exposed_share=0.25)

    assert found[1] == pytest.approx(felt * batch * 44 / 512)


def test_widening_and_rounding_have_rates_of_their_own() -> None:
    """Rounded at half of HBM's rate: three passes over the newborn, of 16 channels a head. Widened at a quarter: what crosses,
    37 and 64 bytes.
    """
    setting = make_setting(kv_format=KvFormats(gpu=KvFormat.INT8))

    found = op(newest_in_hbm(setting, slots=2), "convert", conversion_efficiency=0.5, widening_efficiency=0.25)

    assert found == pytest.approx(
        [4 * 3 * ROUNDED / 256] + [3 * ROUNDED / 256 + 101 * tokens / 128 for tokens in (4, 5, 5)]
    )


@pytest.mark.parametrize(
    ("selector", "kv"),
    [
        *((selector, KvFormat.NATIVE) for selector in (Selector.DENSE, Selector.H2O, Selector.TOPK)),
        *((selector, KvFormat.INT8) for selector in (Selector.DENSE, Selector.H2O, Selector.TOPK)),
        *((Selector.SWA, kv) for kv in (KvFormat.FP8, KvFormat.INT4)),  # in others a wave's choices are captured
    ],
)
def test_one_sequence_admitted_alone_takes_as_long_as_a_wave_of_it(selector: Selector, kv: KvFormat) -> None:
    """Prefill and choices included, but for what only one of them does.

    A wave's 90 operations begin it, 16 where its prefill is a graph, 1/64 s each. A captured step's pages of native KV have
    the 8 tokens scattered to them: six passes over 32 entries a token and layer, at half of HBM's rate. A captured wave rounds
    its prompts by a kernel of its own.
    """
    sparsity = 0.0 if selector is Selector.DENSE else 0.5
    setting = make_setting(
        selector,
        prompt=8,
        sparsity=sparsity,
        machine=make_machine(flop_per_s=1024.0),
        kv_format=KvFormats(gpu=kv, host=kv),
        placement=Placement.RESIDENT if sparsity else Placement.RECENT,
    )
    cost = make_cost(setting.machine, elementwise_efficiency=0.25, norm_efficiency=0.5, host_operation_s=1 / 64)
    wave = forecast(in_hbm(setting), cost)
    alone = forecast(in_hbm(replace(setting, admission=Admission.CONTINUOUS)), cost)

    scattered_s = 2 * 8 * 6 * 32 * 2 / 256 if selector is Selector.DENSE and kv is KvFormat.NATIVE else 0.0
    if selector is Selector.DENSE and kv is KvFormat.INT8:
        scattered_s = 2 * 8 * (3 * ROUNDED / 512 - (64 + 3 * 37) / (512 / 4))
    begun = 16 if selector is Selector.DENSE else 90
    assert captures_prefill(setting) == (selector is Selector.DENSE)
    first_s, *later_s = wave.waves[0].step_s.tolist()
    assert alone.waves[0].step_s.tolist() == pytest.approx([first_s - begun / 64 + scattered_s, *later_s])


def test_the_host_launches_the_operations_of_each_layer() -> None:
    """2 s each: as many as ``sim.launches`` says, more where anything is outside HBM, at every step."""
    setting = make_setting(Selector.TOPK, prompt=8, sparsity=0.5)
    near, away = in_hbm(setting), newest_in_hbm(setting, slots=4)

    for plan, is_away in ((near, False), (away, True)):
        launched = times_of(plan, make_cost(host_operation_s=2.0)).launched_s.tolist()
        assert launched == pytest.approx([2 * worth for worth in launches(setting, away=is_away)])
    assert decode_operations(setting, away=True).worth > decode_operations(setting, away=False).worth > 0


@pytest.mark.parametrize(
    ("changes", "operations"),
    [
        ({}, Operations(queued=6)),  # a piece, what comes, what goes, three marks
        ({"recompute": Recompute.ACTIVATIONS_HOST}, Operations(queued=7, kernels=1)),  # a product; its keys' rotation
        ({"recompute": Recompute.ACTIVATIONS_HOST, "model": make_model(positions=64)}, Operations(queued=7)),
        (
            {"recompute": Recompute.ACTIVATIONS_HOST, "weight_format": WeightFormat.INT8},
            Operations(queued=7, kernels=2),  # the matrix is widened
        ),
        ({"fetch_by": Mechanism.GATHER_KERNEL}, Operations()),  # replayed as a whole
    ],
)
def test_between_pieces_of_a_captured_step_the_host_queues_and_projects(
    changes: dict[str, Any], operations: Operations
) -> None:
    assert decode_operations(make_setting(**changes), away=True) == operations


def test_what_is_queued_takes_the_host_less_than_any_other_operation() -> None:
    queued, *others = (Operations(**{name: 1}).worth for name in ("queued", "layer", "products", "books", "kernels"))

    assert 0 < queued < min(others)


def launches(setting: Setting, *, away: bool) -> list[float]:
    """What a layer of the prefill and of three steps launches, with its share of their ends and of what begins a wave."""
    ends = end_operations(setting, prefill=True).worth + begin_operations(setting)
    first = prefill_operations(setting, 1, away=away).worth, ends
    later = decode_operations(setting, away=away).worth, end_operations(setting, prefill=False).worth
    return [layer + ends / setting.model.layers for layer, ends in (first, later, later, later)]


@pytest.mark.parametrize(("batch", "captured"), [(4, True), (5, False)])
def test_the_host_launches_nothing_of_a_captured_prefill_but_begins_its_wave(batch: int, captured: bool) -> None:
    """A pass takes 8,192 tokens: four prompts of 2,000, not five."""
    setting = make_setting(batch=batch, prompt=2000)
    prices = layer_prices(make_cost(host_operation_s=2.0), setting, batch)
    layer, ends = prefill_operations(setting, 2, away=False), end_operations(setting, prefill=True)

    assert captures_prefill(setting) == captured
    assert (layer == ends == Operations()) == captured
    assert (prices.prefill_launched_s == prices.begun_s) == captured
    assert prices.begun_s == 2 * begin_operations(setting) / 2 > 0


@pytest.mark.parametrize(("selector", "begun"), [(Selector.DENSE, 16), (Selector.TOPK, 90)])
def test_the_gpu_waits_for_a_waves_begin(selector: Selector, begun: int) -> None:
    """90 operations of 2 s before the first of two layers, 16 of a captured prefill; admission has none to begin."""
    setting = make_setting(selector, sparsity=0.0 if selector is Selector.DENSE else 0.5)
    admitted = replace(setting, admission=Admission.CONTINUOUS)

    def waited(one: Setting) -> list[float]:
        slow, quick = (op(in_hbm(one), "launch", host_operation_s=seconds) for seconds in (2.0, 0.0))
        return [later - sooner for later, sooner in zip(slow, quick, strict=True)]

    assert waited(setting) == [2 * begun / 2, 0, 0, 0]
    assert waited(admitted) == [0, 0, 0, 0]


def test_on_a_cpu_launches_come_on_top_of_what_they_launch() -> None:
    machine = make_machine()
    machine = replace(machine, gpu=replace(machine.gpu, link=replace(machine.gpu.link, name=CPU_LINK)))
    plan = in_hbm(make_setting(machine=machine))

    assert plan.setting.machine.is_cpu
    assert op(plan, "launch", host_operation_s=2.0) == pytest.approx(
        [2 * worth for worth in launches(plan.setting, away=False)]
    )
    assert decode_operations(plan.setting, away=False).worth > 0  # nothing is captured there


def test_a_captured_step_launches_nothing_but_its_prefill() -> None:
    launched = times_of(in_hbm(make_setting()), make_cost(host_operation_s=2.0)).launched_s.tolist()

    assert launched[0] > 0
    assert launched[1:] == [0, 0, 0]


def test_selected_tokens_are_gathered_unless_they_stay_in_place() -> None:
    setting = make_setting(Selector.TOPK, prompt=8, output=2, sparsity=0.5)

    assert op(in_hbm(setting), "gather") == [0, 2 * 2 * 64 / 512]  # two tokens read and written
    assert op(in_hbm(make_setting(prompt=8, output=2)), "gather") == [0, 0]


def test_attention_reads_the_kept_tokens_in_their_format() -> None:
    setting = make_setting(output=2, kv_format=KvFormats(gpu=KvFormat.INT8))

    assert op(in_hbm(make_setting(output=2)), "attention", attention_efficiency=0.5)[1] == 5 * 64 / 256
    assert op(in_hbm(setting), "attention", quantised_attention_efficiency=0.25)[1] == 5 * 37 / 128


@pytest.mark.parametrize(
    ("weight_format", "bytes_per_weight"),
    [(WeightFormat.NATIVE, 2), (WeightFormat.INT8, 1.0625 + 2 + 2), (WeightFormat.INT4, 0.5625 + 2 + 2)],
)
def test_matrices_stream_their_weights_widened_first(weight_format: WeightFormat, bytes_per_weight: float) -> None:
    """Stored ones are read, wide ones written and read: by a captured step's kernel, or as torch widens."""
    plan = in_hbm(make_setting(output=2, weight_format=weight_format))

    assert op(plan, "qkv") == pytest.approx([768 * bytes_per_weight / 512] * 2)
    assert op(plan, "out") == op(plan, "mlp") == pytest.approx([256 * bytes_per_weight / 512] * 2)
    assert op(plan, "qkv", widening_efficiency=0.5) == op(plan, "qkv")
    eager = in_hbm(make_setting(Selector.H2O, output=2, sparsity=0.5, weight_format=weight_format))
    widened_s = 768 * (bytes_per_weight - 2) / 512
    assert op(eager, "qkv", widening_efficiency=0.5) == pytest.approx([768 * 2 / 512 + 2 * widened_s] * 2)
    assert op(eager, "qkv", elementwise_efficiency=0.5) == op(plan, "qkv")


def test_prefill_takes_long_batches_in_several_passes() -> None:
    """100 prompts of 128 tokens: 64 fit a pass, so two passes of 6400 rows; 512 FLOP a row of the output matrix.

    Each launches three kernels, and six of its own, of which passes of 7,520 s leave hardly any to be felt. Attention has half of
    each square, or two tiles a prompt of which a multiprocessor takes 9,000 s for 16 of its 128 channels, 10 at a time.
    """
    machine = make_machine(flop_per_s=512.0, launch_s=1.0)
    setting = make_setting(batch=100, prompt=128, output=1, machine=machine)

    assert op(in_hbm(setting), "out", gemm_half_rows=10) == [2 * (6400 + 10)]
    felt_s = hypot(6, 6400 * 1.175) - 6400 * 1.175
    assert op(in_hbm(setting), "launch", kernels_per_layer=3) == [pytest.approx(2 * (3 + felt_s))]
    assert op(in_hbm(setting), "attention") == [2 * 100 * 16 * 128**2 / 512]
    assert op(in_hbm(setting), "attention", prompt_tile_s=16000.0) == [100 * 2 * 9000 / 10]
    eager = in_hbm(make_setting(batch=100, prompt=128, output=1, machine=machine, host_attention=True))
    assert op(eager, "launch", kernels_per_layer=3) == [2 * 3]


@pytest.mark.parametrize(
    ("shape", "kernels", "passed"),
    [({"positions": 64}, 3, 2 * 4 * 16), ({}, 4, 2 * 4 * 16 + 2.4 * 32), ({"gated_mlp": True}, 5, 152 + 2.4 * 32)],
)
@pytest.mark.parametrize("batch", [1, 64])
def test_what_runs_between_products_where_a_step_decodes(
    shape: dict[str, Any], kernels: int, passed: float, batch: int
) -> None:
    """Kernels of 1 s, one each for rotation and gate besides; each row's entries, of 2 bytes, pass HBM: twice 4 times a norm's 16
    with the sum before it, a rotation's 32 2.4 times, and a gate's 8 three times.
    """
    setting = make_setting(batch=batch, output=2, model=make_model(**shape), machine=make_machine(launch_s=1.0))

    found = op(in_hbm(setting), "launch", kernels_per_layer=3)[1]

    assert found == pytest.approx(kernels + batch * 2 * passed / 512)


def test_the_head_ends_every_step() -> None:
    """512 bytes of it in 1 s, or 512 FLOP a sequence at 64 a second; and what a step costs besides."""
    one = times_of(in_hbm(make_setting(output=2)), make_cost(step_overhead_s=5.0))
    four = times_of(in_hbm(make_setting(batch=4, output=2, machine=slow_arithmetic())))

    assert one.head_s.tolist() == [6, 6]
    assert four.head_s.tolist() == [32, 32]


WINDOW: dict[str, Any] = {"selector": Selector.SWA, "prompt": 8, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("changes", "branches"),
    [
        (WINDOW, True),
        (WINDOW | {"placement": Placement.RESIDENT}, True),
        (WINDOW | {"selector": Selector.PAGES, "placement": Placement.RESIDENT}, False),  # chooses later
        ({}, False),
        ({"recompute": Recompute.TOKENS}, False),
    ],
)
@pytest.mark.parametrize("layers", [2, 6])
def test_a_step_joins_the_branch_of_its_choices_once(changes: dict[str, Any], branches: bool, layers: int) -> None:
    """7 s of a step, whatever its layers and sequences: as it ends, and in no layer of it."""
    setting = make_setting(**{"batch": 3, "output": 3, "model": make_model(layers=layers)} | changes)
    plan = in_hbm(setting)

    joined, free = (times_of(plan, make_cost(branch_s=seconds)) for seconds in (7.0, 0.0))

    assert (joined.head_s - free.head_s).tolist() == [7 * branches] * 3
    assert joined.layer_s.tolist() == free.layer_s.tolist()
    joined_s, free_s = (forecast(plan, make_cost(branch_s=seconds)).outcome.makespan_s for seconds in (7.0, 0.0))
    assert joined_s - free_s == pytest.approx(3 * 7 * branches)


@pytest.mark.parametrize("changes", [{"write_back": WriteBack.AT_BIRTH}, {"selector": Selector.H2O}])
def test_no_plan_is_the_better_for_being_launched_kernel_by_kernel(changes: dict[str, Any]) -> None:
    """Its choices are priced as if they joined a step too; a CPU has no branch."""
    setting = make_setting(**WINDOW | {"output": 3} | changes)
    machine = replace(
        setting.machine, gpu=replace(setting.machine.gpu, link=replace(setting.machine.gpu.link, name=CPU_LINK))
    )
    assert not is_captured(setting)

    for one, branch_s in ((setting, 7), (replace(setting, machine=machine), 0)):
        joined, free = (times_of(in_hbm(one), make_cost(one.machine, branch_s=seconds)) for seconds in (7.0, 0.0))
        assert (joined.head_s - free.head_s).tolist() == [branch_s] * 3


def test_operations_belong_to_one_segment_each_and_add_up() -> None:
    plan = newest_in_hbm(make_setting(Selector.TOPK, prompt=8, sparsity=0.5, machine=slow_arithmetic()), slots=4)
    times = times_of(plan)

    assert sorted(times.ops) == sorted((*QUERY_OPS, *ATTEND_OPS, *REST_OPS))
    for names, total in ((QUERY_OPS, times.query_s), (ATTEND_OPS, times.attend_s), (REST_OPS, times.rest_s)):
        assert total.tolist() == pytest.approx(sum(times.ops[name] for name in names).tolist())
    in_turn_s = times.query_s + times.attend_s + times.rest_s + times.in_line_s
    assert times.layer_s.tolist() == pytest.approx(in_turn_s.tolist())


@pytest.mark.parametrize(
    ("guess_hits", "ahead", "exposed"), [(None, 0.0, 1.0), (0.75, 1.0, 0.25), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0)]
)
def test_a_wrong_guess_is_fetched_in_vain_and_corrected(guess_hits: float | None, ahead: float, exposed: float) -> None:
    setting = make_setting(Selector.TOPK, prompt=8, output=2, sparsity=0.5, guess_hits=guess_hits)
    times = times_of(newest_in_hbm(setting, slots=2))

    picks_bytes = 2 * 64  # all older tokens are on the host
    assert times.prefetch_bytes.tolist() == [0, ahead * picks_bytes]
    assert times.correct_bytes.tolist() == [0, exposed * picks_bytes]
    assert (times.prefetch_s[1], times.correct_s[1]) == (ahead * 2, exposed * 2)


def test_a_prefill_writes_in_line_what_it_does_not_keep() -> None:
    """6 of 7 tokens have no slot and a seventh leaves: 448 bytes at 64 a second; decode steps write beside later layers."""
    setting = make_setting(prompt=7, output=3, write_back=WriteBack.AT_EVICTION)
    held, spilled = times_of(in_hbm(setting)), times_of(newest_in_hbm(setting, slots=1))

    assert held.in_line_s.tolist() == [0, 0, 0]
    assert spilled.in_line_s.tolist() == [7, 0, 0]
    assert spilled.layer_s[0] == held.layer_s[0] + 7
    assert spilled.layer_s[1:].tolist() == held.layer_s[1:].tolist()
    assert spilled.write_s.tolist() == [0, 1, 0]
    assert spilled.write_bytes.tolist() == [7 * 64, 64, 0]


@pytest.mark.parametrize("captured", [True, False])
def test_kernels_write_a_prompt_whether_or_not_steps_are_captured(captured: bool) -> None:
    """They start in 2 s and keep half the link's rate: 2 + 7 / 0.5; exact top-k is launched operation by operation."""
    setting = make_setting(**({} if captured else {"selector": Selector.TOPK, "sparsity": 0.5}), prompt=7, output=3)
    cost = make_cost(gather_setup_s=2.0, gather_link_efficiency=0.5)

    times = times_of(newest_in_hbm(setting, slots=setting.slots_needed[0]), cost)

    moved = times.write_bytes[0] / 64
    assert is_captured(setting) == captured
    assert moved > 0
    assert times.in_line_s.tolist() == [2 + 2 * moved, 0, 0]


def test_what_the_cpu_attends_to_is_copied_to_its_own_memory() -> None:
    """A copy starts in 3 s, the kernels' constants do not matter."""
    setting = make_setting(prompt=7, output=3, host_attention=True)
    cost = make_cost(copy_setup_s=3.0, gather_setup_s=2.0, gather_link_efficiency=0.5)

    assert times_of(newest_in_hbm(setting, slots=1), cost).in_line_s.tolist() == [3 + 7, 0, 0]


def test_streamed_weights_slow_a_prompts_write() -> None:
    """1280 bytes of weights come while 448 are written, at half the rate each: 7 s more for both."""
    setting = make_setting(prompt=7, output=3, weights_on_host=0.5)
    cost = make_cost(link_duplex_efficiency=0.5)

    times, still = (times_of(plan, cost) for plan in (newest_in_hbm(setting, slots=1), in_hbm(setting)))

    assert times.in_line_s.tolist() == [14, 0, 0]
    assert times.prefetch_s[0] == still.prefetch_s[0] + 7

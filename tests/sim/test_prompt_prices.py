"""Prompts that pass through a layer: a prefill's, in passes, and beginnings that are forwarded anew, by a price that is convex.

The tiny model's matrices take 3, 1 and 1 s to stream and 1536, 512 and 512 FLOP a row; a row's passes between them 1.175 s
where a plan is captured, 3.9375 s launched kernel by kernel.
"""

from math import ceil, exp, hypot
from typing import Any

import numpy as np
import pytest

from builders import hypotenuse, make_cost, make_machine, make_setting
from sim import catalogue
from sim.capture import captures_prefill, forwarded_tokens, is_captured
from sim.cost import CostModel, Pieces
from sim.kv import KvFormat, KvFormats
from sim.layer_prices import layer_prices
from sim.plan import Recompute, Setting, WriteBack
from sim.profile import Profile
from sim.prompt_prices import forwarded, prefill_passes, prefill_s
from sim.spec import MachineSpec

EAGER: dict[str, Any] = {"kv_format": KvFormats(gpu=KvFormat.INT8)}  # tokens of another format on the host
FLOP_PER_S = 512.0


def test_a_prefill_takes_whole_prompts_as_many_as_fit_8192_rows_in_a_pass() -> None:
    assert [prefill_passes(sequences, 100) for sequences in (1, 81, 82, 162, 163)] == [1, 1, 2, 2, 3]
    assert [prefill_passes(sequences, 8193) for sequences in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "rows", "passed_s", "begun_s"),
    [
        ({}, 6016, 1.175, hypot(6 * 200, 6000 * 1.175) - 6000 * 1.175),  # made up to 47 times 128
        ({"host_attention": True}, 6000, 3.9375, 0.0),
    ],
)
def test_each_pass_of_a_prefill_multiplies_its_rows_and_launches_its_kernels(
    changes: dict[str, Any], rows: int, passed_s: float, begun_s: float
) -> None:
    """120 prompts of 100 tokens: two passes of 6000 rows. Kernels of 200 s, three and what six more add to the passes between
    products, and 90 operations of 4 s that begin a wave of two layers.

    Attention has half of each square, whatever the passes.
    """
    machine = make_machine(flop_per_s=FLOP_PER_S, launch_s=200.0)
    setting = make_setting(batch=120, prompt=100, machine=machine, **changes)
    assert is_captured(setting) == (not changes)
    assert not captures_prefill(setting)

    seconds = prefill_s(make_cost(machine, kernels_per_layer=3.0, host_operation_s=4.0), setting, 120)

    assert seconds == pytest.approx(
        {
            "qkv": 2 * 3 * rows,
            "out": 2 * 1 * rows,
            "mlp": 2 * 1 * rows,
            "attention": 120 * 16 * 2 * 100**2 / 512,
            "norms": 12000 * passed_s,
            "launch": 2 * (3 * 200 + begun_s) + 90 * 4 / 2,
            "convert": 0.0,
            "select": 0.0,
        },
        rel=1e-12,
    )


def test_a_prefill_of_one_pass_is_a_graph_of_few_rows_as_they_are() -> None:
    """Three prompts of 50 tokens in one pass of 150 rows, attended to by tiles of 64: 0.9 s of ten multiprocessors each."""
    machine = make_machine(flop_per_s=FLOP_PER_S, launch_s=2.0)
    setting = make_setting(batch=3, prompt=50, machine=machine)
    cost = make_cost(machine, kernels_per_layer=3.0, host_operation_s=4.0, prompt_tile_s=16000.0)
    assert captures_prefill(setting)

    seconds = prefill_s(cost, setting, 3)

    assert [seconds[name] for name in ("qkv", "out", "mlp")] == [3 * 150, 150, 150]
    assert seconds["attention"] == pytest.approx(3 * 900)
    passed_s = 150 * 1.175
    assert seconds["launch"] == pytest.approx(3 * 2 + hypot(6 * 2, passed_s) - passed_s + 16 * 4 / 2)


@pytest.mark.parametrize("recompute", [one for one in Recompute if one is not Recompute.TOKENS])
def test_what_no_setting_forwards_costs_nothing(recompute: Recompute) -> None:
    setting = make_setting(machine=make_machine(flop_per_s=FLOP_PER_S), recompute=recompute)

    assert price(setting) == Pieces(pieces=((0.0, 0.0),), free_at_zero=True)
    assert layer_prices(make_cost(setting.machine), setting, 1).forward == price(setting)


def price(setting: Setting, sequences: int = 1, *, layer_steps: int | None = 10, **constants: float) -> Pieces:
    """Of a prefix, beside 2 s of a layer's other work."""
    cost = make_cost(setting.machine, **constants)
    return forwarded(cost, setting, sequences, beside_s=2.0, layer_steps=layer_steps)


def forwarding(sequences: int, prompt: int, **changes: Any) -> Setting:
    machine = make_machine(flop_per_s=FLOP_PER_S, launch_s=2.0)
    return make_setting(batch=sequences, prompt=prompt, machine=machine, recompute=Recompute.TOKENS, **changes)


def seconds_of(sequences: int, tokens: int, *, captured: bool, tile_s: float = 0.0) -> float:
    """Of so many tokens through a layer: products, attention, passes, and three kernels' launches of 2 s; captured two more, and
    six that are felt beside the passes as the other side of a triangle.
    """
    rows = sequences * tokens
    multiplied = 128 * ceil(rows / 128) if captured and rows > 256 else rows
    products_s = hypotenuse(3, 3 * multiplied) + 2 * hypotenuse(1, multiplied)
    attention_s = sequences * max(2 * 16 * tokens**2 / 512, tile_s * ceil(tokens / 64))
    if captured:
        return products_s + attention_s + hypot(rows * 1.175, 6 * 2) + 2 * (3 + 2)
    return products_s + attention_s + rows * 3.9375 + 2 * 3


def evened_out(seconds: list[float], neighbours: int) -> list[float]:
    """Each the mean of itself and half so many on each side."""
    around = [seconds[max(0, at - neighbours // 2) : at + neighbours // 2 + 1] for at in range(len(seconds))]
    return [sum(some) / len(some) for some in around]


def hull_below(seconds: list[float]) -> list[float]:
    """Of prices of 1, 2, 3 ...: the lowest chord over each, by trying all."""
    found = list(seconds)
    for first in range(len(seconds)):
        for last in range(first + 2, len(seconds)):
            slope = (seconds[last] - seconds[first]) / (last - first)
            for at in range(first + 1, last):
                found[at] = min(found[at], seconds[first] + slope * (at - first))
    return found


@pytest.mark.parametrize(
    ("sequences", "neighbours"),
    [
        (1, 128),  # so that 128 rows are multiplied together
        (2, 64),
        (3, 43),
        (16, 8),
        (40, 8),  # and eight at least, as many as are made up
    ],
)
def test_a_captured_prefix_is_evened_out_and_its_price_the_hull_below(sequences: int, neighbours: int) -> None:
    """What is forwarded is a multiple of 8, or all of the prompt; the hull's corners may stand out by half a percent. The few
    that are forwarded as they are do not count, they cost what the first piece says of them.
    """
    prompt = 90
    made_up = [min(prompt, 8 * ceil(tokens / 8)) for tokens in range(8, prompt + 1)]
    each_s = [seconds_of(sequences, tokens, captured=True, tile_s=9.0) for tokens in made_up]
    setting = forwarding(sequences, prompt)
    assert is_captured(setting)

    pieces = price(setting, sequences, kernels_per_layer=3.0, prompt_tile_s=160.0)

    hull_s = np.array(hull_below(evened_out(each_s, neighbours)))
    priced_s = pieces.at(np.arange(8.0, prompt + 1))
    assert (priced_s >= hull_s * (1 - 1e-9)).all()
    assert (priced_s <= hull_s * (1.005 + 1e-9)).all()
    assert [priced_s[0], priced_s[-1]] == pytest.approx([hull_s[0], hull_s[-1]], rel=1e-9)
    slope_s = min(one[1] for one in pieces.pieces)
    assert pieces.at_one(1) == pytest.approx(pieces.at_one(8) - 7 * slope_s)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_prefix_launched_kernel_by_kernel_is_forwarded_as_long_as_it_is(sequences: int) -> None:
    """Convex as it is, but where another tile begins, and evened out over nothing."""
    each_s = [seconds_of(sequences, tokens, captured=False, tile_s=9.0) for tokens in range(1, 91)]
    setting = forwarding(sequences, 90, **EAGER)
    assert not is_captured(setting)

    pieces = price(setting, sequences, kernels_per_layer=3.0, prompt_tile_s=160.0)

    hull_s, priced_s = np.array(hull_below(each_s)), pieces.at(np.arange(1.0, 91.0))
    assert (priced_s >= hull_s * (1 - 1e-9)).all()
    assert (priced_s <= hull_s * (1.005 + 1e-9)).all()
    assert [priced_s[0], priced_s[-1]] == pytest.approx([each_s[0], each_s[-1]], rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, EAGER, {"write_back": WriteBack.AT_BIRTH}, {"prompt": 1}, {"prompt": 700}, {"sequences": 40}],
)
def test_no_prefix_is_free_and_more_tokens_cost_ever_more(changes: dict[str, Any]) -> None:
    """By the convexity that a program needs: no more can be saved by two prefixes than by one between them."""
    shape = {"sequences": 2, "prompt": 60} | changes
    setting = forwarding(**shape)

    pieces = price(setting, shape["sequences"], kernels_per_layer=3.0)

    counts = np.arange(0.0, shape["prompt"] + 1)
    seconds = pieces.at(counts)
    assert pieces.free_at_zero
    assert seconds.tolist() == [pieces.at_one(count) for count in counts]
    assert seconds[0] == 0 < seconds[1]
    growth = np.diff(seconds[1:])
    assert (growth >= -1e-9 * seconds[-1]).all()
    assert (np.diff(growth) >= -1e-9 * seconds[-1]).all()


def test_a_price_is_told_in_few_pieces() -> None:
    """Each is a constraint of the program, in every step and wave: of a model and a card that are real."""
    machine = MachineSpec(name="a100", gpu=catalogue.gpu("a100-40g"), host=catalogue.host())
    model = catalogue.model("llama-3-8b")
    setting = make_setting(batch=16, prompt=2000, machine=machine, model=model, recompute=Recompute.TOKENS)
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))

    assert 2 < len(layer_prices(cost, setting, 16).forward.pieces) < 8


@pytest.mark.parametrize(("changes", "captured"), [({}, True), (EAGER, False)])
def test_of_a_long_prompt_some_numbers_tell_the_price_of_all(changes: dict[str, Any], captured: bool) -> None:
    """Of 4,000 tokens the first 2,048, then whole tiles, a hundredth further each time.

    Convex between where 257 rows are made up to 384 and the end, where means are of fewer, of shorter prefixes.
    """
    prompt = 4000
    made_up = [min(prompt, 8 * ceil(tokens / 8)) for tokens in range(8, prompt + 1)]
    counts = made_up if captured else range(1, prompt + 1)
    each_s = [seconds_of(1, tokens, captured=captured, tile_s=9.0) for tokens in counts]
    setting = forwarding(1, prompt, **changes)

    pieces = price(setting, kernels_per_layer=3.0, prompt_tile_s=160.0)

    priced_s = pieces.at(np.arange(8.0 if captured else 1.0, prompt + 1))
    shares = priced_s / np.array(evened_out(each_s, 128) if captured else each_s)
    assert (shares <= 1.005 + 1e-9).all()
    assert (shares[255:-128] >= 0.99).all()
    assert shares[-1] == pytest.approx(1.0)


def test_many_numbers_are_made_up_as_each_is() -> None:
    made_up = [1, 2, 3, 4, 5, 6, 7, *[8], *[16] * 8, *[20] * 4]

    assert [forwarded_tokens(count, 20) for count in range(1, 21)] == made_up
    assert forwarded_tokens(np.arange(1.0, 21.0), 20).tolist() == made_up


@pytest.mark.parametrize(("layer_steps", "share"), [(0, 0.0), (4, None), (None, 1.0)])
def test_what_is_forwarded_loses_clocks_as_steps_go_on(layer_steps: int | None, share: float | None) -> None:
    """Products draw all power at half of their rate and other work draws half of it: they fit where a^2 / u = u + R, with
    a of twice their 5 s a row and R half of the rest. Clocks fall as exp(-t / 0.08 s), over as many layers as take 2 s and
    what a prefix of half the tokens takes.
    """
    setting = forwarding(1, 11, **EAGER)
    limit = {"gemm_sustained_share": 0.5, "other_power_share": 0.5, "kernels_per_layer": 3.0}

    pieces = price(setting, layer_steps=layer_steps, **limit)

    each_s = [seconds_of(1, tokens, captured=False) for tokens in range(1, 12)]
    if share is None:
        settled = 4 * (2 + each_s[5]) / 0.08
        share = 1 - (1 - exp(-settled)) / settled
    for tokens in (1, 11):
        products_s = hypotenuse(3, 3 * tokens) + 2 * hypotenuse(1, tokens)
        spared_s = (2 + each_s[tokens - 1] - products_s) / 2
        capped_s = max(5 * tokens, (hypot(spared_s, 2 * 10 * tokens) - spared_s) / 2)
        assert capped_s > 5 * tokens
        assert pieces.at_one(tokens) == pytest.approx(each_s[tokens - 1] + share * (capped_s - 5 * tokens), rel=1e-9)


def test_a_layers_price_of_a_prefix_is_told_once_for_a_waves_steps() -> None:
    """Beside its products, and attention to all that is cached at most, over all decode steps of all layers."""
    setting = forwarding(2, 12)
    cost: CostModel = make_cost(setting.machine, gemm_sustained_share=0.5, other_power_share=0.5)

    prices = layer_prices(cost, setting, 2)

    beside_s = prices.qkv_s + prices.out_s + prices.mlp_s + prices.attention_s_per_kept_away * 15
    assert setting.workload.cached_tokens == 15
    assert prices.forward == forwarded(cost, setting, 2, beside_s=beside_s, layer_steps=2 * 3)
    assert prices.forward != forwarded(cost, setting, 2, beside_s=beside_s, layer_steps=None)

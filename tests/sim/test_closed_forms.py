"""The engine against arithmetic: cases whose time can be written down from datasheet numbers alone.

Nothing here asks ``sim`` for a price. One card: 1.5 TB/s of HBM, 300 TFLOP/s, 10 multiprocessors, 2 us a launch;
4 layers, hidden 1024, 8 heads of 128 that share 2 heads of keys and values, gated feed-forward of 4096; the nominal profile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import hypot
from typing import Any

import pytest

from builders import hypotenuse, in_hbm, make_machine, make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.outcome import Outcome
from sim.plan import Plan, Setting, WriteBack
from sim.profile import Profile

LAYERS, HIDDEN, QUERY, KV, MLP, VOCAB = 4, 1024, 1024, 256, 4096, 2000
SEQUENCES, PROMPT, OUTPUT = 8, 64, 16
HBM, FLOPS, DRAM = 1.5e12, 3e14, 150e9
LAUNCH, MULTIPROCESSORS = 2e-6, 10
KV_BYTES = 2 * KV * 2  # key and value of one token in one layer, fp16
LAYER_WEIGHTS = HIDDEN * (QUERY + 2 * KV) + QUERY * HIDDEN + 3 * HIDDEN * MLP
DECODE = range(1, OUTPUT)


@dataclass(frozen=True)
class Layer:
    """GPU seconds of a layer until its query is known, of its attention, and after it."""

    query_s: float
    attend_s: float
    rest_s: float

    @property
    def seconds(self) -> float:
        return self.query_s + self.attend_s + self.rest_s


def gemm_s(rows: float, inputs: int, outputs: int) -> float:
    """Streaming the weights at 85 % of HBM's rate, and arithmetic at rows / (rows + 8) of 78 % of the peak."""
    return hypotenuse(
        inputs * outputs * 2 / (HBM * 0.85),
        2 * inputs * outputs * rows / (FLOPS * 0.78 * rows / (rows + 8)),
    )


def layer_of(rows: int, attend_s: float, kernels: int = 12) -> Layer:
    """Ten kernels are launched; where a step decodes, one more each for rotation and gate."""
    return Layer(
        query_s=gemm_s(rows, HIDDEN, QUERY + 2 * KV),
        attend_s=attend_s,
        rest_s=gemm_s(rows, QUERY, HIDDEN) + gemm_s(rows, HIDDEN, 3 * MLP) + kernels * LAUNCH,
    )


def prefill_layer(sequences: int = SEQUENCES, *, captured: bool = True) -> Layer:
    """One pass over all prompts. Causal attention takes a multiprocessor 3.3 us for each head's 64 queries: longer than its
    arithmetic, half the square at half the peak. Where steps are captured six kernels more begin, felt beside the passes
    between products as the other side of a triangle.

    Between the products a token's entries pass HBM. At 55 % of its rate: root mean squares in float32 read and write 12,
    the rotation 14, the activation and its product with the gate 6.5. At 80 %: residual sums 3, keys and values 2 each
    where they are stored. Where steps are captured all pass at 80 %: a norm is 2, with the sum before it 4, the rotation
    2.4, a gate 3.
    """
    tiles_s = sequences * 8 * (PROMPT / 64) * 3.3e-6 / MULTIPROCESSORS
    assert tiles_s > 2 * sequences * QUERY * PROMPT**2 / (FLOPS * 0.5)
    layer = layer_of(sequences * PROMPT, tiles_s, kernels=10)
    busy, plain = 2 * 12 * HIDDEN + 14 * (QUERY + KV) + 6.5 * MLP, 2 * 3 * HIDDEN + 2 * (2 * KV)
    if captured:
        busy, plain = 0, (2 + 4 + 3) * HIDDEN + 2.4 * (QUERY + KV) + 3 * MLP + 2 * (2 * KV)
    passed_s = sequences * PROMPT * 2 * (busy / (HBM * 0.55) + plain / (HBM * 0.8))
    between_s = hypot(6 * LAUNCH, passed_s) if captured else passed_s
    return replace(layer, rest_s=layer.rest_s + between_s)


def attention_s(tokens: float, sequences: int = SEQUENCES) -> float:
    """Reading keys and values at 80 % of HBM's rate; 4 heads share them, which is not yet work for the arithmetic.

    That is all where a step is launched kernel by kernel.
    """
    by_reading, by_arithmetic = (
        sequences * tokens * KV_BYTES / (HBM * 0.8),
        4 * sequences * tokens * QUERY / FLOPS / 0.5,
    )
    assert by_reading > by_arithmetic
    return by_reading


def in_parts_s(tokens: float, sequences: int = SEQUENCES) -> float:
    """Of a captured step: 16 programs go over each key head's tokens, four on a multiprocessor; two launches' time for each round
    of them, and reading, 5 % more than one row after the other takes. Both are felt, on a line from the first step to the last.
    """
    rounds = sequences * 2 * 16 / (4 * MULTIPROCESSORS)
    assert rounds > 1
    few, most = PROMPT + 1, PROMPT + OUTPUT - 1
    at_few_s, at_most_s = (hypot(2 * LAUNCH * rounds, 1.05 * attention_s(n, sequences)) for n in (few, most))
    return at_few_s + (at_most_s - at_few_s) * (tokens - few) / (most - few)


def in_pieces_s(tokens: float, sequences: int = SEQUENCES) -> float:
    """Of one replayed in pieces: a sequence's tokens in turn, 20 ns each; that and the reading are felt. A piece begins after
    15 us. In no step it takes less than with all in HBM.
    """

    def own_s(tokens: float) -> float:
        return hypot(attention_s(tokens, sequences), 20e-9 * tokens) + 15e-6

    ends = (PROMPT + 1, PROMPT + OUTPUT - 1)
    return own_s(tokens) + max(0.0, *(in_parts_s(end, sequences) - own_s(end) for end in ends))


def decode_layer(step: int, sequences: int = SEQUENCES, attend_s: Callable[[float, int], float] = in_parts_s) -> Layer:
    """Where it is captured a row's two norms, with the sums before them, its rotation and its gate pass HBM at 80 % of the rate."""
    layer = layer_of(sequences, attend_s(PROMPT + step, sequences))
    passed_s = sequences * 2 * (2 * 4 * HIDDEN + 2.4 * (QUERY + KV) + 3 * MLP) / (HBM * 0.8)
    return replace(layer, rest_s=layer.rest_s + passed_s)


def head_s(sequences: int = SEQUENCES) -> float:
    return gemm_s(sequences, HIDDEN, VOCAB) + 60e-6


def all_computed_s(
    sequences: int = SEQUENCES, attend_s: Callable[[float, int], float] = in_parts_s
) -> tuple[float, float]:
    """Prefill and decode seconds when the GPU never waits."""
    prefill_s = LAYERS * prefill_layer(sequences).seconds + head_s(sequences)
    decode_s = sum(LAYERS * decode_layer(step, sequences, attend_s).seconds + head_s(sequences) for step in DECODE)
    return prefill_s, decode_s


def setting_of(selector: Selector = Selector.DENSE, link_bytes_per_s: float = 30e9, **changes: Any) -> Setting:
    machine = make_machine(
        hbm_bytes_per_s=HBM,
        flop_per_s=FLOPS,
        launch_s=LAUNCH,
        sm_count=MULTIPROCESSORS,
        link_bytes_per_s=link_bytes_per_s,
        dram_bytes_per_s=DRAM,
        host_flop_per_s=1e12,
    )
    model = make_model(
        layers=LAYERS,
        hidden=HIDDEN,
        intermediate=MLP,
        heads=8,
        kv_heads=2,
        head_dim=128,
        gated_mlp=True,
        vocab=VOCAB,
        embedding_dim=HIDDEN,
    )
    shape = {"batch": SEQUENCES, "prompt": PROMPT, "output": OUTPUT}
    return make_setting(selector, machine=machine, model=model, **(shape | changes))


def run(plan: Plan) -> Outcome:
    machine = plan.setting.machine
    return simulate(plan, CostModel(machine=machine, profile=Profile.nominal(machine))).outcome


def close(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-9)


def test_all_in_hbm_takes_every_layer_in_turn() -> None:
    prefill_s, decode_s = all_computed_s()

    outcome = run(in_hbm(setting_of()))

    assert outcome.makespan_s == close(prefill_s + decode_s)
    assert outcome.ttft_s == close(prefill_s)
    assert outcome.tpot_s == close(decode_s / (OUTPUT - 1))
    assert outcome.tokens_per_s == close(SEQUENCES * OUTPUT / (prefill_s + decode_s))
    assert (outcome.h2d_bytes, outcome.d2h_bytes) == (0, 0)
    assert (outcome.utilisation.gpu, outcome.utilisation.h2d, outcome.utilisation.d2h) == (close(1), 0, 0)


def test_waves_add_up_and_later_ones_wait_for_earlier_ones() -> None:
    """Eight sequences, three at once: two full waves and one of two."""
    full, rest = all_computed_s(3), all_computed_s(2)

    outcome = run(in_hbm(setting_of(concurrency=3)))

    assert outcome.makespan_s == close(2 * sum(full) + sum(rest))
    first_tokens_s = 3 * full[0] + 3 * (sum(full) + full[0]) + 2 * (2 * sum(full) + rest[0])
    assert outcome.ttft_s == close(first_tokens_s / 8)
    assert outcome.tpot_s == close((6 * full[1] + 2 * rest[1]) / 8 / (OUTPUT - 1))


def prompt_write_s(tokens: float, link_bytes_per_s: float = 30e9) -> float:
    """A layer's part of the prompt, written in line by kernels: 5 us, then 92 % of a large copy's rate."""
    return 5e-6 + tokens * SEQUENCES * KV_BYTES / (link_bytes_per_s * 0.86 * 0.92)


def test_a_fast_link_hides_all_fetches() -> None:
    """Bound by the GPU: beside it costs nothing what is fetched and written back, but for the prompt, which it writes."""
    prefill_s, decode_s = all_computed_s(attend_s=in_pieces_s)

    outcome = run(newest_in_hbm(setting_of(link_bytes_per_s=1e12), slots=60))

    assert outcome.makespan_s == close(prefill_s + LAYERS * prompt_write_s(PROMPT + 1 - 60, 1e12) + decode_s)
    fetched = sum(PROMPT + step - 60 for step in DECODE)
    assert outcome.h2d_bytes == SEQUENCES * LAYERS * KV_BYTES * fetched
    assert outcome.d2h_bytes == SEQUENCES * LAYERS * KV_BYTES * (PROMPT - 60 + OUTPUT - 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_slow_link_is_busy_from_the_first_write_back_to_the_last_fetch(depth: int) -> None:
    """Bound by the link: each layer of the prefill waits for its write-back, then every step fetches 4 to 18 tokens.

    Each way keeps 88 % of its rate while both run, for as many bytes as the lesser of them moves. Between two fetches the
    copy engine waits 10 us for streams to agree.
    """
    link = 1e8
    rate = link * 0.86

    def copy_s(tokens: float, opposite: float) -> float:
        slowed = min(tokens, opposite) * SEQUENCES * KV_BYTES * (0.12 / 0.88) / rate
        return 8e-6 + tokens * SEQUENCES * KV_BYTES / rate + slowed

    fetch_s = [10e-6 + copy_s(PROMPT + step - 60, 1) for step in DECODE]
    last = decode_layer(OUTPUT - 1, attend_s=in_pieces_s)
    spilled_s = prefill_layer().seconds + prompt_write_s(PROMPT, link)
    spill_s = LAYERS * spilled_s + head_s()  # the first step's first layers arrive meanwhile
    fetches_s = LAYERS * sum(fetch_s) - depth * fetch_s[0]
    end_s = copy_s(1, PROMPT + OUTPUT - 1 - 60)  # the last token is written back too, longer than the head takes
    assert end_s > head_s()

    plan = newest_in_hbm(
        setting_of(link_bytes_per_s=link, write_back=WriteBack.AT_BIRTH, prefetch_layers=depth), slots=60
    )
    outcome = run(plan)

    assert outcome.makespan_s == close(spill_s + fetches_s + last.attend_s + last.rest_s + end_s)
    assert outcome.ttft_s == close(spill_s)


def test_recall_waits_for_every_layers_query() -> None:
    """Exact top-k, nothing guessed: score all keys, fetch the picks that are on the host, gather and attend, in turn."""
    setting = setting_of(Selector.TOPK, sparsity=0.75)
    counts = setting.token_counts
    seconds = LAYERS * (prefill_layer(captured=False).seconds + prompt_write_s(31)) + head_s()
    spilled = 30  # slots for 34 of the 64 prompt tokens: 30 are on the host at first, one more at every step
    for step in DECODE:
        local, selected, older = counts.local[step], counts.selected[step], PROMPT + step - counts.local[step]
        fetched = selected * (spilled + step) / older
        exposed_s = max(10e-6, 8e-6 + fetched * SEQUENCES * KV_BYTES / (30e9 * 0.86))
        written = 1 if step < OUTPUT - 1 else 0
        exposed_s += min(fetched, written) * SEQUENCES * KV_BYTES * (0.12 / 0.88) / (30e9 * 0.86)
        score_s = 4 * LAUNCH + SEQUENCES * (PROMPT + step) * (KV * 2 + 16) / (HBM * 0.6)
        gather_s = 2 * selected * SEQUENCES * KV_BYTES / (HBM * 0.6)
        layer = layer_of(SEQUENCES, gather_s + attention_s(local + selected))
        seconds += LAYERS * (score_s + exposed_s + layer.seconds) + head_s()

    outcome = run(newest_in_hbm(setting, slots=34))

    assert outcome.makespan_s == close(seconds)


def test_the_cpu_attends_beside_the_gpu() -> None:
    """A layer ends when both have attended; 30 us for queries and results, KV read at half of DRAM's rate."""
    written_s = 8e-6 + (PROMPT + 1 - 20) * SEQUENCES * KV_BYTES / (30e9 * 0.86)  # to memory of the CPU's own: copied
    seconds = LAYERS * (prefill_layer(captured=False).seconds + written_s) + head_s()
    for step in DECODE:
        on_host = PROMPT + step - 20
        cpu_s = 30e-6 + SEQUENCES * on_host * KV_BYTES / (DRAM * 0.5)
        gpu_s = attention_s(20)
        assert cpu_s > gpu_s
        layer = layer_of(SEQUENCES, max(gpu_s, cpu_s))
        seconds += LAYERS * layer.seconds + head_s()

    outcome = run(newest_in_hbm(setting_of(host_attention=True), slots=20))

    assert outcome.makespan_s == close(seconds)
    assert outcome.h2d_bytes == 0


def test_streamed_weights_bound_every_step() -> None:
    """Half of each layer's weights cross the link at every step, the prefill too; its first layer's wait for nothing.

    A captured step's copies wait for each other's streams. What the half lacks of gate and up, in which it ends, is read from HBM
    and written beside it at 80 % of the rate: of the last layer of all nothing hides that.
    """
    stream_s = 8e-6 + 10e-6 + 0.5 * LAYER_WEIGHTS * 2 / (30e9 * 0.86)
    last = decode_layer(OUTPUT - 1)
    lacking = HIDDEN * (QUERY + 2 * KV) + QUERY * HIDDEN + 2 * HIDDEN * MLP - 0.5 * LAYER_WEIGHTS
    completed_s = 2 * 2 * lacking / (HBM * 0.8)
    assert 0 < lacking < 2 * HIDDEN * MLP
    assert stream_s > prefill_layer().seconds + head_s()

    outcome = run(in_hbm(setting_of(weights_on_host=0.5)))

    last_s = last.attend_s + last.rest_s + completed_s
    assert outcome.makespan_s == close(OUTPUT * LAYERS * stream_s + last_s + head_s())
    assert outcome.h2d_bytes == OUTPUT * LAYERS * LAYER_WEIGHTS


def test_write_backs_trail_where_they_are_the_slowest() -> None:
    """At birth every token is written, all stay in HBM: a decode step is its first layer, then all write-backs; in the
    prefill layers and write-backs take turns.
    """
    link = 1e6
    token_s = 8e-6 + SEQUENCES * KV_BYTES / (link * 0.86)
    seconds = LAYERS * (prefill_layer().seconds + prompt_write_s(PROMPT, link)) + head_s()
    seconds += sum(decode_layer(step, attend_s=in_pieces_s).seconds + LAYERS * token_s for step in DECODE)

    outcome = run(in_hbm(setting_of(link_bytes_per_s=link, write_back=WriteBack.AT_BIRTH)))

    assert outcome.makespan_s == close(seconds)
    assert outcome.d2h_bytes == SEQUENCES * LAYERS * KV_BYTES * (PROMPT + OUTPUT - 1)

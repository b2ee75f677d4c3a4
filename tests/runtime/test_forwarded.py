"""Decoding beside a prefix that has no home and is forwarded anew in each step is eager decoding.

Without a GPU the kernels are interpreted and nothing is captured; graphs are then recorded, which holds them to the same.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from runtime.graph.forwarded import ForwardedSlots, ForwardedStep
from runtime.graph.fused import FusedDecoder
from runtime.graph.run import GraphWave
from runtime.graph.schedule import Widths, schedule_of
from runtime.graph.streamed import StreamedSlots
from runtime.models import Decoder
from sim import catalogue
from sim.capture import forwarded_tokens
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.occupancy import occupancy_of
from sim.plan import Plan, Recompute, WriteBack
from sim.spec import DType, ModelSpec
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, draw_prompts, kernels, padded
from tests.runtime.plans import Choice, all_in_hbm, draw_plan
from tests.runtime.recorded import assert_replayed_alike

FAMILIES = ["opt", "wide opt", "llama", "grouped qwen3"] if ON_GPU else ["opt", "grouped qwen3"]
OUTPUT = 60 if ON_GPU else 9
TOKENS = Choice(batch=3, concurrency=3, prompt=20, output=OUTPUT, recompute=Recompute.TOKENS)


def without_host(spec: ModelSpec, dropped: Sequence[int], choice: Choice = TOKENS) -> Plan:
    """``dropped`` at each step, the last number at those that are left; all else in HBM."""
    whole = all_in_hbm(spec, choice)
    steps = whole.homes.steps
    lost = tuple(dropped[min(row, len(dropped) - 1)] for row in range(steps))
    hbm = tuple(cached - gone for cached, gone in zip(whole.setting.token_counts.cached, lost, strict=True))
    none = (0,) * steps
    return replace(whole, homes=TokenHomes(hbm=hbm, host_kv=none, activations=none, dropped=lost, copies=none))


GROWING = [0, 0, 3, 7, 9, 9, 12, 17, 18, 20]  # none, a few, rounded up, more than one a step, the whole prompt


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [GROWING, [10], range(9, 20)], ids=["growing", "constant", "one a step"])
def test_decoding_beside_a_forwarded_prefix_is_eager_decoding(
    family: str, dtype: DType, dropped: Sequence[int]
) -> None:
    """Of one prompt less is left than is dropped of the others: none of it is attended to."""
    made = decoder(family, dtype, seed=1)
    compare(without_host(made.spec, dropped, replace(TOKENS, dtype=dtype)), made, [20, 17, 3], dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
@pytest.mark.parametrize("seed", range(12 if ON_GPU else 3))
def test_with_more_on_the_host_it_is_too(family: str, dtype: DType, seed: int) -> None:
    """Any homes that move outward, short prompts, KV written at birth or at eviction."""
    made, rng = decoder(family, dtype, seed=seed), random.Random(f"tokens {seed}")
    steps = OUTPUT if ON_GPU else 6
    choice = replace(TOKENS, prompt=rng.randint(9, 20), output=steps, write_back=rng.choice([*WriteBack]), dtype=dtype)
    plan = draw_plan(rng, made.spec, choice)
    longest = plan.setting.workload.prompt_tokens
    compare(plan, made, [longest, rng.randint(1, longest), longest - 1], dtype)


@kernels
def test_a_pass_has_no_more_rows_than_the_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 tokens one prompt; of 12 forwarded ones three together, then the fourth."""
    for module in ("sim.footprint", "runtime.prefill"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK_TOKENS", 40)
    made, rows = decoder("opt", DType.FP32, seed=1), set[int]()
    choice = replace(TOKENS, batch=4, concurrency=4, prompt=20, output=5, dtype=DType.FP32)
    finish = FusedDecoder.finish

    def spy(self: FusedDecoder, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        rows.add(x.shape[0] * x.shape[1])
        return finish(self, layer, x, attended)

    monkeypatch.setattr(FusedDecoder, "finish", spy)
    compare(without_host(made.spec, [16], choice), made, [20, 20, 7, 18], DType.FP32)

    assert {32} <= rows  # two lanes of 16
    assert all(count <= 40 for count in rows)


def run_again(plan: Plan, made: Decoder, lengths: list[int]) -> tuple[GraphWave, torch.Tensor, torch.Tensor]:
    prompts = padded(plan, made, draw_prompts(lengths, seed=2))
    wave = GraphWave(plan, made, prompts.padding.tolist())
    return wave, wave.run(prompts).tokens, wave.step.logits.clone()


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
def test_a_graph_captured_at_one_row_is_right_at_all_of_its_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each number of forwarded tokens, for waves of any lengths."""
    made = decoder(family, DType.FP32, seed=5)
    choice = replace(TOKENS, batch=2, concurrency=2, output=6, dtype=DType.FP32)
    plan = without_host(made.spec, [0, 0, 3, 9, 12, 18], choice)
    wave = GraphWave(plan, made, [0, 15])
    others = padded(plan, made, draw_prompts([20, 20], seed=8))
    unpadded = wave.run(others).tokens

    replays = assert_replayed_alike(wave, padded(plan, made, draw_prompts([20, 5], seed=2)), monkeypatch)

    assert isinstance(wave.step, ForwardedStep)
    assert {tokens: once for (tokens, _), [once] in zip(wave.step.graphs, replays, strict=True)} == {
        0: 1,
        3: 1,
        16: 2,
        20: 1,
    }
    torch.testing.assert_close(wave.run(others).tokens, unpadded, atol=0, rtol=0)


@kernels
@pytest.mark.skipif(not ON_GPU, reason="a GPU captures")
def test_a_gpu_has_a_graph_for_each_number_of_forwarded_tokens() -> None:
    made = decoder("opt", DType.FP32, seed=5)
    wave, _, _ = run_again(
        without_host(made.spec, GROWING, replace(TOKENS, output=10, dtype=DType.FP32)), made, [20, 5, 20]
    )

    assert isinstance(wave.step, ForwardedStep)
    assert sorted(tokens for tokens, _ in wave.step.graphs) == [0, 3, 7, 16, 20]


@pytest.mark.parametrize(
    ("dropped", "forwarded"), [(0, 0), (1, 1), (7, 7), (8, 8), (9, 16), (16, 16), (17, 20), (20, 20)]
)
def test_more_than_a_few_tokens_are_rounded_up_but_not_past_the_prompt(dropped: int, forwarded: int) -> None:
    assert forwarded_tokens(dropped, 20) == forwarded


@pytest.mark.parametrize("model", ["OPT-125M", "LLaMA-3-8B"])
@pytest.mark.parametrize("dropped", [GROWING, [10], [1], [9, 9, 15]])
def test_the_block_is_no_larger_than_the_plan_says(model: str, dropped: Sequence[int]) -> None:
    """Tokens that are forwarded to make the number up find room where the plan has layer inputs, which lie elsewhere."""
    spec = catalogue.model(model)
    plan = without_host(spec, dropped, replace(TOKENS, output=10, dtype=DType.FP16))
    columns = home_columns(plan.homes)
    held, kv = occupancy_of(plan, columns, flows_of(plan, columns)).hbm.max(), 2 * spec.kv_dim

    made = schedule_of(plan, Widths(slot=spec.layers * kv, kv=kv, again=kv, inputs=0, buffers=2), rounded=True)

    assert made.elements * 2 <= held
    for row in made.rows.values():
        assert row.recomputed <= row.layout.recomputed <= 20
        staged = row.layout.recomputed * 2 * spec.kv_dim
        assert len(row.positions) * spec.layers * 2 * spec.kv_dim + staged <= made.elements


@kernels
def test_steps_may_be_reached_out_of_order() -> None:
    """As sampled measurements do."""
    made = decoder("opt", DType.FP32, seed=1)
    choice = replace(TOKENS, batch=1, concurrency=1, output=7, dtype=DType.FP32)
    plan = without_host(made.spec, [9, 9, 9, 12, 17], choice)
    prompts = padded(plan, made, [[5, 7, 9] * 6])
    wave = GraphWave(plan, made, prompts.padding.tolist())
    assert isinstance(wave.slots, ForwardedSlots)
    whole = wave.run(prompts).tokens

    wave.prefill(prompts)
    wave.decode(1, 4)
    wave.decode(5, 6)
    wave.prefill(prompts)
    wave.decode(1, 5)
    wave.decode(5, 7)

    torch.testing.assert_close(wave.step.generated, whole)


@kernels
def test_what_the_host_holds_besides_takes_pieces() -> None:
    made = decoder("opt", DType.FP32, seed=1)
    plan = without_host(made.spec, [9], replace(TOKENS, dtype=DType.FP32))
    moved = replace(plan.homes, hbm=tuple(n - 2 for n in plan.homes.hbm), host_kv=(2,) * plan.homes.steps)
    at_birth = replace(plan, setting=replace(plan.setting, write_back=WriteBack.AT_BIRTH))

    for mixed in (replace(plan, homes=moved), at_birth):
        assert type(GraphWave(mixed, made, [0] * 3).slots) is StreamedSlots
    assert type(GraphWave(plan, made, [0] * 3).slots) is ForwardedSlots

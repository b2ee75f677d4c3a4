"""Decoding with tokens that the copy engine brings, as keys and values or as inputs to project again, is eager decoding.

Without a GPU the kernels are interpreted, and copies are made where they are asked for.
"""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.graph.schedule import Schedule, Widths, schedule_of
from runtime.graph.streamed import StreamedSlots
from runtime.graph.streamed_step import StreamedStep
from runtime.models.decoder import Decoder
from sim import catalogue
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.kv import kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.plan import Plan, Recompute, WriteBack
from sim.spec import DType, ModelSpec
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, draw_prompts, kernels
from tests.runtime.plans import Choice, all_in_hbm, draw_plan
from tests.runtime.recorded import RecordedGraph, assert_replayed_alike, recorded_graphs

SOURCES = [Recompute.NONE, Recompute.ACTIVATIONS_HOST]


def drawn(rng: random.Random, spec: ModelSpec, recompute: Recompute, dtype: DType = DType.FP32) -> Plan:
    choice = Choice(
        write_back=rng.choice([*WriteBack]),
        recompute=recompute,
        batch=3,
        concurrency=3,
        prompt=rng.randint(5, 20),
        output=60 if ON_GPU else 9,
        dtype=dtype,
        prefetch_layers=rng.choice([1, 1, 2]) if spec.layers > 2 else 1,
    )
    return draw_plan(rng, spec, choice)


def widths(layers: int, buffers: int, kv: int = 2, inputs: int = 1) -> Widths:
    return Widths(slot=layers * kv, kv=kv, again=kv, inputs=inputs, buffers=buffers)


@pytest.mark.parametrize("seed", range(60))
def test_the_schedule_keeps_what_the_plan_has_in_hbm_and_brings_the_rest(seed: int) -> None:
    """Follow each slot by hand: what is in it, whether it is within bounds, and whether what is fetched has been written."""
    rng = random.Random(seed)
    plan = drawn(rng, catalogue.model("OPT-125M"), rng.choice([*SOURCES, Recompute.TOKENS]))
    sizes = widths(plan.setting.model.layers, 2)
    made = schedule_of(plan, sizes)
    cached, homes = plan.setting.token_counts.cached, plan.homes
    again = [homes.activations[row] + homes.dropped[row] for row in range(homes.steps)]
    off = [again[row] + homes.host_kv[row] for row in range(homes.steps)]
    slots = dict(enumerate(range(off[0], cached[0])))
    at_birth = plan.setting.write_back is WriteBack.AT_BIRTH
    on_host = set(range(cached[0])) if at_birth else set(range(again[1], off[1]))
    for number, row in made.rows.items():
        assert row.recomputed == again[number]
        assert set(range(row.recomputed, off[number])) <= on_host
        for there, here in row.moves:
            slots[here] = slots.pop(there)
        slots[row.newborn] = cached[number] - 1
        slots = {slot: position for slot, position in slots.items() if position >= off[number]}
        assert slots == dict(enumerate(row.positions))
        assert sorted(slots.values()) == list(range(off[number], cached[number]))
        assert len(slots) == homes.hbm[number]
        assert row.recomputed <= row.layout.recomputed
        assert row.fetched <= row.layout.fetched
        assert len(slots) * sizes.slot + sizes.staged(row.layout) <= made.elements
        assert all(slots[slot] == position for position, slot in row.written)
        on_host |= {position for position, _ in row.written}


def test_the_block_is_as_large_as_the_plan_says() -> None:
    """Slots and staging of the simulator, all layers, to the byte: the ring, the projected tokens, and no more."""
    model = catalogue.model("OPT-125M")
    plan = all_in_hbm(model, Choice(batch=2, concurrency=2, prompt=40, output=50, recompute=Recompute.ACTIVATIONS_HOST))
    cached = plan.setting.token_counts.cached
    hbm = tuple(min(n, 44 - row // 3) for row, n in enumerate(cached))
    off = tuple(n - near for n, near in zip(cached, hbm, strict=True))
    inputs, none = tuple(n // 2 for n in off), (0,) * len(off)
    kv = tuple(n - kept for n, kept in zip(off, inputs, strict=True))
    plan = replace(plan, homes=TokenHomes(hbm=hbm, host_kv=kv, activations=inputs, dropped=none, copies=none))
    held = occupancy_of(plan, home_columns(plan.homes), flows_of(plan, home_columns(plan.homes))).hbm.max()
    kv = 2 * model.kv_dim
    sizes = Widths(slot=model.layers * kv, kv=kv, again=kv, inputs=model.hidden, buffers=2)

    made = schedule_of(plan, sizes)

    assert made.elements * kv_layer_bytes(model, plan.setting.dtype, plan.setting.kv_format.gpu) / sizes.kv == held
    assert layout_changes(made) < plan.homes.steps // 2  # across one no fetch runs ahead


def layout_changes(made: Schedule) -> int:
    return sum(before.layout != after.layout for before, after in pairwise(made.rows.values()))


def test_a_dropped_prefix_has_no_slot_and_is_staged() -> None:
    plan = all_in_hbm(catalogue.model("OPT-125M"), Choice(recompute=Recompute.TOKENS))
    steps = plan.homes.steps
    homes = replace(plan.homes, hbm=tuple(n - 1 for n in plan.homes.hbm), dropped=(1,) * steps)

    made = schedule_of(replace(plan, homes=homes), widths(12, 2))

    assert all(row.recomputed == row.layout.recomputed == 1 for row in made.rows.values())
    assert all(0 not in row.positions for row in made.rows.values())


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
@pytest.mark.parametrize("recompute", SOURCES)
@pytest.mark.parametrize("seed", range(12 if ON_GPU else 3))
def test_streamed_decoding_is_eager_decoding(family: str, dtype: DType, recompute: Recompute, seed: int) -> None:
    """Any homes that move outward, short prompts filled up, KV written at birth or at eviction."""
    made, rng = decoder(family, dtype, seed=seed), random.Random(f"{seed} {recompute}")
    plan = drawn(rng, made.spec, recompute, dtype)
    longest = plan.setting.workload.prompt_tokens
    compare(plan, made, [longest, rng.randint(1, longest), longest - 1], dtype)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
def test_what_is_saved_is_what_keys_and_values_are_projected_from(family: str) -> None:
    """Of the prompt's 5 tokens and of those born until the eighth, in every layer: normed as the decoder norms them."""
    from runtime.graph.run import GraphWave
    from runtime.wave import padded

    made = decoder(family, DType.FP32, seed=2)
    choice = Choice(batch=2, concurrency=2, prompt=5, output=6, dtype=DType.FP32, recompute=Recompute.ACTIVATIONS_HOST)
    whole = all_in_hbm(made.spec, choice)
    hbm, none = (2,) * 6, (0,) * 6
    inputs = tuple(cached - 2 for cached in whole.setting.token_counts.cached)
    homes = TokenHomes(hbm=hbm, host_kv=none, activations=inputs, dropped=none, copies=none)
    plan = replace(whole, homes=homes)
    prompts = draw_prompts([5, 5], seed=3)
    wave = GraphWave(plan, made, [0, 0])

    tokens = wave.run(padded(prompts, 5, made.device)).tokens

    if ON_GPU:
        torch.cuda.synchronize()
    read = torch.cat((torch.tensor(prompts, device=made.device), tokens), dim=1)[:, : plan.saved_inputs_tokens]
    assert isinstance(wave.slots, StreamedSlots)
    saved = wave.slots.host_inputs.host.transpose(1, 2)  # [layer, lane, position, hidden]
    assert saved.shape[2] == 8
    torch.testing.assert_close(saved, attention_inputs(made, read).cpu(), atol=1e-4, rtol=1e-4)


def attention_inputs(made: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Of texts [lane, token], read at once: [layer, lane, token, hidden]."""
    positions = torch.arange(tokens.shape[1], device=made.device).expand(tokens.shape)
    x, found = made.embed(tokens, positions), []
    for layer in range(made.spec.layers):
        found.append(made.attention_input(layer, x))
        q, k, v = (rows.transpose(1, 2) for rows in made.project(layer, x, positions))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = made.finish(layer, x, mixed.transpose(1, 2))
    return torch.stack(found)


@kernels
def test_a_step_may_be_reached_out_of_order() -> None:
    """As sampled measurements do: fetches of the row before are forgotten, the next row's are begun."""
    from runtime.graph.run import GraphWave
    from runtime.wave import padded

    made = decoder("opt", DType.FP32, seed=1)
    plan = drawn(random.Random(3), made.spec, Recompute.ACTIVATIONS_HOST)
    prompts = padded([[5, 7, 9]] * 3, plan.setting.workload.prompt_tokens, made.device)
    wave = GraphWave(plan, made, prompts.padding.tolist())
    whole = wave.run(prompts).tokens

    wave.prefill(prompts)
    wave.decode(1, 4)
    wave.decode(6, 7)  # of a run that is then started again
    wave.prefill(prompts)
    wave.decode(1, 5)
    wave.decode(5, plan.homes.steps)

    torch.testing.assert_close(wave.step.generated, whole)


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
@pytest.mark.parametrize("recompute", SOURCES)
@pytest.mark.parametrize(("family", "seed"), [("opt", 5), ("grouped qwen3", 1)])
def test_pieces_captured_at_one_row_are_right_at_every_other(
    family: str, seed: int, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes from row to row they find on the device: nothing that Python knew at capture is still true."""
    from runtime.graph.run import GraphWave
    from runtime.wave import padded

    made, rng = decoder(family, DType.FP32, seed=seed), random.Random(f"{seed} {recompute}")
    plan = drawn(rng, made.spec, recompute)
    longest = plan.setting.workload.prompt_tokens
    prompts = padded(draw_prompts([longest, 2, longest - 1], seed), longest, made.device)

    replays = assert_replayed_alike(GraphWave(plan, made, prompts.padding.tolist()), prompts, monkeypatch)

    steps = plan.homes.steps - 1
    assert [sum(of_piece) for of_piece in zip(*replays, strict=True)] == 3 * [steps]
    assert all(min(of_kind) > 0 for of_kind in replays)


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all that follows would fail for being captured, and hide why."""
    from runtime.graph.run import GraphWave

    made = decoder("opt", DType.FP32, seed=1)
    plan = drawn(random.Random(3), made.spec, Recompute.NONE)
    step = GraphWave(plan, made, [0] * 3).step
    assert isinstance(step, StreamedStep)
    monkeypatch.setattr(StreamedSlots, "attend", lambda *_: torch.empty(-1))

    with recorded_graphs(monkeypatch), pytest.raises(RuntimeError, match="negative dimension"):
        step.capture_each()
    assert RecordedGraph.recording is None

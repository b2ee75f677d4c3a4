"""A captured decode step gives what the eager runtime gives: tokens, logits and selections.

Without a GPU the kernels are interpreted, which is slow: there each test takes few steps, and one width.
"""

from dataclasses import replace
from math import ceil, sqrt

import pytest

from runtime.execute import Options, execute
from runtime.graph import launch
from runtime.graph.recent import RecentSlots
from runtime.graph.run import GraphWave
from sim.attention import Selector
from sim.flows import flows_of, home_columns
from sim.kv import KvFormat, kv_layer_bytes
from sim.occupancy import held_state_bytes
from sim.plan import Mechanism
from sim.slots import Room
from sim.spec import DType
from tests.runtime.graphs import (
    DTYPES_TRIED,
    ON_GPU,
    compare,
    decoder,
    draw_prompts,
    kernels,
    newest_in_hbm,
    padded,
    recent,
    resident,
)
from tests.runtime.plans import Choice, all_in_hbm, with_budget

FAMILIES = ["opt", "wide opt", "llama", "grouped qwen3"] if ON_GPU else ["opt", "grouped qwen3"]


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [None, 15, 50])
def test_dense_decoding_by_graph_is_eager_decoding(family: str, dtype: DType, slots: int | None) -> None:
    """With few slots in HBM the rest is read from host memory, where it lies."""
    made = decoder(family, dtype, seed=1)
    plan = all_in_hbm(made.spec, Choice(batch=3, concurrency=3, prompt=20, output=100 if ON_GPU else 12, dtype=dtype))
    plan = replace(plan, setting=replace(plan.setting, fetch_by=Mechanism.GATHER_KERNEL))
    plan = newest_in_hbm(plan, slots or 200)
    compare(plan, made, [20, 17, 3], dtype)


@pytest.mark.skipif(not ON_GPU, reason="a GPU chains kernels")
def test_a_batch_large_enough_to_chain_kernels_decodes_as_eagerly() -> None:
    made = decoder("wide opt", DType.FP16, seed=3)
    choice = Choice(
        selector=Selector.SWA, sparsity=0.8, batch=32, concurrency=32, prompt=40, output=70, dtype=DType.FP16
    )
    compare(resident(all_in_hbm(made.spec, choice), 22), made, [40 - lane % 5 for lane in range(32)], DType.FP16)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [None, 22])
def test_window_decoding_by_graph_is_eager_decoding(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: DType, slots: int | None
) -> None:
    """With few slots in HBM tokens go to host memory and some come back: two programs see to three lanes, head by head."""
    monkeypatch.setattr(launch, "_EXCHANGING", 2)
    monkeypatch.setattr(launch, "EXCHANGED_HEADS", 1)
    made = decoder(family, dtype, seed=2)
    output = 70 if ON_GPU else 12
    choice = Choice(selector=Selector.SWA, sparsity=0.8, batch=3, concurrency=3, prompt=40, output=output, dtype=dtype)
    plan = resident(all_in_hbm(made.spec, choice), slots or 200)
    compare(plan, made, [40, 37, 12], dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [[8], [11, 11, 11, 9, 7]])
def test_a_window_that_keeps_recent_tokens_in_hbm_decodes_as_eagerly(
    family: str, dtype: DType, slots: list[int]
) -> None:
    """Some of those attended to come from the host at every step; HBM may be given up on the way."""
    made = decoder(family, dtype, seed=2)
    output = 70 if ON_GPU else 9
    choice = Choice(selector=Selector.SWA, sparsity=0.8, batch=3, concurrency=3, prompt=40, output=output, dtype=dtype)
    plan = recent(all_in_hbm(made.spec, choice), slots)
    compare(plan, made, [40, 37, 12], dtype)


@kernels
@pytest.mark.parametrize(("family", "depth"), [("flat opt", 1), ("odd opt", 1), ("odd opt", 2), ("odd opt", 4)])
def test_layers_take_turns_at_the_buffers_of_fetched_tokens(family: str, depth: int) -> None:
    """Also where one step's last turns are not followed by the next one's first ones. Here no token dies."""
    made = decoder(family, DType.FP32, seed=3)
    choice = Choice(selector=Selector.SWA, batch=2, concurrency=2, prompt=20, prefetch_layers=depth, dtype=DType.FP32)
    choice = replace(choice, drop_dead=False, output=40 if ON_GPU else 5)
    compare(recent(all_in_hbm(made.spec, choice), [14]), made, [20, 9], DType.FP32)


@kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [0, 1])
def test_what_the_budget_has_no_stage_for_is_read_where_it_lies(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "of", lambda plan: Room(max(plan.homes.hbm), rows))
    made, output = decoder(family, DType.FP32, seed=2), 40 if ON_GPU else 4
    choice = Choice(selector=Selector.SWA, batch=2, concurrency=2, prompt=20, output=output, dtype=DType.FP32)
    compare(recent(all_in_hbm(made.spec, choice), [13]), made, [20, 9], DType.FP32)


def test_a_stage_has_room_for_all_that_is_selected_and_slots_give_way_to_what_is_likely() -> None:
    """A single row takes as much as half a slot does in each of both buffers' layers."""
    made = decoder("opt", DType.FP32, seed=2)
    plan = recent(all_in_hbm(made.spec, Choice(selector=Selector.SWA, concurrency=2, prompt=20)), [13])
    token = kv_layer_bytes(made.spec, plan.setting.dtype, KvFormat.NATIVE)
    state = made.spec.layers * held_state_bytes(plan.setting).max()
    expected = flows_of(plan, home_columns(plan.homes)).fetched_kv.max()
    most, likely = max(plan.setting.token_counts.selected), ceil(expected + 3 * sqrt(expected))
    local = max(plan.setting.token_counts.local)

    def room(tokens: int) -> Room:
        """With so many tokens of one layer in the budget of each of two sequences."""
        return Room.of(with_budget(plan, 2 * ceil(state + tokens * token)))

    assert min(likely, most) == most > 2
    assert room(1000) == room(2 * 13 + 2 * most) == (13, most)
    assert room(2 * 13 + 2 * most - 1) == (12, most)
    assert room(2 * local + 2 * 2) == (local, 2)
    assert room(2 * local) == room(0) == (local, 0)


@kernels
def test_slots_that_give_way_to_the_stage_leave_the_texts_as_they_are() -> None:
    """The first steps have no more in HBM than the last ones."""
    made, output = decoder("opt", DType.FP32, seed=2), 40 if ON_GPU else 5
    choice = Choice(selector=Selector.SWA, batch=2, concurrency=2, prompt=20, output=output, dtype=DType.FP32)
    plan, prompts = recent(all_in_hbm(made.spec, replace(choice, drop_dead=False)), [30, 30, 14]), [20, 9]
    eager = execute(plan, made, draw_prompts(prompts, seed=5), options=Options(captured=False, stop=False))
    token = kv_layer_bytes(made.spec, DType.FP32, KvFormat.NATIVE)
    state = made.spec.layers * held_state_bytes(plan.setting).max()
    most = max(plan.setting.token_counts.selected)
    slots = max(plan.setting.token_counts.local) + 3
    tight = with_budget(plan, 2 * ceil(state + token * (slots * made.spec.layers + 2 * most)))

    wave = GraphWave(tight, made, [0, 0])
    run = wave.run(padded(plan, made, draw_prompts(prompts, seed=5)))

    assert isinstance(wave.slots, RecentSlots)
    assert wave.slots.room == (slots, most)
    assert slots < max(plan.homes.hbm)
    ring = wave.slots.state.ring
    assert wave.slots.kv_bytes - ring.numel() * ring.element_size() + 2 * state <= tight.setting.kv_budget_bytes
    assert run.tokens.tolist() == [list(tokens) for tokens in eager.completions]

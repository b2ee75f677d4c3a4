"""Sparse window attention over INT8 whose HBM holds the newest tokens, by graph: what the eager runtime decodes, what is held."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.graph.quantised_recent import QuantisedRecentSlots
from runtime.graph.quantised_window import QuantisedWindowSlots
from runtime.graph.run import GraphWave, slots_kind
from runtime.graph.support import require_graphable
from runtime.models import Decoder
from runtime.tally import Tally
from runtime.wave import Prompts
from sim.attention import Selector
from sim.flows import flows_of, home_columns, link_token_bytes
from sim.kv import GROUP_TOKENS
from sim.occupancy import occupancy_of
from sim.plan import Plan
from sim.slots import Room, buffers
from sim.spec import DType
from sim.trace import Resource
from tests.runtime.graphs import ON_GPU, compare, decoder, draw_prompts, kernels, padded, recent
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_captured import both, decoded, moved
from tests.runtime.test_graph_int8_window import FAMILIES, INT8


def window(made: Decoder, slots: list[int], *, prompt: int, output: int, lanes: int = 2, **other: Any) -> Plan:
    choice = Choice(selector=Selector.SWA, batch=lanes, concurrency=lanes, prompt=prompt, output=output)
    return recent(all_in_hbm(made.spec, replace(choice, dtype=DType.FP32, kv_format=INT8, **other)), slots)


@kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "sparsity", "slots"),
    [(61, 0.8, [8]), (62, 0.5, [22, 20, 17]), (130, 0.8, [30])][: None if ON_GPU else 2],
)
def test_a_window_over_int8_that_keeps_recent_tokens_decodes_as_eagerly(
    family: str, prompt: int, sparsity: float, slots: list[int]
) -> None:
    """Past the end of a group, most of whose tokens left HBM before; HBM may be given up on the way."""
    made = decoder(family, DType.FP32, seed=2)
    output = min(70, 161 - prompt) if ON_GPU else 6
    plan = window(made, slots, prompt=prompt, output=output, sparsity=sparsity, lanes=3)
    assert slots_kind(plan) is QuantisedRecentSlots
    compare(plan, made, [prompt, prompt - 3, 12], DType.FP32)


@kernels
@pytest.mark.parametrize(("family", "depth"), [("odd opt", 1), ("odd opt", 2), ("flat opt", 1)])
def test_layers_take_turns_at_the_buffers_of_levels(family: str, depth: int) -> None:
    """Also where one step's last turns are not followed by the next one's first ones, and where a group is completed. Here no
    token dies. The eager runtime reads rounded what it fetches after that: a model of one layer ends before.
    """
    made = decoder(family, DType.FP32, seed=3)
    output = 40 if ON_GPU and depth > 1 else 3
    plan = window(
        made, [34], prompt=62 if made.spec.layers > 1 else 40, output=output, prefetch_layers=depth, drop_dead=False
    )
    assert buffers(plan) == (depth + 1 if made.spec.layers > 1 else 1)
    compare(plan, made, [plan.setting.workload.prompt_tokens, 9], DType.FP32)


@kernels
@pytest.mark.parametrize(("family", "rows"), [("opt", 0), ("grouped qwen3", 1)])
def test_levels_without_a_row_in_the_stage_are_read_where_they_lie(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "of", lambda plan: Room(max(plan.homes.hbm), rows))
    made, output = decoder(family, DType.FP32, seed=2), 40 if ON_GPU else 4
    compare(window(made, [16], prompt=62, output=output), made, [62, 9], DType.FP32)


@kernels
def test_each_token_fetched_and_written_counts_and_keys_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As eagerly, but for levels of keys that the host is sent when their group is complete; in two waves, the second of which
    has a lane to spare.
    """
    made, steps, followed = decoder("opt", DType.FP32, seed=2), 5, Counter[tuple[int, Resource, int]]()
    plan = window(made, [12], prompt=62, output=steps, sparsity=0.7)
    plan = replace(plan, setting=replace(plan.setting, workload=replace(plan.setting.workload, batch=3)))
    record, number = QuantisedRecentSlots.record, -1

    def spy(slots: QuantisedRecentSlots, row: int, tally: Tally, lanes: int) -> None:
        nonlocal number
        number += row == 0
        if plan.setting.token_counts.cached[row] == GROUP_TOKENS:
            followed[number, Resource.D2H, row] += int(slots.followed[:, :lanes].sum()) * made.spec.kv_dim
        record(slots, row, tally, lanes)

    monkeypatch.setattr(QuantisedRecentSlots, "record", spy)
    eager, run = both(plan, made, [62, 40, 12])

    assert run.completions == eager.completions
    assert len(followed) == 2
    assert all(followed.values())
    assert decoded(moved(run)) == {
        key: decoded(moved(eager)).get(key, 0) + followed[key] for key in {*decoded(moved(eager)), *followed}
    }
    assert {key[1] for key in decoded(moved(run))} == {Resource.H2D, Resource.D2H}
    prompts = {key: size for key, size in moved(eager).items() if not key[2]}
    assert all(0 < moved(run)[key] <= size for key, size in prompts.items())
    for got, want in zip(run.stats[0], eager.stats[0], strict=True):
        assert (got.picked, got.turnover) == (want.picked, want.turnover)


@kernels
def test_a_window_over_int8_whose_tokens_live_writes_what_the_simulator_says() -> None:
    """Longer than a group, so that no token leaves HBM before it has levels."""
    made, steps = decoder("opt", DType.FP32, seed=2), 4
    plan = window(made, [66], prompt=126, output=steps, drop_dead=False)
    expected = flows_of(plan, home_columns(plan.homes))

    _, run = both(plan, made, [126, 100])

    token = 2 * made.spec.layers * link_token_bytes(plan.setting)
    assert token < 2 * made.spec.layers * 2 * made.spec.kv_dim * 4
    written = [moved(run).get((0, Resource.D2H, row), 0.0) for row in range(steps)]
    assert all(written[:-1])
    assert written == pytest.approx(list(token * expected.written_kv))


def test_a_stage_of_levels_has_what_is_left_beside_ranges_open_keys_and_past_weights() -> None:
    """Byte by byte: a row more of each buffer takes the room of as many levels in the layers' slots."""
    made = decoder("opt", DType.FP32, seed=2)
    plan = window(made, [20], prompt=60, output=6, sparsity=0.7)
    most, local = max(plan.setting.token_counts.selected), max(plan.setting.token_counts.local)
    layers, stage = made.spec.layers, buffers(plan)
    token, keys = 2 * made.spec.kv_dim + 4 * made.spec.kv_heads, (4 + GROUP_TOKENS * 4) * made.spec.kv_dim
    weights = max(map(plan.setting.attention.history_steps, plan.setting.token_counts.cached))
    living = 1 + max(
        c - d for c, d in zip(plan.setting.token_counts.cached, plan.setting.token_counts.dead, strict=True)
    )

    def room(tokens: int, short: int = 0) -> Room:
        """With so many tokens of one layer in the budget of each of two sequences, less some bytes."""
        state = layers * (keys + weights * living * 4)
        return Room.of(with_budget(plan, 2 * (state + tokens * token - short)))

    assert room(10_000) == room(20 * layers + most * stage) == (20, most)
    assert room(20 * layers + most * stage, short=1) == (19, most)
    assert room(local * layers + 2 * stage) == (local, 2)
    assert room(local * layers) == room(0) == (local, 0)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
def test_a_tight_budget_is_kept_and_leaves_the_texts_as_they_are(family: str) -> None:
    made = decoder(family, DType.FP32, seed=2)
    plan = window(made, [40, 40, 18], prompt=62, output=4, sparsity=0.7)
    homes = home_columns(plan.homes)
    ample = 2 * max(occupancy_of(plan, homes, flows_of(plan, homes)).hbm)
    prompts = padded(plan, made, draw_prompts([62, 12], seed=4))
    waves = [GraphWave(plan, made, prompts.padding.tolist())]
    slots = waves[0].slots
    assert isinstance(slots, QuantisedRecentSlots)
    fixed = slots.kv_bytes - sum(plane.nbytes for plane in (*slots.near_planes, *slots.stage))
    token = 2 * (2 * made.spec.kv_dim + 4 * made.spec.kv_heads)
    local = max(plan.setting.token_counts.local)
    tight = with_budget(plan, fixed + token * (local + 3) * made.spec.layers + 2 * token)
    waves.append(GraphWave(tight, made, prompts.padding.tolist()))

    texts = [wave.run(prompts).tokens for wave in waves]

    assert torch.equal(*texts)
    budget = tight.setting.kv_budget_bytes
    assert isinstance(waves[1].slots, QuantisedRecentSlots)
    assert 0.95 * budget <= waves[1].slots.kv_bytes <= budget < ample
    assert waves[1].slots.room.slots < max(plan.homes.hbm)
    with pytest.raises(
        ValueError, match="kv_budget_bytes, a captured step under swa in int8 needs slots for its local"
    ):
        require_graphable(with_budget(plan, fixed + token * local * made.spec.layers - 1), made)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
def test_rows_gathered_before_their_group_had_levels_are_attended_to_as_their_keys_waited(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step that completes the group all that was staged of it has no levels: whatever lies in their place does no harm."""
    made = decoder(family, DType.FP32, seed=2)
    plan = window(made, [12], prompt=61, output=6, sparsity=0.6)
    prompts = padded(plan, made, draw_prompts([61, 50], seed=4))
    wave, attend, closing = GraphWave(plan, made, prompts.padding.tolist()), QuantisedWindowSlots.attend, 0

    def spoil(slots: QuantisedRecentSlots, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        nonlocal closing
        opened = int(slots.count[0] - 1) // GROUP_TOKENS * GROUP_TOKENS
        listed = torch.arange(slots.width, device=q.device) < slots.state.counts[layer, :, None]
        fresh = listed & (slots.tokens[layer] >= opened) & (slots.state.slots[layer] >= slots.near)
        closing += int(fresh.sum()) * (int(slots.count[0]) == GROUP_TOKENS)
        for lane, item in fresh.nonzero().tolist():
            row = int(slots.state.slots[layer, lane, item]) - slots.near
            assert row < slots.rows
            slots.stage[0][layer % (slots.depth + 1), lane, :, row] = 255
        attend(slots, layer, q, k, v, attended)

    whole = logits(wave, prompts)
    monkeypatch.setattr(QuantisedWindowSlots, "attend", spoil)
    spoilt = logits(wave, prompts)

    assert closing > 0
    assert torch.equal(spoilt, whole)


@torch.inference_mode()
def logits(wave: GraphWave, prompts: Prompts) -> Tensor:
    """[decode step, lane, vocab], of steps that are run as they are, for a spy."""
    wave.prefill(prompts)
    wave.step.seek(1)
    found = []
    for _ in range(1, wave.plan.homes.steps):
        wave.step._run()
        found.append(wave.step.logits.clone())
    return torch.stack(found)

"""Sparse window attention over INT8 by graph: what the eager runtime decodes, and what is held and moved."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.execute import execute
from runtime.graph import launch, quantised_window
from runtime.graph.quantised_window import QuantisedWindowSlots
from runtime.graph.recent import RecentSlots
from runtime.graph.run import GraphWave
from runtime.graph.support import require_graphable
from runtime.models import Decoder
from runtime.quantise import encode_values, frozen_groups
from runtime.tally import Tally
from sim.attention import Selector
from sim.flows import flows_of, home_columns, link_token_bytes
from sim.kv import GROUP_TOKENS, KvFormat, KvFormats
from sim.occupancy import occupancy_of
from sim.plan import Placement, Plan
from sim.spec import DType
from sim.trace import Resource
from tests.runtime.graphs import ON_GPU, compare, decoder, draw_prompts, kernels, padded, recent, resident
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_captured import CAPTURED, both, decoded, moved

INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
FAMILIES = ["opt", "llama", "grouped qwen3"] if ON_GPU else ["opt", "grouped qwen3"]


def window(
    made: Decoder,
    *,
    prompt: int,
    output: int,
    slots: int,
    dtype: DType = DType.FP32,
    sparsity: float = 0.8,
    lanes: int = 3,
) -> Plan:
    choice = Choice(selector=Selector.SWA, sparsity=sparsity, batch=3, concurrency=lanes, prompt=prompt, output=output)
    return resident(all_in_hbm(made.spec, replace(choice, dtype=dtype, kv_format=INT8)), slots)


@kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots, prompt", [(22, 60), (40, 130), (200, 60), (30, 70)][: None if ON_GPU else 2])
def test_window_decoding_over_int8_by_graph_is_eager_decoding(
    monkeypatch: pytest.MonkeyPatch, family: str, slots: int, prompt: int
) -> None:
    """Past the end of a group, some of whose tokens are dead by then, some on the host: two programs see to three lanes.

    In 16 bit a product rounded otherwise makes a level another, and soon a pick: there see the next test.
    """
    monkeypatch.setattr(launch, "_EXCHANGING", 2)
    monkeypatch.setattr(quantised_window, "EXCHANGED_HEADS", 1)
    made = decoder(family, DType.FP32, seed=2)
    output = 30 if ON_GPU else 8
    compare(window(made, prompt=prompt, output=output, slots=slots), made, [prompt, prompt - 3, 12], DType.FP32)


def over_levels(slots: QuantisedWindowSlots, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[lane, head, channel]: attention to what the lists of layer 1 name of all keys and values so far, by torch.

    What was gathered before its group was frozen has its keys as they were.
    """
    levels, ranges = frozen_groups(k, KvFormat.INT8)
    frozen, stored = k.shape[1] // GROUP_TOKENS * GROUP_TOKENS, encode_values(v, KvFormat.INT8)
    low, step = (part[:, None].float() for part in ranges.unbind(1))  # [group, 1, head, channel]
    widened = (levels.float() * step + low).view(k.shape[0], frozen, *k.shape[2:])
    keys = torch.cat((widened, k[:, frozen:].float()), 1)
    least, steps = (part[..., None].float() for part in stored["v_range"].unbind(-1))
    values, mixed = stored["v"].float() * steps + least, torch.empty_like(q, dtype=torch.float32)
    for lane in range(len(q)):
        listed = slice(0, int(slots.state.counts[1, lane]))
        real = slots.state.slots[1, lane, listed] >= 0
        at, outside = slots.tokens[1, lane, listed][real].long(), slots.state.slots[1, lane, listed][real] >= slots.near
        group = q.shape[1] // k.shape[2]
        waited = outside & (at >= (k.shape[1] - 1) // GROUP_TOKENS * GROUP_TOKENS)
        some_k, some_v = (rows[lane, at] for rows in (keys, values))
        some_k = torch.where(waited[:, None, None], k[lane, at].float(), some_k)
        some_k, some_v = (rows.repeat_interleave(group, 1) for rows in (some_k, some_v))
        weights = (torch.einsum("hc,thc->ht", q[lane].float(), some_k) * q.shape[2] ** -0.5).softmax(-1)
        mixed[lane] = torch.einsum("ht,thc->hc", weights, some_v)
    return mixed


@kernels
@pytest.mark.parametrize(
    ("dtype", "placement"),
    [(DType.FP32, Placement.RESIDENT), (DType.FP16, Placement.RESIDENT), (DType.FP16, Placement.RECENT)],
)
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
def test_levels_near_and_far_are_those_of_all_keys_of_a_group(
    family: str, dtype: DType, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with the ranges by all 64, padding and dead tokens too; tokens came and went before they had levels."""
    made, lanes, prompt = decoder(family, dtype, seed=2), 3, 56
    plan = window(made, prompt=prompt, output=12, slots=21, sparsity=0.7, dtype=dtype)
    if placement is Placement.RECENT:
        plan = recent(plan, [13])
    prompts = padded(plan, made, draw_prompts([56, 30, 5], seed=3))
    wave, keys, values = GraphWave(plan, made, prompts.padding.tolist()), list[Tensor](), list[Tensor]()
    attend, keep = QuantisedWindowSlots.attend, QuantisedWindowSlots._keep

    def keep_spy(slots: QuantisedWindowSlots, layer: int, some: object) -> None:
        if layer == 1:
            keys.append(some.k.clone())  # type: ignore[attr-defined]
            values.append(some.v.clone())  # type: ignore[attr-defined]
        keep(slots, layer, some)  # type: ignore[arg-type]

    def attend_spy(slots: QuantisedWindowSlots, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        if layer == 1:
            keys.append(k[:, None].clone())
            values.append(v[:, None].clone())
        attend(slots, layer, q, k, v, attended)
        if layer == 1:
            expected = over_levels(slots, q, torch.cat(keys, 1), torch.cat(values, 1))
            close = 1e-4 if dtype is DType.FP32 else 3e-2
            torch.testing.assert_close(attended.float(), expected, atol=close * float(expected.abs().max()), rtol=0)

    monkeypatch.setattr(QuantisedWindowSlots, "_keep", keep_spy)
    monkeypatch.setattr(QuantisedWindowSlots, "attend", attend_spy)
    slots = wave.slots
    assert isinstance(slots, QuantisedWindowSlots)
    assert isinstance(slots, RecentSlots) == (placement is Placement.RECENT)
    with torch.inference_mode():
        wave.prefill(prompts)
        wave.step.seek(1)
        returned = 0
        for _ in range(1, plan.homes.steps):
            wave.step._run()  # as it is, for the spy
            returned += int(slots.state.moves[1, :, :, 2].sum())
            returned += int(slots.expected.fetched[1].sum()) if isinstance(slots, RecentSlots) else 0

    k, v = torch.cat(keys, 1), torch.cat(values, 1)
    levels, ranges = frozen_groups(k, KvFormat.INT8)
    assert torch.equal(slots.key_ranges[1, :, :, 0], ranges.transpose(1, 2))
    stored, frozen = encode_values(v, KvFormat.INT8), k.shape[1] // GROUP_TOKENS * GROUP_TOKENS
    assert (frozen, returned > 0) == (64, True)
    planes = [
        torch.cat((near[1].transpose(1, 2), far[1].to(near.device)), 1)  # [lane, slot, head, …]
        for near, far in zip(slots.near_planes, slots.far_planes, strict=True)
    ]
    for lane in range(lanes):
        held = slots.state.position[1, lane] >= 0
        newborn = slots.state.position[1, lane] == k.shape[1]
        at, place = (of[1, lane][held & ~newborn].long() for of in (slots.state.position, slots.state.place))
        assert any(place >= slots.near)
        assert torch.equal(planes[1][lane, place], stored["v"][lane, at])
        assert torch.equal(planes[2][lane, place], stored["v_range"][lane, at])
        old = at < frozen
        assert 0 < old.sum() < len(old)
        assert torch.equal(planes[0][lane, place[old]], levels[lane, at[old]])


@kernels
def test_each_move_counts_and_keys_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two waves, the second of which has a lane to spare, past the end of a group."""
    made, seen, steps = decoder("opt", DType.FP32, seed=2), Counter[tuple[int, Resource, int]](), 8
    plan = window(made, prompt=60, output=steps, slots=16, lanes=2)
    token, half = link_token_bytes(plan.setting), made.spec.kv_dim
    record, number, followed = QuantisedWindowSlots.record, -1, 0

    def spy(slots: QuantisedWindowSlots, row: int, tally: Tally, lanes: int) -> None:
        nonlocal number, followed
        number += row == 0
        if 0 < row < steps - 1:
            for layer, of_lanes in enumerate(slots.state.move_counts[:, :lanes].tolist()):
                for lane, count in enumerate(of_lanes):
                    for _, _, reads, writes in slots.state.moves[layer, lane, :count].tolist():
                        seen[number, Resource.H2D, row + 1] += reads * token
                        seen[number, Resource.D2H, row] += writes * token
        if plan.setting.token_counts.cached[row] == GROUP_TOKENS:
            followed += int(slots.followed[:, :lanes].sum())
            seen[number, Resource.D2H, row] += int(slots.followed[:, :lanes].sum()) * half
        record(slots, row, tally, lanes)

    monkeypatch.setattr(QuantisedWindowSlots, "record", spy)
    eager, run = both(plan, made, [60, 37, 12])

    assert run.completions == eager.completions
    assert decoded(moved(run)) == {key: n for key, n in seen.items() if n}
    assert followed > 0
    for which in (Resource.H2D, Resource.D2H):
        totals = [sum(size for key, size in moved(one).items() if key[1] is which) for one in (run, eager)]
        assert 0 < totals[0] <= totals[1]


@kernels
@pytest.mark.parametrize(("sparsity", "slots", "prompt"), [(0.3, 40, 40), (0.2, 110, 122)])
def test_a_window_over_int8_writes_what_the_simulator_says(sparsity: float, slots: int, prompt: int) -> None:
    """As in native; of a window longer than a group also where one is completed."""
    made, steps = decoder("opt", DType.FP32, seed=2), 14
    choice = Choice(selector=Selector.SWA, sparsity=sparsity, batch=2, concurrency=2, prompt=prompt, output=steps)
    choice = replace(choice, dtype=DType.FP32, kv_format=INT8, local_fraction=0.7)
    plan = resident(all_in_hbm(made.spec, choice), slots)
    plan = replace(plan, setting=replace(plan.setting, access=replace(plan.setting.access, returned_share=0.0)))
    expected = flows_of(plan, home_columns(plan.homes))

    run = execute(plan, made, draw_prompts([prompt, prompt], seed=1), options=CAPTURED)

    rows = [[moved(run).get((0, which, row), 0.0) for row in range(steps)] for which in (Resource.H2D, Resource.D2H)]
    left = [written - returned for written, returned in zip(rows[1], [*rows[0][1:], 0.0], strict=True)]
    token = 2 * made.spec.layers * link_token_bytes(plan.setting)
    assert sum(left) > 0
    assert left == pytest.approx(list(token * expected.written_kv))


@kernels
def test_a_budget_just_as_large_as_decoding_needs_is_kept() -> None:
    """With fewer slots than planned where weights of past queries take more; with none to spare it runs eagerly."""
    made = decoder("opt", DType.FP32, seed=2)
    plan = window(made, prompt=60, output=6, slots=30)
    homes = home_columns(plan.homes)
    tight = with_budget(plan, round(3 * max(occupancy_of(plan, homes, flows_of(plan, homes)).hbm[1:])))
    prompts = padded(tight, made, draw_prompts([60, 37, 12], seed=4))

    waves = [GraphWave(one, made, prompts.padding.tolist()) for one in (plan, tight)]

    texts = [wave.run(prompts).tokens for wave in waves]
    assert torch.equal(*texts)
    budget = tight.setting.kv_budget_bytes
    assert 0.9 * budget <= waves[1].slots.kv_bytes <= budget
    with pytest.raises(ValueError, match="kv_budget_bytes, a captured step under swa in int8 needs slots"):
        require_graphable(with_budget(plan, budget // 2), made)

"""Levels that the kernels store are those that the eager runtime stores, and attention over them is the same."""

import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from runtime.attention import attend
from runtime.execute import execute
from runtime.graph.launch import Parts
from runtime.graph.paged import COUNT, PADDING, TABLE, PagedSlots
from runtime.graph.paged_run import PagedWave
from runtime.graph.quantised_dense import QuantisedSlots, fetched_bytes
from runtime.lanes import Lanes
from runtime.memory import device_zeros
from runtime.options import Options
from runtime.tier import KeyFreezer, KvShape, OpenKeys, Tier
from runtime.wave import padded
from sim.attention import PAGE_TOKENS
from sim.kv import GROUP_TOKENS, KvFormat, KvFormats
from sim.plan import Preemption
from sim.spec import DType
from tests.runtime.graphs import DEVICE, ON_GPU, compare, decoder, newest_in_hbm
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_graph_paged import drawn, left, paged

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="runs Triton's kernels")
HEADS, CHANNELS = 4, 16  # of test_graph's small OPT


class Eager:
    """One layer's keys and values in the eager runtime's tier, and attention over them."""

    def __init__(self, lanes: int, positions: int, dtype: torch.dtype, kv_format: KvFormat, heads: int = HEADS) -> None:
        shape = KvShape(layers=1, lanes=lanes, heads=heads, head_dim=CHANNELS, positions=positions, dtype=dtype)
        allocate = lambda size, kind: device_zeros(DEVICE, size, kind)  # noqa: E731
        self.open = OpenKeys(shape, GROUP_TOKENS, allocate)
        self.tier = Tier(kv_format, shape, positions, allocate, self.open, device=DEVICE)
        self.freezer = KeyFreezer(self.open, (self.tier,))
        self.lanes, self.heads = lanes, heads

    def start(self, k: Tensor, v: Tensor) -> None:
        at = torch.arange(k.shape[1], device=DEVICE).expand(self.lanes, -1)
        self.freezer.start(0, k)
        self.tier.put(0, at, at >= 0, k, v)

    def step(self, position: int, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """[lane, query head, channel], one token a lane."""
        at = torch.full((self.lanes, 1), position, device=DEVICE)
        self.tier.put(0, at, at >= 0, k[:, None], v[:, None])
        self.freezer.bear(0, position, k[:, None])
        part = self.tier.all(
            0, position + 1, lambda where: (where <= position) & (where >= padding[:, None]), frozen=False
        )
        mixed, _ = attend(q.unflatten(1, (self.heads, -1)), [part], CHANNELS**-0.5)
        return mixed.flatten(1, 2)

    def stored(self, positions: Tensor) -> dict[str, Tensor]:
        return self.tier.pool.take(0, positions)


def rows(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """With a mean and a spread of each channel's own."""
    drawn = torch.randn(shape, generator=generator)
    channel = torch.arange(shape[-1])
    return (drawn * (1 + channel % 5) + channel / 3).to(DEVICE, dtype)


INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
KINDS = {torch.float32: DType.FP32, torch.float16: DType.FP16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2}


@pytest.mark.parametrize(
    "kv_format, dtype",
    [
        (KvFormat.INT8, torch.float32),
        (KvFormat.INT8, torch.float16),
        (KvFormat.FP8, torch.float16),
        (KvFormat.NATIVE, torch.float16),
    ],
)
def test_pages_hold_what_the_eager_tier_holds(kv_format: KvFormat, dtype: torch.dtype) -> None:
    """A prompt with a frozen group and an open one, decoded past the end of that."""
    prompt, steps, lanes = GROUP_TOKENS + 59, 8, 3
    made, formats = decoder("opt", KINDS[dtype], seed=1), KvFormats(gpu=kv_format, host=kv_format)
    choice = Choice(
        batch=lanes, concurrency=lanes, prompt=prompt, output=steps + 1, dtype=KINDS[dtype], kv_format=formats
    )
    plan = paged(all_in_hbm(made.spec, choice), pages=200, concurrency=lanes, preemption=Preemption.RECOMPUTE)
    slots, generator = PagedSlots(plan, made, lanes), torch.Generator().manual_seed(4)
    eager = Eager(lanes, prompt + steps, dtype, kv_format)
    shuffled = random.Random(1).sample(range(slots.pages), lanes * slots.size.pages_of(prompt + steps))
    table = torch.tensor(shuffled, device=DEVICE).view(lanes, -1)
    tokens, opened = table[:, : slots.most_pages], table[:, slots.most_pages :]
    padding = torch.tensor([0, 5, 70], device=DEVICE)

    k, v = (rows(generator, lanes, prompt, HEADS, CHANNELS, dtype=dtype) for _ in range(2))
    eager.start(k, v)
    slots.enter(0, tokens[:, : -(-prompt // PAGE_TOKENS)], opened, k, v)
    slots.state[:, PADDING] = padding.int()
    slots.state[:, TABLE : TABLE + slots.most_pages] = tokens.int()
    slots.state[:, slots.open_column :] = opened.int()
    attended = torch.zeros((lanes, HEADS, CHANNELS), dtype=dtype, device=DEVICE)
    for position in range(prompt, prompt + steps):
        q, k, v = rows(generator, 3, lanes, HEADS, CHANNELS, dtype=dtype)
        q = q / 8  # scores of a few units, whose rounding in 16 bit is small
        slots.state[:, COUNT] = position + 1
        slots.attend(0, q, k, v, attended)
        torch.testing.assert_close(attended, eager.step(position, q, k, v, padding), atol=TOLERANCE[dtype], rtol=1e-3)

    at = torch.arange(prompt + steps, device=DEVICE).expand(lanes, -1)
    stored, frozen = eager.stored(at), (prompt + steps) // GROUP_TOKENS * GROUP_TOKENS
    held = frozen if kv_format is KvFormat.INT8 else prompt + steps
    assert torch.equal(tokenwise(slots.planes[0][0, :, :, 0], tokens)[:, :held], stored["k"][:, :held])
    assert torch.equal(tokenwise(slots.planes[0][0, :, :, 1], tokens)[:, : prompt + steps], stored["v"])
    if kv_format is KvFormat.INT8:
        ranges = tokenwise(slots.planes[2][0].transpose(-1, -2), tokens)[:, : prompt + steps]
        assert torch.equal(ranges, stored["v_range"])
        shares = slots.planes[1][0][tokens[:, : frozen // PAGE_TOKENS]].unflatten(1, (-1, 4))
        assert torch.equal(
            shares.permute(0, 1, 4, 3, 2, 5).flatten(-2),
            eager.tier.ranges[0, :, :, : frozen // GROUP_TOKENS].permute(0, 2, 3, 1, 4),
        )


def tokenwise(plane: Tensor, tokens: Tensor) -> Tensor:
    """[page, head, page token, …] as [lane, token, head, …]."""
    return plane[tokens].transpose(2, 3).flatten(1, 2)


@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("dtype, slots", [(torch.float32, 70), (torch.float16, 150), (torch.float32, 300)])
def test_slots_near_and_far_hold_what_the_eager_tier_holds(family: str, dtype: torch.dtype, slots: int) -> None:
    """Past the end of a group, before and after which tokens stay behind where keys waited."""
    prompt, steps, lanes = 3 * GROUP_TOKENS - 7, 70 if ON_GPU else 12, 2
    made = decoder(family, KINDS[dtype], seed=1)
    heads, queries = made.spec.kv_heads, made.spec.heads
    choice = Choice(batch=lanes, concurrency=lanes, prompt=prompt, output=steps + 1, dtype=KINDS[dtype], kv_format=INT8)
    longer = replace(made.spec, context_tokens=prompt + steps)
    plan = newest_in_hbm(all_in_hbm(longer, choice), slots)
    padding, row = torch.tensor([0, 75], device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    held = QuantisedSlots(plan, made, Lanes.of(made.spec, lanes, per_head=False), padding, row)
    eager = Eager(lanes, prompt + steps, dtype, KvFormat.INT8, heads)
    generator = torch.Generator().manual_seed(4)
    k, v = (rows(generator, lanes, prompt, heads, CHANNELS, dtype=dtype) for _ in range(2))
    eager.start(k, v)
    held.start(0, 0, k, k, v)
    attended = torch.zeros((lanes, queries, CHANNELS), dtype=dtype, device=DEVICE)
    for position in range(prompt, prompt + steps):
        q = rows(generator, lanes, queries, CHANNELS, dtype=dtype)
        k, v = rows(generator, 2, lanes, heads, CHANNELS, dtype=dtype)
        held.begin_step()
        held.attend(0, q / 8, k, v, attended)
        expected = eager.step(position, q / 8, k, v, padding)
        torch.testing.assert_close(attended, expected, atol=TOLERANCE[dtype], rtol=1e-3)
        row += 1

    stored = eager.stored(torch.arange(prompt + steps, device=DEVICE).expand(lanes, -1))
    keys, values, ranges = (
        torch.cat((here[0], there[0][..., : held.far, :] if at == 2 else there[0][..., : held.far]), at)
        for here, there, at in zip(held.here, held.there, (2, 2, 3), strict=True)
    )
    frozen = (prompt + steps) // GROUP_TOKENS
    assert torch.equal(keys.transpose(1, 2)[:, : frozen * GROUP_TOKENS], stored["k"][:, : frozen * GROUP_TOKENS])
    assert torch.equal(values.transpose(1, 2), stored["v"])
    assert torch.equal(ranges.permute(0, 3, 1, 2), stored["v_range"])
    assert torch.equal(held.key_ranges[0], eager.tier.ranges[0, :, :, :frozen])


@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("slots, prompt", [(40, 128), (40, 150), (100, 150), (140, 150), (40, 191), (40, 60)])
def test_on_the_host_only_what_is_counted_is_read(family: str, slots: int, prompt: int) -> None:
    """The other levels are spoilt there: keys of the open group, and of the group before what is in the rows left for newborns."""
    lanes, made = 2, decoder(family, DType.FP32, seed=1)
    heads, queries = made.spec.kv_heads, made.spec.heads
    choice = Choice(batch=lanes, concurrency=lanes, prompt=prompt, output=2, dtype=DType.FP32, kv_format=INT8)
    plan = newest_in_hbm(all_in_hbm(replace(made.spec, context_tokens=prompt + 1), choice), slots)
    generator = torch.Generator().manual_seed(4)
    k, v = (rows(generator, lanes, prompt, heads, CHANNELS, dtype=torch.float32) for _ in range(2))
    q = rows(generator, lanes, queries, CHANNELS, dtype=torch.float32) / 8
    newborn = rows(generator, 2, lanes, heads, CHANNELS, dtype=torch.float32)
    far = torch.arange(slots, prompt)
    opened = far >= prompt // GROUP_TOKENS * GROUP_TOKENS
    behind = ~opened & (far > prompt - GROUP_TOKENS)

    def attended(*, spoilt: bool) -> Tensor:
        padding, row = torch.zeros(lanes, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
        held = QuantisedSlots(plan, made, Lanes.of(made.spec, lanes, per_head=False), padding, row)
        held.start(0, 0, k, k, v)
        for plane, unread in zip(held.there[:2], (opened | behind, behind), strict=True):
            plane[0][:, :, : len(far)][:, :, unread.to(plane.device)] ^= 255 * spoilt
        mixed = torch.zeros((lanes, queries, CHANNELS), device=DEVICE)
        held.begin_step()
        held.attend(0, q, newborn[0], newborn[1], mixed)
        return mixed

    assert torch.equal(attended(spoilt=True), attended(spoilt=False))
    levels = 2 * len(far) - int((opened | behind).sum()) - int(behind.sum())
    head_bytes = CHANNELS * levels + 4 * len(far)
    assert fetched_bytes(plan.setting, slots, prompt + 1) == lanes * made.spec.layers * heads * head_bytes


@pytest.mark.parametrize(
    "family, dtype",
    [("opt", DType.FP32), *(("grouped " + name, dtype) for name in ("llama", "qwen3") for dtype in KINDS.values())],
)
@pytest.mark.parametrize("slots, prompt", [(30, 66), (200, 60)])
def test_waves_in_int8_decode_as_eagerly(family: str, dtype: DType, slots: int, prompt: int) -> None:
    """End to end; without host memory past the end of a group.

    With it the eager runtime parts there for a step: what it fetches then it has read before the group is frozen.
    """
    made = decoder(family, dtype, seed=1)
    choice = Choice(batch=2, concurrency=2, prompt=prompt, output=6, dtype=dtype, kv_format=INT8)
    compare(newest_in_hbm(all_in_hbm(made.spec, choice), slots), made, [prompt, prompt - 3], dtype)


@pytest.mark.parametrize("count", [1, 5])
def test_in_how_many_parts_tokens_are_gone_over_makes_no_difference(count: int) -> None:
    """Near, far, left behind and waiting; some parts find nothing."""
    lanes, prompt, made = 2, 150, decoder("grouped llama", DType.FP32, seed=1)
    choice = Choice(batch=lanes, concurrency=lanes, prompt=prompt, output=2, dtype=DType.FP32, kv_format=INT8)
    plan = newest_in_hbm(all_in_hbm(replace(made.spec, context_tokens=prompt + 1), choice), 50)
    generator, (heads, queries) = torch.Generator().manual_seed(4), (made.spec.kv_heads, made.spec.heads)
    k, v = (rows(generator, lanes, prompt, heads, CHANNELS, dtype=torch.float32) for _ in range(2))
    q = rows(generator, lanes, queries, CHANNELS, dtype=torch.float32) / 8
    newborn = rows(generator, 2, lanes, heads, CHANNELS, dtype=torch.float32)

    def attended(parts: int | None) -> Tensor:
        padding, row = torch.tensor([0, 70], device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
        held = QuantisedSlots(plan, made, Lanes.of(made.spec, lanes, per_head=False), padding, row)
        if parts:
            mixed = torch.zeros((parts, lanes, queries, CHANNELS), device=DEVICE)
            held.parts = Parts(mixed=mixed, peaks=mixed[..., 0].clone(), totals=mixed[..., 0].clone())
        held.start(0, 0, k, k, v)
        out = torch.zeros((lanes, queries, CHANNELS), device=DEVICE)
        held.begin_step()
        held.attend(0, q, newborn[0], newborn[1], out)
        return out

    torch.testing.assert_close(attended(count), attended(None), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_what_hbm_holds_of_grouped_heads_fits_the_budget(share: float) -> None:
    """Fewer slots than planned where ranges and the open group's keys leave no room for them."""
    made = decoder("grouped llama", DType.FP32, seed=1)
    choice = Choice(batch=2, concurrency=2, prompt=140, output=5, dtype=DType.FP32, kv_format=INT8)
    plan, padding = all_in_hbm(made.spec, choice), torch.zeros(2, device=DEVICE)
    lanes, row = Lanes.of(made.spec, 2, per_head=False), torch.ones(1, dtype=torch.int64, device=DEVICE)
    whole = QuantisedSlots(plan, made, lanes, padding, row)
    budget = round(share * whole.kv_bytes)

    less = QuantisedSlots(with_budget(plan, budget), made, lanes, padding, row)

    token = 2 * made.spec.layers * made.spec.kv_heads * (2 * CHANNELS + 4)
    assert budget - token < less.kv_bytes <= budget
    assert less.near + less.far == whole.near


@pytest.mark.parametrize("kv_format, family", [(KvFormat.INT8, "opt"), (KvFormat.FP8, "llama")])
def test_eight_bits_swapped_out_and_in_decode_as_eagerly(kv_format: KvFormat, family: str) -> None:
    made = decoder(family, DType.FP32, seed=1)
    plan, prompts = drawn(3, made, kv_format, batch=3, prompt=58, output=9)
    needed = -(-plan.setting.workload.cached_tokens // PAGE_TOKENS) + (8 if kv_format is KvFormat.INT8 else 0)
    tight = paged(plan, pages=2 * needed - 1, concurrency=2, preemption=Preemption.SWAP)
    assert left(tight) > 0
    eager = execute(plan, made, prompts, options=Options(stop=False))
    run = PagedWave(tight, made).run(padded(prompts, plan.setting.workload.prompt_tokens, made.device))
    assert [tuple(row) for row in run.tokens.tolist()] == list(eager.completions)

"""A captured decode step gives what the eager runtime gives: tokens, logits and selections.

Without a GPU the kernels are interpreted, which is slow: there each test takes few steps, and one width.
"""

from dataclasses import replace

import pytest
import torch

from runtime.execute import Options, Run, execute
from runtime.graph.run import GraphWave
from runtime.models.decoder import Decoder
from runtime.recorder import Record
from sim.attention import Selector
from sim.homes import TokenHomes
from sim.plan import Mechanism, Placement, Plan
from sim.spec import DType
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, TOLERANCE, decoder, draw_prompts, kernels, padded
from tests.runtime.plans import Choice, all_in_hbm

FAMILIES = ["opt", "wide opt", "llama", "grouped qwen3"] if ON_GPU else ["opt", "grouped qwen3"]


def resident(plan: Plan, slots: int) -> Plan:
    """The plan with ``slots`` in HBM: of what is more, the selected tokens have copies."""
    counts = plan.setting.token_counts
    rows, off = [], 0
    for cached, dead, local, selected in zip(counts.cached, counts.dead, counts.local, counts.selected, strict=True):
        living = cached - dead
        if living > slots:
            off = max(off, min(living - local, selected + living - slots))
        copies = max(0, min(off, slots - (living - off)))
        rows.append((living - off, off, copies))
    hbm, host, copies_column = zip(*rows, strict=True)
    none = (0,) * len(rows)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=counts.dead, copies=copies_column)
    return Plan(setting=replace(plan.setting, placement=Placement.RESIDENT), homes=homes)


def newest_in_hbm(plan: Plan, slots: int) -> Plan:
    """The plan under dense attention with ``slots`` in HBM."""
    cached = plan.setting.token_counts.cached
    none = (0,) * len(cached)
    hbm, host = tuple(min(n, slots) for n in cached), tuple(max(0, n - slots) for n in cached)
    return replace(plan, homes=TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none))


def compare(plan: Plan, made: Decoder, lengths: list[int], dtype: DType) -> None:
    """Step by step, until rounding lets the two part: then they have seen other tokens."""
    prompts = draw_prompts(lengths, seed=5)
    record = Record(picks=True, logits=True)
    eager = execute(plan, made, prompts, options=Options(stop=False, record=record))
    prepared = padded(plan, made, prompts)
    wave = GraphWave(plan, made, prepared.padding.tolist())
    logits, picks = [], []

    def look(_: int) -> None:
        logits.append(wave.step.logits.float().clone())
        picks.append(wave.slots.picks())

    for _ in range(2 if ON_GPU else 1):  # the second run finds the slots as the first one left them
        logits.clear()
        picks.clear()
        run = wave.run(prepared, look)
        logits.append(wave.step.logits.float().clone())
        check(plan, eager, run.tokens.tolist(), torch.stack(logits[1:], 1), picks, dtype)


def check(plan: Plan, eager: Run, tokens: list[list[int]], logits: torch.Tensor, picks: list, dtype: DType) -> None:
    assert eager.logits is not None
    if dtype is DType.FP32:
        assert tokens == [list(row) for row in eager.completions]
    for lane, row in enumerate(eager.completions):
        same = next((at for at, (a, b) in enumerate(zip(tokens[lane], row, strict=True)) if a != b), len(row))
        parted = same
        if picks[0]:
            parted = min(same, first_other_pick(plan, eager, picks, lane))
        got, want = logits[lane, : parted - 1], eager.logits[lane, 1:parted]
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=0)
        assert parted >= (len(row) if dtype is DType.FP32 else 4)


def first_other_pick(plan: Plan, eager: Run, picks: list, lane: int) -> int:
    assert eager.picks is not None
    counts = plan.setting.token_counts
    for row in range(1, plan.homes.steps):
        older = counts.cached[row] - counts.local[row]
        for layer, lanes in enumerate(picks[row - 1]):
            got = [token for token in lanes[lane] if token < older]
            if got != sorted(eager.picks[row - 1][layer][lane]):
                return row
    return plan.homes.steps


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
def test_window_decoding_by_graph_is_eager_decoding(family: str, dtype: DType, slots: int | None) -> None:
    """With few slots in HBM tokens go to host memory and some come back."""
    made = decoder(family, dtype, seed=2)
    output = 70 if ON_GPU else 12
    choice = Choice(selector=Selector.SWA, sparsity=0.8, batch=3, concurrency=3, prompt=40, output=output, dtype=dtype)
    plan = resident(all_in_hbm(made.spec, choice), slots or 200)
    compare(plan, made, [40, 37, 12], dtype)

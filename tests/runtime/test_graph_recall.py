"""A captured step that recalls by page digests gives what the eager runtime gives, and fetches what that fetches."""

from dataclasses import replace

import pytest
import torch

from runtime.execute import execute
from runtime.graph import launch, recall
from runtime.graph.run import GraphWave
from runtime.options import Options, Run
from runtime.prefill import prompt_layer
from runtime.recorder import Record
from sim.attention import Selector
from sim.homes import TokenHomes
from sim.plan import Placement, Plan, WriteBack
from sim.spec import DType
from tests.runtime.graphs import DEVICE, DTYPES_TRIED, ON_GPU, check, decoder, draw_prompts, follow, kernels, padded
from tests.runtime.plans import Choice, all_in_hbm


def recalled(plan: Plan, home: int, write_back: WriteBack) -> Plan:
    """The newest ``home`` tokens in HBM, the older ones on the host, what is selected of them has a copy."""
    counts = plan.setting.token_counts
    off = tuple(max(0, cached - home) for cached in counts.cached)
    none = (0,) * len(off)
    homes = TokenHomes(
        hbm=tuple(cached - out for cached, out in zip(counts.cached, off, strict=True)),
        host_kv=off,
        activations=none,
        dropped=none,
        copies=tuple(min(out, far) for out, far in zip(off, counts.selected, strict=True)),
    )
    return Plan(setting=replace(plan.setting, placement=Placement.RESIDENT, write_back=write_back), homes=homes)


def sparse_plan(family_spec: object, dtype: DType, lanes: int) -> Plan:
    choice = Choice(
        selector=Selector.PAGES,
        sparsity=0.6,
        batch=lanes,
        concurrency=lanes,
        prompt=70,
        output=60 if ON_GPU else 8,
        dtype=dtype,
    )
    return all_in_hbm(family_spec, choice)  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("write_back", WriteBack)
def test_recall_by_graph_is_eager_recall(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: DType, write_back: WriteBack
) -> None:
    """One program writes both lanes' tokens back, head by head."""
    monkeypatch.setattr(launch, "_EXCHANGING", 1)
    monkeypatch.setattr(recall, "EXCHANGED_HEADS", 1)
    made = decoder(family, dtype, seed=4)
    plan = recalled(sparse_plan(made.spec, dtype, lanes=2), 30 if ON_GPU else 18, write_back)
    prompts = draw_prompts([70, 70], seed=6)
    eager = execute(plan, made, prompts, options=Options(stop=False, record=Record(picks=True, logits=True)))

    prepared = padded(plan, made, prompts)
    wave = GraphWave(plan, made, prepared.padding.tolist())
    seen = follow(wave, prepared, eager, dtype)

    check(eager, seen, [first_other_copies(plan, eager, seen.picks, lane) for lane in range(2)], dtype)
    if dtype is DType.FP32:
        assert fetched(wave) == fetched_eagerly(plan, eager)


def first_other_copies(plan: Plan, eager: Run, held: list, lane: int) -> int:
    """The first row in which other tokens off HBM have a copy than those that were picked eagerly, or the number of rows."""
    assert eager.picks is not None
    for row in range(1, plan.homes.steps):
        off = plan.homes.host_kv[row]
        for layer, lanes in enumerate(held[row]):
            if [token for token in lanes[lane] if token < off] != [
                token for token in sorted(eager.picks[row - 1][layer][lane]) if token < off
            ]:
                return row
    return plan.homes.steps


def fetched(wave: GraphWave) -> list[int]:
    """Tokens of all lanes and layers, by row."""
    return wave.slots.fetched_tokens.sum((0, 2)).tolist()[1:]  # type: ignore[union-attr, no-any-return]


def fetched_eagerly(plan: Plan, eager: Run) -> list[int]:
    """From the picks: what is off HBM and was not attended to in the step before."""
    assert eager.picks is not None
    counts, homes = plan.setting.token_counts, plan.homes
    totals = []
    for row in range(1, homes.steps):
        total = 0
        for layer, lanes in enumerate(eager.picks[row - 1]):
            for lane, picks in enumerate(lanes):
                near = range(counts.cached[row - 1] - counts.local[row - 1], counts.cached[row - 1])
                before = {*near, *(eager.picks[row - 2][layer][lane] if row > 1 else ())}
                total += sum(token < homes.host_kv[row] and token not in before for token in picks)
        totals.append(total)
    return totals


def test_a_long_prompt_is_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder("grouped llama", DType.FP32, seed=7)
    tokens = torch.tensor(draw_prompts([70, 70], seed=8), device=DEVICE)
    positions = torch.arange(70, device=DEVICE).expand(2, -1)
    x = made.embed(tokens, positions)
    whole = prompt_layer(made, 0, x, positions, torch.zeros(2, dtype=torch.int64, device=DEVICE))

    monkeypatch.setattr("runtime.prefill.PREFILL_CHUNK_TOKENS", 32)
    chunked = prompt_layer(made, 0, x, positions, None)

    for got, want in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

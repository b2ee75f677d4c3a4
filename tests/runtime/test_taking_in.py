"""What a captured step's window keeps of a prompt is what ledger and selector keep, to the bit, ties and padding included."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.execute import DTYPES
from runtime.graph import taking_in
from runtime.graph.taking_in import Prompt, Window, prompt_weights
from runtime.graph.window import WindowSlots
from runtime.lanes import Lanes
from runtime.ledger import Ledger
from runtime.prefill import first_picks
from runtime.selectors import Scope
from runtime.selectors.swa import SparseWindow
from sim.attention import Selector
from sim.plan import Plan
from sim.spec import DType
from tests.runtime.graphs import DEVICE, decoder, kernels, resident
from tests.runtime.plans import Choice, all_in_hbm

LANES, LAYER = 3, 1


def ledger_of(plan: Plan, padding: Tensor, q: Tensor, k: Tensor, lanes: Lanes) -> tuple[Ledger, SparseWindow]:
    """After the prompt, and after what dies before the first step."""
    ledger, selector = Ledger(plan, LANES, DEVICE), SparseWindow(Scope.of(plan.setting, padding, q.dtype))
    selector.start(lanes.queries(q), k)
    ledger.want(0, torch.zeros_like(ledger.alive))
    ledger.want(1, first_picks(ledger, selector))
    ledger.bury(0)
    ledger.bury(1)
    return ledger, selector


def draw(prompt: int, heads: int, channels: int, dtype: DType, spread: int | None) -> Tensor:
    """[lane, token, head, channel], heads as far apart as in a product's rows; ``spread``: of whole numbers, to tie."""
    rows = torch.randn(LANES, prompt, heads, 2 * channels)
    rows = rows if spread is None else (rows * spread).round()
    return rows.to(DEVICE, DTYPES[dtype])[..., :channels]


@kernels
@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16, DType.BF16])
@pytest.mark.parametrize("spread", [None, 1, 0], ids=["apart", "some tie", "all tie"])
@pytest.mark.parametrize(
    ("prompt", "sparsity", "local_fraction", "slots"),
    [(40, 0.8, 0.5, 11), (131, 0.8, 0.5, 40), (131, 0.3, 0.3, 200), (17, 0.5, 1.0, 200), (1, 0.8, 0.5, 200)],
)
def test_a_window_takes_a_prompt_in_as_ledger_and_selector_do(
    dtype: DType, spread: int | None, prompt: int, sparsity: float, local_fraction: float, slots: int
) -> None:
    torch.manual_seed(prompt)
    made = decoder("grouped llama", dtype, seed=1)
    choice = Choice(selector=Selector.SWA, sparsity=sparsity, batch=LANES, concurrency=LANES, prompt=prompt, output=4)
    plan = all_in_hbm(made.spec, replace(choice, dtype=dtype, local_fraction=local_fraction))
    plan = resident(plan, slots)
    padding = torch.tensor([0, prompt // 3, prompt - 1], dtype=torch.int32, device=DEVICE)
    lanes, spec = Lanes.of(made.spec, LANES, per_head=False), made.spec
    q, k, v = (
        draw(prompt, heads, spec.head_dim, dtype, spread) for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    )
    taken = WindowSlots(plan, made, lanes, padding, torch.ones(1, dtype=torch.int64, device=DEVICE))

    with torch.inference_mode():
        for first, last in ((0, 2), (2, LANES)):  # in passes
            taken.start(LAYER, first, q[first:last], k[first:last], v[first:last])
        ledger, selector = ledger_of(plan, padding, q, k, lanes)

    assert selector.prompt is not None
    attended = ledger.alive & ledger.wanted
    queries = torch.arange(prompt - selector.prompt.shape[1], prompt, device=DEVICE) % taken.state.ring.shape[2]
    for lane in range(LANES):
        first = attended[lane].nonzero()[:, 0]
        entries = torch.cat((first, torch.tensor([prompt], device=DEVICE), others(ledger, attended, lane)))
        held, newborn = len(entries), len(first)
        position, last = taken.state.position[LAYER, lane], taken.state.last[LAYER, lane]
        listed = taken.state.slots[LAYER, lane, : newborn + 1]

        assert position[:held].tolist() == entries.tolist()
        assert last[:held].tolist() == [1 if entry == prompt else int(ledger.last[lane, entry]) for entry in entries]
        assert set(position[held:].tolist()) | set(last[held:].tolist()) <= {-1}
        assert taken.state.counts[LAYER, lane] == newborn + 1
        assert listed.tolist() == [at if entries[at] >= padding[lane] else -1 for at in range(newborn + 1)]
        at = [entry for entry in range(held) if entry != newborn]
        tokens = entries[at]
        assert torch.equal(taken.state.ring[LAYER, lane, queries][:, at], selector.prompt[lane][:, tokens])
        assert torch.equal(rows(taken, lane)[0][at], k[lane, tokens])
        assert torch.equal(rows(taken, lane)[1][at], v[lane, tokens])
    assert not taken.state.position[0].ge(0).any()  # another layer's


@kernels
@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
@pytest.mark.parametrize("at_once", [(1, 37), (2, 37), (1, 16), (1, 1)])
def test_some_lanes_or_queries_at_a_time_pay_what_all_do_at_once(dtype: DType, at_once: tuple[int, int]) -> None:
    """Whole numbers, so that products are exact, however a library cuts them."""
    torch.manual_seed(1)
    made, prompt = decoder("grouped llama", dtype, seed=1), 41
    choice = Choice(selector=Selector.SWA, sparsity=0.1, local_fraction=1.0, batch=LANES, prompt=prompt, output=4)
    setting, lanes = (
        all_in_hbm(made.spec, replace(choice, dtype=dtype)).setting,
        Lanes.of(made.spec, LANES, per_head=False),
    )
    history = [setting.attention.history_steps(cached) for cached in setting.token_counts.cached[:2]]
    window = Window(counts=setting.token_counts, history=(history[0], history[1]))
    assert window.queries > 37
    q, k = (draw(prompt, heads, made.spec.head_dim, dtype, spread=1) for heads in (made.spec.heads, made.spec.kv_heads))
    padding = torch.tensor([9, 0, prompt // 3, prompt - 1], dtype=torch.int32, device=DEVICE)
    taken = Prompt(k=k, v=k, first_lane=1, first_row=1)

    whole, parts = (
        prompt_weights(window, lanes.queries(q), taken, padding, sizes) for sizes in ((LANES, window.queries), at_once)
    )

    assert whole.isnan().any(-1).sum() == prompt // 3 - (prompt - window.queries) + window.queries - 1
    assert torch.equal(whole.nan_to_num(-1), parts.nan_to_num(-1))


@kernels
def test_a_long_prompts_window_is_taken_in_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two lanes one after the other, and 15 queries at a time."""
    made, sizes = decoder("opt", DType.FP32, seed=1), list[tuple[int, ...]]()
    choice = Choice(selector=Selector.SWA, sparsity=0.2, batch=2, concurrency=2, prompt=100, output=3, dtype=DType.FP32)
    slots = WindowSlots(
        all_in_hbm(made.spec, choice),
        made,
        Lanes.of(made.spec, 2, per_head=False),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
        torch.ones(1, dtype=torch.int64, device=DEVICE),
    )
    q, k, v = (draw(100, 4, 16, DType.FP32, spread=1)[:2] for _ in range(3))
    masked = taking_in._masked

    def spy(*args: Any) -> Tensor:
        sizes.append(tuple(args[0].shape[:2]))
        return masked(*args)

    monkeypatch.setattr(taking_in, "_masked", spy)
    with torch.inference_mode():
        slots.start(0, 0, q, k, v)
        monkeypatch.setattr("sim.footprint._FEW_BYTES", 15 * 2 * 4 * 4 * 100)
        monkeypatch.setattr("sim.footprint._gone_entries", lambda *_: 0)
        slots.start(1, 0, q, k, v)

    assert sizes == [(2, 40), (1, 15), (1, 15), (1, 10), (1, 15), (1, 15), (1, 10)]
    for held in (*slots.state, slots.keys, slots.values):
        assert torch.equal(held[0], held[1])


def others(ledger: Ledger, attended: Tensor, lane: int) -> Tensor:
    return (ledger.alive & ~attended)[lane].nonzero()[:, 0]


def rows(taken: WindowSlots, lane: int) -> list[Tensor]:
    """Keys and values [entry, head, channel], from HBM, then from the host."""
    pairs = ((taken.keys, taken.host_keys), (taken.values, taken.host_values))
    return [torch.cat((near[LAYER, lane].transpose(0, 1), far[LAYER, lane].to(near.device))) for near, far in pairs]

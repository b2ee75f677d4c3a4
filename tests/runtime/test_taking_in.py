"""What a captured step's window keeps of a prompt is what ledger and selector keep, to the bit, ties and padding included."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.execute import DTYPES
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


def others(ledger: Ledger, attended: Tensor, lane: int) -> Tensor:
    return (ledger.alive & ~attended)[lane].nonzero()[:, 0]


def rows(taken: WindowSlots, lane: int) -> list[Tensor]:
    """Keys and values [entry, head, channel], from HBM, then from the host."""
    pairs = ((taken.keys, taken.host_keys), (taken.values, taken.host_values))
    return [torch.cat((near[LAYER, lane].transpose(0, 1), far[LAYER, lane].to(near.device))) for near, far in pairs]

"""A captured step takes a prompt's digests, homes and rows in as selector and plan have them, to the bit, padding included."""

from dataclasses import replace

import pytest
import torch

from runtime.execute import DTYPES
from runtime.graph.recall import RecallSlots
from runtime.lanes import Lanes
from runtime.selectors import Scope
from runtime.selectors.pages import Pages
from sim.attention import PAGE_TOKENS, Selector
from sim.plan import WriteBack
from sim.spec import DType
from tests.runtime.graphs import DEVICE, decoder, kernels
from tests.runtime.plans import Choice, all_in_hbm
from tests.runtime.test_graph_recall import recalled

LANES, LAYER, HOME = 3, 1, 10


@kernels
@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16, DType.BF16])
@pytest.mark.parametrize("prompt", [1, 15, 16, 70])
@pytest.mark.parametrize("write_back", WriteBack)
def test_a_prompt_is_taken_in_page_by_page(prompt: int, dtype: DType, write_back: WriteBack) -> None:
    """In two passes, over what an earlier prompt left; heads lie as far apart as in a product's rows, or next to each other."""
    torch.manual_seed(prompt)
    made = decoder("grouped llama", dtype, seed=1)
    choice = Choice(selector=Selector.PAGES, sparsity=0.8, batch=LANES, concurrency=LANES, prompt=prompt, output=6)
    plan = recalled(all_in_hbm(made.spec, replace(choice, dtype=dtype)), HOME, write_back)
    padding = torch.tensor([0, prompt // 3, prompt - 1], dtype=torch.int32, device=DEVICE)
    lanes, shape = Lanes.of(made.spec, LANES, per_head=False), (LANES, prompt, made.spec.kv_heads)
    slots = RecallSlots(plan, made, lanes, padding, torch.ones(1, dtype=torch.int64, device=DEVICE))
    for tensor in slots.state:
        tensor.fill_(3)
    k = torch.randn(*shape, 2 * made.spec.head_dim).to(DEVICE, DTYPES[dtype])[..., : made.spec.head_dim]
    v = torch.randn(*shape, made.spec.head_dim).to(DEVICE, DTYPES[dtype])

    for first, last in ((0, 2), (2, LANES)):
        slots.start(LAYER, first, k[first:last], k[first:last], v[first:last])

    expected = Pages(Scope.of(plan.setting, padding, DTYPES[dtype]))
    expected.start(k, k)
    assert expected.digests is not None
    assert slots.pages == -(-plan.setting.workload.cached_tokens // PAGE_TOKENS)
    assert torch.equal(slots.state.digests[LAYER], expected.digests)
    off = plan.homes.host_kv[1]
    near = range(off, prompt)
    assert [[at for at in lane if at >= 0] for lane in slots.state.holds[LAYER].tolist()] == [list(near)] * LANES
    for lane in slots.state.slot_of[LAYER].tolist():
        assert [token for token, slot in enumerate(lane) if slot >= 0] == list(near)
        assert torch.equal(slots.keys[LAYER, :, :, lane[off:prompt]], k[:, off:].transpose(1, 2))
        assert torch.equal(slots.values[LAYER, :, :, lane[off:prompt]], v[:, off:].transpose(1, 2))
    on_host = prompt if write_back is WriteBack.AT_BIRTH else off
    assert torch.equal(slots.host_keys[LAYER, :, :on_host].to(DEVICE), k[:, :on_host])
    assert not slots.state.taken[LAYER].any()
    assert (slots.state.digests[0] == 3).all()  # another layer's

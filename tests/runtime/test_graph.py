"""A captured decode step gives what the eager runtime gives: tokens, logits and selections.

Without a GPU the kernels are interpreted, which is slow: there each test takes few steps, and one width.
"""

from dataclasses import replace

import pytest

from runtime.graph.recent import stage_rows
from sim.attention import Selector
from sim.flows import held_state_bytes
from sim.kv import KvFormat, kv_layer_bytes
from sim.plan import Mechanism
from sim.spec import DType
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, kernels, newest_in_hbm, recent, resident
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
def test_window_decoding_by_graph_is_eager_decoding(family: str, dtype: DType, slots: int | None) -> None:
    """With few slots in HBM tokens go to host memory and some come back."""
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
@pytest.mark.parametrize(("family", "depth"), [("flat opt", 1), ("deep opt", 1), ("deep opt", 2), ("deep opt", 4)])
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
    monkeypatch.setattr("runtime.graph.recent.stage_rows", lambda *_: rows)
    made, output = decoder(family, DType.FP32, seed=2), 40 if ON_GPU else 4
    choice = Choice(selector=Selector.SWA, batch=2, concurrency=2, prompt=20, output=output, dtype=DType.FP32)
    compare(recent(all_in_hbm(made.spec, choice), [13]), made, [20, 9], DType.FP32)


def test_a_stage_has_room_for_all_that_is_selected_or_for_what_the_budget_has() -> None:
    made = decoder("opt", DType.FP32, seed=2)
    plan = recent(all_in_hbm(made.spec, Choice(selector=Selector.SWA, concurrency=2, prompt=20)), [13])
    token = kv_layer_bytes(made.spec, plan.setting.dtype, KvFormat.NATIVE)
    slots = 13 * token * made.spec.layers + made.spec.layers * held_state_bytes(plan.setting).max()

    def rows(budget_bytes: float) -> int:
        return stage_rows(with_budget(plan, int(budget_bytes)), near=13, buffers=2)

    assert rows(2**40) == max(plan.setting.token_counts.selected)
    assert rows(2 * (slots + 2 * 3 * token)) == 3
    assert rows(slots) == 0

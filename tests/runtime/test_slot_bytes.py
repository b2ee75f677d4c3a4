"""What the simulator says that captured slots take in HBM is what their tensors take, to the byte."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.graph.recall import RecallSlots
from runtime.graph.recent import RecentSlots
from runtime.graph.run import slots_kind
from runtime.lanes import Lanes
from runtime.models import Decoder
from sim.attention import Selector
from sim.kv import KvFormat, KvFormats
from sim.plan import Mechanism, Plan, WriteBack
from sim.slot_bytes import slots_bytes
from sim.slots import hbm_slots
from sim.spec import DType
from tests.runtime.graphs import DEVICE, decoder, kernels, newest_in_hbm, recent, resident
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_graph_recall import recalled

LANES = 3
INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
ON_HOST = {"host_keys", "host_values", "far_planes", "there"}


def plan_of(made: Decoder, selector: Selector, kv_format: KvFormats, prompt: int, **other: Any) -> Plan:
    choice = Choice(selector=selector, batch=LANES, concurrency=LANES, prompt=prompt, output=9, dtype=DType.FP16)
    plan = all_in_hbm(made.spec, replace(choice, kv_format=kv_format, **other))
    return replace(plan, setting=replace(plan.setting, fetch_by=Mechanism.GATHER_KERNEL))


def held_bytes(plan: Plan, made: Decoder, lanes: int) -> int:
    """Of HBM, by the tensors of slots for so many lanes."""
    padding, row = torch.zeros(lanes, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    slots = slots_kind(plan)(plan, made, Lanes.of(made.spec, lanes, per_head=False), padding, row)
    members = [held for name, held in vars(slots).items() if name not in ON_HOST and held is not padding]
    tensors = [one for held in members for one in (held if isinstance(held, tuple) else [held])]
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))


def lane_bytes(plan: Plan, made: Decoder) -> int:
    """Of one lane; tables, which all lanes share, are left out."""
    return held_bytes(plan, made, LANES + 1) - held_bytes(plan, made, LANES)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped llama", "grouped qwen3"])
@pytest.mark.parametrize("kv_format", [KvFormats(), INT8], ids=["native", "int8"])
@pytest.mark.parametrize(
    ("prompt", "sparsity", "slots"), [(40, 0.8, 200), (40, 0.8, 12), (40, 0.3, 200), (140, 0.3, 110), (140, 0.8, 40)]
)
def test_a_window_holds_entries_past_weights_and_scores(
    family: str, kv_format: KvFormats, prompt: int, sparsity: float, slots: int
) -> None:
    made = decoder(family, DType.FP16, seed=1)
    plan = resident(plan_of(made, Selector.SWA, kv_format, prompt, sparsity=sparsity), slots)

    assert lane_bytes(plan, made) == slots_bytes(plan)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped llama", "flat opt", "deep opt"])
@pytest.mark.parametrize("kv_format", [KvFormats(), INT8], ids=["native", "int8"])
@pytest.mark.parametrize("drop_dead", [True, False])
@pytest.mark.parametrize("slots", [[22], [30, 30, 23], [200]])
def test_a_stage_comes_besides_where_hbm_holds_the_newest(
    family: str, kv_format: KvFormats, *, drop_dead: bool, slots: list[int]
) -> None:
    made = decoder(family, DType.FP16, seed=1)
    plan = recent(plan_of(made, Selector.SWA, kv_format, 40, drop_dead=drop_dead), slots)
    assert issubclass(slots_kind(plan), RecentSlots) == (min(slots) < 200)

    assert lane_bytes(plan, made) == slots_bytes(plan)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("kv_format", [KvFormats(), INT8], ids=["native", "int8"])
@pytest.mark.parametrize(("prompt", "slots"), [(40, 200), (40, 12), (140, 100)])
def test_dense_slots_read_the_others_where_they_lie(family: str, kv_format: KvFormats, prompt: int, slots: int) -> None:
    made = decoder(family, DType.FP16, seed=1)
    plan = newest_in_hbm(plan_of(made, Selector.DENSE, kv_format, prompt), slots)

    assert lane_bytes(plan, made) == slots_bytes(plan)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("write_back", WriteBack)
@pytest.mark.parametrize("home", [18, 30, 200])
def test_recall_holds_digests_and_what_a_step_is_told(family: str, write_back: WriteBack, home: int) -> None:
    made = decoder(family, DType.FP16, seed=1)
    plan = recalled(plan_of(made, Selector.PAGES, KvFormats(), 70, sparsity=0.6), home, write_back)
    assert slots_kind(plan) is RecallSlots

    assert lane_bytes(plan, made) == slots_bytes(plan)
    assert hbm_slots(plan) <= plan.setting.workload.cached_tokens


@kernels
@pytest.mark.parametrize("kind", ["window", "dense", "recent", "recent int8"])
def test_a_tight_budget_leaves_fewer_slots(kind: str) -> None:
    made = decoder("opt", DType.FP16, seed=1)
    selector, kv_format = (
        Selector.DENSE if kind == "dense" else Selector.SWA,
        KvFormats() if kind == "recent" else INT8,
    )
    newest = kind.startswith("recent")
    plan = plan_of(made, selector, kv_format, 60, sparsity=0.7, drop_dead=not newest)
    if kind != "dense":
        plan = recent(plan, [44, 30]) if newest else resident(plan, 60)
    ample = slots_bytes(plan)
    assert ample is not None
    tight = with_budget(plan, LANES * ample // 2)

    told = slots_bytes(tight)

    assert told is not None
    assert told == lane_bytes(tight, made)
    assert told < ample

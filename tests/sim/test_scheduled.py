"""What a machine step costs in which some sequences decode and others enter: by hand, on a schedule written by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import hypotenuse, in_hbm, make_cost, make_machine, make_model, make_setting
from sim.admission import Run, Schedule
from sim.attention_prices import attention_turn_s
from sim.capture import is_captured
from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.footprint import prefill_rows
from sim.kv import KvFormat, KvFormats
from sim.layer import LayerTimes, layer_times
from sim.layer_prices import priced_layer
from sim.occupancy import occupancy_of
from sim.plan import Admission
from sim.scheduled import admit, paged_bytes, scheduled_times
from sim.spec import MachineSpec

NONE = np.zeros(5)
# The first enters in step 0, the second in step 1, beside the first one's first decode step; the last step is the second's.
STAGGERED = Schedule(
    steps=5,
    runs=(Run(machine_step=1, sequence_step=1, length=3), Run(machine_step=2, sequence_step=1, length=3)),
    prefilled=np.array([1.0, 1.0, 0.0, 0.0, 0.0]),
    prefilled_tokens=np.array([4.0, 4.0, 0.0, 0.0, 0.0]),
    prefill_lengths=np.array([1.0, 1.0, 0.0, 0.0, 0.0]),
    swapped_in=NONE,
    swapped_out=NONE,
    held_bytes=NONE,
    host_bytes=NONE,
    served=(),
)


def staggered(
    kv: KvFormat = KvFormat.NATIVE,
    *,
    planned: Schedule = STAGGERED,
    heads: int = 1,
    machine: MachineSpec | None = None,
    **constants: float,
) -> LayerTimes:
    machine, model = machine or make_machine(flop_per_s=512.0), make_model(heads=heads, kv_heads=heads)
    admitted = {"admission": Admission.CONTINUOUS, "concurrency": 2, "kv_format": KvFormats(gpu=kv, host=kv)}
    setting = make_setting(batch=2, machine=machine, model=model, **admitted)
    cost: CostModel = make_cost(machine, **constants)
    plan = in_hbm(setting)
    return scheduled_times(cost, setting, flows_of(plan, home_columns(plan.homes)), planned)


def test_newcomers_have_products_of_their_own_and_a_captured_step_has_all_lanes() -> None:
    """A row of q, k and v takes 3 s, their weights as well: 4 rows of a prompt 12 s, 2 lanes 6 s, though one may be idle."""
    entered_s, lanes_s = hypotenuse(3, 12), hypotenuse(3, 6)
    assert staggered().ops["qkv"].tolist() == pytest.approx([entered_s, lanes_s + entered_s, *[lanes_s] * 3])


def test_newcomers_of_two_lengths_go_through_products_together_and_attend_apart() -> None:
    """Two in step 0, of 3 and 5 tokens: 8 rows, as of two of 4, and so much more for the second length: it attends, is copied and
    is stored by two that scatter and two that copy, 6 kernels of 1 s, which take the host 2.5, 0.55, 2 times 3 and 2 operations.
    """
    alike = replace(STAGGERED, prefilled=np.array([2.0, 0, 0, 0, 0]), prefilled_tokens=np.array([8.0, 0, 0, 0, 0]))
    alike = replace(alike, prefill_lengths=np.array([1.0, 0, 0, 0, 0]))
    unlike = replace(alike, prefill_lengths=np.array([2.0, 0, 0, 0, 0]))
    machine = make_machine(flop_per_s=512.0, launch_s=1.0)

    together, apart = (staggered(planned=one, machine=machine, host_operation_s=1.0) for one in (alike, unlike))

    assert (apart.ops["qkv"] == together.ops["qkv"]).all()
    assert (apart.layer_s - together.layer_s).tolist() == pytest.approx([6, 0, 0, 0, 0])
    assert (apart.launched_s - together.launched_s).tolist() == pytest.approx([2.5 + 0.55 + 6 + 2, 0, 0, 0, 0])


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 12),
    concurrency=st.integers(1, 12),
    prompt=st.sampled_from((1, 3, 40, 3000, 4050)),
    output=st.integers(2, 40),
    budget=st.floats(1.0, 4.0),
)
def test_no_step_prefills_more_rows_than_the_workspace_is_for(
    batch: int, concurrency: int, prompt: int, output: int, budget: float
) -> None:
    """But for a sequence alone, which returns with what it has; there is room for so many of the longest ones."""
    setting = make_setting(
        batch=batch, prompt=prompt, output=output, concurrency=min(batch, concurrency), admission=Admission.CONTINUOUS
    )
    plan = in_hbm(setting)
    homes = home_columns(plan.homes)
    occupancy = occupancy_of(plan, homes, flows_of(plan, homes))
    most_bytes = budget * float(paged_bytes(setting, occupancy.hbm).max())
    planned = admit(replace(setting, kv_budget_bytes=int(most_bytes)), occupancy)

    rows = prefill_rows(setting.concurrency, prompt)
    alone = planned.prefilled <= 1
    assert planned.prefilled_tokens[~alone].max(initial=0) <= rows
    assert planned.prefilled_tokens.max() <= max(rows, setting.workload.cached_tokens)


def test_what_a_block_of_streamed_weights_lacks_is_put_beside_it_in_every_step() -> None:
    """3 / 8 of a layer's 1,280 weights are on the host: of q, k and v, 768, what is left are 288, of 2 bytes, read and written."""
    machine, share = make_machine(), 3 / 8
    setting = make_setting(machine=machine, model=make_model(), weights_on_host=share)
    assert is_captured(setting)
    cost = make_cost(machine, elementwise_efficiency=0.5)

    prices = [priced_layer(cost, one, 1) for one in (setting, replace(setting, weights_on_host=0.0))]

    assert [one.completed_s for one in prices] == pytest.approx([2 * 2 * (768 - share * 1280) / 256, 0])
    plan = in_hbm(setting)
    norms = layer_times(prices[0], flows_of(plan, home_columns(plan.homes)), cost).ops["norms"]
    assert norms[1:].tolist() == pytest.approx([prices[0].completed_s] * 3)


def test_a_step_that_is_launched_has_a_row_for_each_that_decodes() -> None:
    entered_s, two_s, one_s = hypotenuse(3, 12), hypotenuse(3, 6), hypotenuse(3, 3)
    qkv_s = staggered(KvFormat.INT4).ops["qkv"].tolist()
    assert qkv_s == pytest.approx([entered_s, one_s + entered_s, two_s, two_s, one_s])


def test_attention_waits_for_the_lane_with_most_tokens() -> None:
    """So slow in turn that nothing else counts: 5 tokens, then 6, 7, 7."""
    per_token_s = attention_turn_s(make_cost(attention_token_s=1e6), make_setting(admission=Admission.CONTINUOUS), 1)

    seconds = staggered(attention_token_s=1e6).ops["attention"]

    assert (seconds[1:] / per_token_s).tolist() == pytest.approx([5, 6, 7, 7], rel=1e-3)


def test_attention_of_more_heads_than_run_at_once_is_gone_through_in_rounds() -> None:
    """240 programs at once: one sequence's 300 in two rounds, two's 600 in three, of as many tokens as the longest has."""
    per_token_s = attention_turn_s(make_cost(attention_token_s=1e6), make_setting(admission=Admission.CONTINUOUS), 1)

    seconds = staggered(heads=300, attention_token_s=1e6).ops["attention"]

    assert (seconds[1:] / per_token_s).tolist() == pytest.approx([2 * 5, 3 * 6, 3 * 7, 2 * 7], rel=1e-3)


def test_each_who_enters_attends_to_a_prompt_of_its_own() -> None:
    """4 tokens, 16 channels: half of the square at 512 FLOP/s takes 1 s, a tile of 9 s for one of ten multiprocessors less."""
    two = replace(STAGGERED, prefilled=STAGGERED.prefilled * 2, prefilled_tokens=STAGGERED.prefilled_tokens * 2)

    (one_s, *_), (two_s, *_) = (
        staggered(planned=planned, prompt_tile_s=16.0).ops["attention"] for planned in (STAGGERED, two)
    )
    by_tiles_s = staggered(planned=two, prompt_tile_s=64.0).ops["attention"]

    assert [one_s, two_s] == [1, 2]
    assert by_tiles_s[0] == pytest.approx(2 * 3.6)
    assert staggered().ops["attention"][2] == by_tiles_s[2]


def test_what_enters_is_rounded_by_kernels_and_newborn_tokens_by_a_captured_steps_attention() -> None:
    """A launch of a microsecond, where anything is rounded at all."""
    captured, eager = (staggered(kv).ops["convert"] for kv in (KvFormat.INT8, KvFormat.INT4))

    assert (captured[:2] > 0).all()
    assert captured[2:].tolist() == [0, 0, 0]
    assert (eager > 0).all()


def test_each_who_enters_gets_a_token_of_its_own_from_the_head() -> None:
    lanes, entered = (staggered().head_s[step] for step in (2, 0))

    assert staggered(step_overhead_s=0.0).head_s[1] == pytest.approx(lanes + entered)

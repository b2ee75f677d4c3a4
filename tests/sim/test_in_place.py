"""Captured steps whose attention reads what the host holds where it lies: nothing comes before a layer's query is there.

The tiny model's layer takes 3 s until its query is known, 1/8 s to attend to a token and 2 s after that, a step's head 1 s.
"""

from typing import Any

import numpy as np
import pytest

from builders import in_hbm, make_cost, make_machine, make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.capture import reads_in_place
from sim.cost import CostModel
from sim.engine import simulate
from sim.flows import flows_of, home_columns
from sim.forecast import forecast
from sim.kv import KvFormat, KvFormats
from sim.layer import LayerTimes, layer_times
from sim.layer_prices import layer_prices
from sim.plan import Admission, Mechanism, Placement, Plan, Recompute, WriteBack
from sim.trace import Resource

pytestmark = pytest.mark.usefixtures("nothing_between_products")
GATHER, COPY = Mechanism.GATHER_KERNEL, Mechanism.COPY_ENGINE
INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)


@pytest.mark.parametrize(
    ("changes", "in_place"),
    [
        ({"fetch_by": GATHER}, True),
        ({"fetch_by": COPY}, False),  # comes layer by layer, ahead
        ({"fetch_by": GATHER, "write_back": WriteBack.AT_BIRTH}, False),
        ({"fetch_by": GATHER, "recompute": Recompute.ACTIVATIONS_HOST}, False),
        ({"fetch_by": GATHER, "recompute": Recompute.TOKENS}, False),
        ({"fetch_by": COPY, "kv_format": INT8}, True),  # whatever the plan says
        ({"fetch_by": COPY, "kv_format": INT8, "recompute": Recompute.TOKENS}, False),
        (
            {"fetch_by": GATHER, "kv_format": KvFormats(gpu=KvFormat.INT8)},
            False,
        ),  # launched kernel by kernel, as the next ones
        ({"fetch_by": GATHER, "weights_on_host": 0.5, "model": make_model(layers=3)}, False),
        ({"fetch_by": GATHER, "weights_on_host": 0.5}, True),  # weights are copied, beside
        ({"fetch_by": GATHER, "host_attention": True}, False),
        ({"fetch_by": GATHER, "admission": Admission.CONTINUOUS}, False),  # all is in HBM
        ({"selector": Selector.SWA, "sparsity": 0.5, "placement": Placement.RESIDENT, "fetch_by": GATHER}, False),
    ],
)
def test_dense_attention_of_a_captured_wave_reads_in_place_what_is_not_copied(
    changes: dict[str, Any], in_place: bool
) -> None:
    setting = make_setting(**changes)
    cost = make_cost(setting.machine, gather_setup_s=1.0, copy_setup_s=2.0, gather_sm_share=0.25)

    prices = layer_prices(cost, setting, 1)

    assert reads_in_place(setting) == in_place
    assert prices.recalls == in_place
    assert (prices.ahead_share, prices.exposed_share) == ((0, 1) if in_place else (1, 0))
    assert (prices.fetch.pieces[-1][0] == 1.0) == (in_place or changes["fetch_by"] is GATHER)
    assert (prices.sm_share == 0) == (in_place or changes["fetch_by"] is COPY)


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({}, True),
        ({"recompute": Recompute.ACTIVATIONS_HOST, "fetch_by": COPY}, True),
        ({"recompute": Recompute.TOKENS, "fetch_by": COPY}, True),
        ({"recompute": Recompute.ACTIVATIONS_HOST, "kv_format": INT8}, True),
        ({"weights_on_host": 0.5}, True),
        ({"weights_on_host": 0.5, "model": make_model(layers=3)}, False),  # launched kernel by kernel
        ({"kv_format": KvFormats(gpu=KvFormat.INT8)}, False),
        ({"fetch_by": GATHER}, False),
    ],
)
def test_copies_for_a_step_in_pieces_wait_until_streams_agree(changes: dict[str, Any], waits: bool) -> None:
    """4 s, behind 2 s in which a copy starts."""
    cost = make_cost(copy_setup_s=2.0, copy_handover_s=4.0)

    prices = layer_prices(cost, make_setting(**changes), 1)

    assert (prices.fetch.pieces[-1][0] == 6) == waits
    assert prices.stream == cost.transfer(COPY)  # what goes to the host waits for nothing but its layer


@pytest.mark.parametrize("depth", [1, 2])
def test_a_layer_is_its_work_and_what_it_reads_from_the_host(depth: int) -> None:
    """Three layers; 7, then 8 tokens on the host at 2 s each, behind a start of 1 s: attention goes over them meanwhile, over the
    one in HBM after. The last step writes nothing back.
    """
    machine = make_machine(link_bytes_per_s=32.0)
    setting = make_setting(
        prompt=7, output=3, machine=machine, model=make_model(layers=3), fetch_by=GATHER, prefetch_layers=depth
    )
    plan, cost = newest_in_hbm(setting, slots=1), make_cost(machine, gather_setup_s=1.0)

    step_s = forecast(plan, cost).waves[0].step_s.tolist()

    written_s = 2  # of the newborn token, behind its layer; longer than the head takes
    assert step_s[1:] == [3 * (3 + 1 / 8 + 2 + 1 + 7 * 2) + written_s, 3 * (3 + 1 / 8 + 2 + 1 + 8 * 2) + 1]
    assert simulate(plan, cost).outcome.makespan_s == sum(step_s)


def test_a_link_quicker_than_attention_spares_it_no_more_than_it_takes() -> None:
    """7, then 8 tokens on the host, each there in 1/16 s, and attended to in 5/12 s: a turn of 16 channels."""
    machine = make_machine(link_bytes_per_s=1024.0)
    setting = make_setting(prompt=7, output=3, machine=machine, fetch_by=GATHER)
    cost = make_cost(machine, attention_token_s=1.0)
    near, away = (layer_of(plan, cost) for plan in (in_hbm(setting), newest_in_hbm(setting, slots=1)))

    assert near.ops["attention"][1:] - away.ops["attention"][1:] == pytest.approx(np.array([7, 8]) / 16)
    assert away.correct_s[1:] == pytest.approx(np.array([7, 8]) / 16)


def layer_of(plan: Plan, cost: CostModel) -> LayerTimes:
    return layer_times(layer_prices(cost, plan.setting, 1), flows_of(plan, home_columns(plan.homes)), cost)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_streamed_weights_of_a_step_that_reads_in_place_come_one_layer_ahead(depth: int) -> None:
    """1280 bytes of each of six layers at 64 a second, 20 s, in each of two steps; the first layer's wait for nothing.

    A layer asks for the next one's once its query is known; the GPU is done with all but the last one meanwhile. That one takes
    3 s, and another for the 256 bytes that the 1280 lack of q, k and v, read and written.
    """
    setting = make_setting(
        output=2, model=make_model(layers=6), fetch_by=GATHER, weights_on_host=0.5, prefetch_layers=depth
    )
    plan = newest_in_hbm(setting, slots=5)
    assert reads_in_place(setting)

    outcome = simulate(plan, make_cost()).outcome

    assert outcome.h2d_bytes == 2 * 6 * 1280
    assert outcome.makespan_s == 20 + (3 + 6 * 20) + (3 + 5 * 20 + 5 / 8 + 2 + 1 + 2 * 256 / 512)
    assert forecast(plan, make_cost()).outcome.makespan_s == outcome.makespan_s


def test_the_link_is_busy_between_a_layers_query_and_its_attention() -> None:
    """Two layers, one step: 4 tokens at a second each. A prefill writes the 4 that have no slot in its second step."""
    plan = newest_in_hbm(make_setting(output=2, fetch_by=GATHER), slots=1)

    (wave,) = simulate(plan, make_cost()).waves

    begun = wave.step_end_s[0]
    rows = [(s.name, s.resource, s.layer, s.start_s - begun, s.end_s - begun) for s in wave.spans if s.step == 1]
    gpu, link = Resource.GPU, Resource.H2D
    assert [row for row in rows if row[1] is gpu] == [
        ("query", gpu, 0, 0, 3),
        ("attend", gpu, 0, 7, 7.125),  # to the token in HBM; the others while they came
        ("rest", gpu, 0, 7.125, 9.125),
        ("query", gpu, 1, 9.125, 12.125),
        ("attend", gpu, 1, 16.125, 16.25),
        ("rest", gpu, 1, 16.25, 18.25),
        ("head", gpu, None, 18.25, 19.25),
    ]
    assert [row[2:] for row in rows if row[1] is link] == [(0, 3, 7), (1, 12.125, 16.125)]

"""A run moves what the simulator says when it replays the run's own selection."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.execute import execute
from runtime.options import Options
from runtime.recorder import Record
from sim.flows import home_columns
from sim.footprint import layer_weight_bytes
from sim.kv import inputs_layer_bytes, kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.recording import RecordedSelection, replayed_flows
from sim.trace import Resource, Tier
from tests.runtime.plans import draw_choice, draw_plan
from tests.runtime.test_dense import checkpoint, random_prompts
from tests.runtime.test_sparse import SPARSE
from tests.runtime.where import DRAWN, Where


@pytest.mark.parametrize("selector", SPARSE)
@DRAWN
@given(seed=st.integers(0, 2**32))
def test_bytes_and_recomputes_equal_the_replay(selector: object, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint("llama_grouped", where)
    plan = draw_plan(rng, decoder.spec, draw_choice(rng, selector))  # type: ignore[arg-type]
    run = execute(plan, decoder, random_prompts(rng, plan), options=Options(record=Record(picks=True)))
    assert run.picks is not None
    picks = tuple(tuple(tuple(layer) for layer in step) for step in run.picks)
    flows = replayed_flows(plan, RecordedSelection(selector=plan.setting.attention.selector, picks=picks))
    held = occupancy_of(plan, home_columns(plan.homes), flows)
    model, dtype, batch = plan.setting.model, plan.setting.dtype, plan.setting.workload.batch
    kv, inputs = kv_layer_bytes(model, dtype, plan.setting.kv_format.host), inputs_layer_bytes(model, dtype)
    fetched = kv * flows.fetched_kv + inputs * flows.fetched_inputs
    weights = plan.setting.weights_on_host * layer_weight_bytes(model, dtype, plan.setting.weight_format)
    waves = len(run.trace.waves)
    written = kv * flows.written_kv + inputs * flows.written_inputs
    for resource, expected in ((Resource.H2D, fetched), (Resource.D2H, written)):
        moved, weight_bytes = [0.0] * plan.homes.steps, waves * weights if resource is Resource.H2D else 0.0
        for span in (span for wave in run.trace.waves for span in wave.spans if span.resource is resource):
            moved[span.step] += span.size_bytes
        assert moved == pytest.approx((model.layers * (batch * expected + weight_bytes)).tolist(), abs=1e-6), resource
    for tier, column in ((Tier.HBM, held.hbm), (Tier.HOST, held.host)):
        sums = [0.0] * plan.homes.steps
        for level in (level for wave in run.trace.waves for level in wave.levels if level.tier is tier):
            sums[level.step] += level.size_bytes
        assert sums == pytest.approx((batch * column).tolist(), abs=1e-6), tier

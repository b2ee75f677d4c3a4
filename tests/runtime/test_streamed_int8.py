"""Decoding over INT8 that streams in, beside tokens computed again, is eager decoding: also while groups are completed whose
tokens are in HBM, on the host or neither.

Without a GPU the kernels are interpreted, and copies are made where they are asked for.
"""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.execute import Options, Run, execute
from runtime.graph.execute import Captures
from runtime.graph.forwarded import ForwardedSlots
from runtime.graph.run import GraphWave
from runtime.graph.support import require_graphable
from sim import catalogue
from sim.capture import is_captured
from sim.counts import Column
from sim.flows import flows_of, home_columns, link_token_bytes
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats, inputs_layer_bytes, key_range_bytes
from sim.occupancy import occupancy_of
from sim.plan import Plan, Recompute, WriteBack
from sim.spec import DType, ModelSpec
from sim.trace import Resource
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, draw_prompts, kernels, padded
from tests.runtime.plans import Choice, all_in_hbm, draw_plan
from tests.runtime.recorded import assert_replayed_alike

INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
TOKENS, INPUTS = Recompute.TOKENS, Recompute.ACTIVATIONS_HOST
CHOICE = Choice(batch=2, concurrency=2, prompt=61, output=5, kv_format=INT8, dtype=DType.FP32)
CAPTURED, EAGER = Options(captured=True, stop=False), Options(captured=False, stop=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """So many of the oldest tokens at each step that are computed ``again``, then so many ``on_host``; the last numbers stand
    for later steps.
    """

    recompute: Recompute
    again: tuple[int, ...]
    on_host: tuple[int, ...] = (0,)

    def plan(self, spec: ModelSpec, choice: Choice = CHOICE) -> Plan:
        whole = all_in_hbm(spec, replace(choice, recompute=self.recompute))
        cached, none = whole.setting.token_counts.cached, (0,) * whole.homes.steps
        again, on_host = (
            tuple(row[min(at, len(row) - 1)] for at in range(len(cached))) for row in (self.again, self.on_host)
        )
        hbm = tuple(n - gone - kept for n, gone, kept in zip(cached, again, on_host, strict=True))
        inputs, dropped = (none, again) if self.recompute is TOKENS else (again, none)
        homes = TokenHomes(hbm=hbm, host_kv=on_host, activations=inputs, dropped=dropped, copies=none)
        return replace(whole, homes=homes)


# The third decode step's newborn token completes a group: of a prompt of 61 the first one, of 125 the second.
PREFIX = Places(recompute=TOKENS, again=(0, 3, 20, 58))
PREFIX_AND_HOST = Places(recompute=TOKENS, again=(0, 9, 9, 12, 50), on_host=(40, 40, 51, 49, 14))
PROJECTED = Places(recompute=INPUTS, again=(0, 3, 30, 30, 64))
PROJECTED_AND_HOST = Places(recompute=INPUTS, again=(2, 2, 2, 30, 62), on_host=(0, 0, 60, 33, 2))
TWO_GROUPS = Places(recompute=INPUTS, again=(0, 5, 66, 66, 90), on_host=(70, 90, 60, 61, 38))


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize(
    ("family", "places", "prompt"),
    [
        ("opt", PREFIX, 61),
        ("grouped qwen3", PREFIX_AND_HOST, 61),
        ("grouped llama", PROJECTED, 61),
        ("opt", PROJECTED_AND_HOST, 61),
        ("grouped qwen3", TWO_GROUPS, 125),
    ],
)
def test_a_group_is_frozen_wherever_its_tokens_are(family: str, places: Places, prompt: int, dtype: DType) -> None:
    """In HBM, on the host, or without levels from then on; a short prompt filled up."""
    made = decoder(family, dtype, seed=1)

    compare(places.plan(made.spec, replace(CHOICE, prompt=prompt, dtype=dtype)), made, [prompt, 40], dtype)


@kernels
@pytest.mark.parametrize("seed", range(12 if ON_GPU else 1))
@pytest.mark.parametrize("recompute", [TOKENS, INPUTS])
def test_any_homes_that_move_outward_do(recompute: Recompute, seed: int) -> None:
    made, rng = decoder("opt", DType.FP32, seed=seed), random.Random(f"{seed} {recompute}")
    choice = replace(CHOICE, recompute=recompute, prompt=rng.randint(56, 62), output=30 if ON_GPU else 6)
    plan = draw_plan(rng, made.spec, choice)

    compare(plan, made, [choice.prompt, rng.randint(1, choice.prompt)], DType.FP32)


@kernels
@pytest.mark.parametrize(
    ("family", "places"), [("grouped llama", PREFIX), ("grouped llama", PREFIX_AND_HOST), ("opt", PROJECTED_AND_HOST)]
)
def test_what_moves_and_what_is_held_is_what_the_simulator_says(family: str, places: Places) -> None:
    """In HBM room for ranges of keys that are fetched is counted twice, and that for a prefix's inputs is taken elsewhere."""
    made = decoder(family, DType.FP32, seed=1)
    plan, kept, prompts = places.plan(made.spec), Captures(), draw_prompts([61, 40], seed=2)
    columns = home_columns(plan.homes)
    flows = flows_of(plan, columns)

    eager = execute(plan, made, prompts, options=EAGER)
    run = execute(plan, made, prompts, options=CAPTURED, captured=kept)

    assert run.completions == eager.completions
    assert by_row(run, Resource.H2D) == crossing(plan, flows.fetched_kv, flows.fetched_inputs)
    assert by_row(run, Resource.D2H)[1:] == crossing(plan, flows.written_kv, flows.written_inputs)[1:]
    model, occupied = made.spec, occupancy_of(plan, columns, flows).hbm
    ranges, inputs = key_range_bytes(model), inputs_layer_bytes(model, DType.FP32)
    elsewhere = 2 * ranges * flows.fetched_kv + 2 * inputs * flows.forwarded
    unfilled = model.layers * ranges * (plan.setting.workload.cached_tokens % 64)  # of the group that is begun last
    exactly = 2 * ((occupied - elsewhere)[1:].max() - unfilled)
    alone = isinstance(kept.wave(plan, made, 2).slots, ForwardedSlots)  # which makes the number of tokens up
    assert alone == (places is PREFIX)
    assert exactly <= run.kv_allocated_bytes <= (2 * occupied[1:].max() if alone else exactly)


def by_row(run: Run, resource: Resource) -> list[float]:
    (wave,) = run.trace.waves
    sums = [0.0] * len(wave.step_end_s)
    for span in wave.spans:
        sums[span.step] += span.size_bytes * (span.resource is resource)
    return sums


def crossing(plan: Plan, kv: Column, inputs: Column) -> list[float]:
    model, dtype = plan.setting.model, plan.setting.dtype
    return list(2 * model.layers * (link_token_bytes(plan.setting) * kv + inputs_layer_bytes(model, dtype) * inputs))


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what a capture reads is arbitrary
@pytest.mark.parametrize(
    ("family", "places"), [("opt", PREFIX), ("grouped qwen3", PROJECTED_AND_HOST), ("opt", PREFIX_AND_HOST)]
)
def test_what_is_captured_at_one_row_is_right_at_every_other(
    family: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = decoder(family, DType.FP32, seed=5)
    plan = places.plan(made.spec)
    prompts = padded(plan, made, draw_prompts([61, 61], seed=3))

    assert_replayed_alike(GraphWave(plan, made, [0, 0]), prompts, monkeypatch)


@pytest.mark.parametrize("places", [PREFIX, PROJECTED])
def test_levels_of_keys_are_not_known_at_birth(places: Places) -> None:
    plan = places.plan(catalogue.model("OPT-125M"), replace(CHOICE, dtype=DType.FP16))
    at_birth = replace(plan, setting=replace(plan.setting, write_back=WriteBack.AT_BIRTH))
    made: Any = SimpleNamespace(spec=plan.setting.model, device=torch.device("cuda"), dtype=torch.float16)

    require_graphable(plan, made)

    with pytest.raises(ValueError, match="write_back=at_birth, a captured step that recomputes in int8 writes"):
        require_graphable(at_birth, made)
    assert [is_captured(one.setting) for one in (plan, at_birth)] == [True, False]

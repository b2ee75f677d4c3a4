"""Decoding over INT8 that streams in, beside tokens computed again, is eager decoding: also while groups are completed whose
tokens are in HBM, on the host or neither.

Without a GPU the kernels are interpreted, and copies are made where they are asked for.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from runtime.graph.forwarded import ForwardedSlots
from runtime.graph.quantised_streamed import RoundedRows
from runtime.graph.run import GraphWave
from runtime.graph.streamed import StreamedSlots
from sim.flows import flows_of, home_columns, occupancy_of
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.plan import Plan, Recompute
from sim.spec import DType, ModelSpec
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, kernels
from tests.runtime.plans import Choice, all_in_hbm, draw_plan

INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
PROMPT, CLOSING = 124, 128  # tokens; the newborn one of the fourth decode step completes a group
CHOICE = Choice(batch=3, concurrency=3, prompt=PROMPT, output=8, kv_format=INT8, dtype=DType.FP32)
TOKENS, INPUTS = Recompute.TOKENS, Recompute.ACTIVATIONS_HOST


def placed(
    spec: ModelSpec, recompute: Recompute, again: Sequence[int], on_host: Sequence[int], choice: Choice = CHOICE
) -> Plan:
    """So many tokens at each step that are computed ``again``, then so many ``on_host``, the last number at those left."""
    whole = all_in_hbm(spec, replace(choice, recompute=recompute))
    cached, none = whole.setting.token_counts.cached, (0,) * whole.homes.steps
    first, next_ = (tuple(row[min(at, len(row) - 1)] for at in range(len(cached))) for row in (again, on_host))
    hbm = tuple(n - gone - kept for n, gone, kept in zip(cached, first, next_, strict=True))
    forwards = recompute is TOKENS
    homes = TokenHomes(
        hbm=hbm,
        host_kv=next_,
        activations=none if forwards else first,
        dropped=first if forwards else none,
        copies=none,
    )
    return replace(whole, homes=homes)


PLACES = {
    "tokens": (TOKENS, [0, 3, 20, 70], [0]),
    "tokens and host": (TOKENS, [0, 9, 9, 12, 70], [100, 91, 110, 112, 55]),
    "inputs": (INPUTS, [0, 3, 64, 90, 126], [0]),
    "inputs and host": (INPUTS, [2, 2, 2, 90, 100, 127], [0, 0, 122, 36, 26, 0]),
}


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_group_is_frozen_wherever_its_tokens_are(family: str, places: tuple[Recompute, list[int], list[int]]) -> None:
    """Some of it in HBM, some away, some without levels from then on; short prompts filled up."""
    for dtype in DTYPES_TRIED:
        made = decoder(family, dtype, seed=1)
        plan = placed(made.spec, *places, replace(CHOICE, dtype=dtype))
        kind = StreamedSlots if any(plan.homes.host_kv) or plan.setting.recompute is INPUTS else ForwardedSlots
        wave = GraphWave(plan, made, [0] * 3)
        assert type(wave.slots) is kind
        assert isinstance(wave.slots.rows, RoundedRows)

        compare(plan, made, [PROMPT, 100, 30], dtype)

"""Sparse window attention over INT8 by graph: what the eager runtime decodes, holds and moves."""

from dataclasses import replace

import pytest

from sim.attention import Selector
from sim.kv import KvFormat, KvFormats
from sim.plan import Plan
from sim.spec import DType
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, kernels, resident
from tests.runtime.plans import Choice, all_in_hbm

INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
FAMILIES = ["opt", "wide opt", "llama"] if ON_GPU else ["opt", "llama"]


def window(spec: object, prompt: int, output: int, dtype: DType, slots: int, sparsity: float = 0.8) -> Plan:
    choice = Choice(selector=Selector.SWA, sparsity=sparsity, batch=3, concurrency=3, prompt=prompt, output=output)
    return resident(all_in_hbm(spec, replace(choice, dtype=dtype, kv_format=INT8)), slots)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots, prompt", [(200, 60), (22, 60), (30, 70), (40, 130)])
def test_window_decoding_over_int8_by_graph_is_eager_decoding(
    family: str, dtype: DType, slots: int, prompt: int
) -> None:
    """Past the end of a group, some of whose tokens are dead by then, some on the host."""
    made = decoder(family, dtype, seed=2)
    compare(window(made.spec, prompt, 90 if ON_GPU else 10, dtype, slots), made, [prompt, prompt - 3, 12], dtype)

"""A captured decode step gives what the eager runtime gives: tokens, logits and selections.

Without a GPU the kernels are interpreted, which is slow: there each test takes few steps, and one width.
"""

from dataclasses import replace

import pytest

from sim.attention import Selector
from sim.plan import Mechanism
from sim.spec import DType
from tests.runtime.graphs import DTYPES_TRIED, ON_GPU, compare, decoder, kernels, newest_in_hbm, resident
from tests.runtime.plans import Choice, all_in_hbm

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

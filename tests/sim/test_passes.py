"""Passes between products: a row's entries counted by hand."""

from typing import Any

import pytest

from builders import make_cost, make_model
from sim.attention import PAGE_TOKENS
from sim.passes import OPERATIONS, Passes, of_inputs, of_layer
from sim.spec import DType

OPT = {"norm_bias": True, "positions": 4096}
GROUPED = {"heads": 4, "kv_heads": 2, "head_dim": 4}  # queries 16 wide, keys and values 8


@pytest.mark.parametrize(
    ("changes", "plain", "busy"),
    [
        # Sums read two rows of 16 and write one; 2 * 16 of keys and values, 8 activated: read, written.
        # Root mean squares 12 times over 2 * 16, rotations 14 times over 16 + 16.
        ({}, 2 * 3 * 16 + 2 * 32 + 2 * 8, 12 * 32 + 14 * 32),
        ({"gated_mlp": True}, 2 * 3 * 16 + 2 * 32, 12 * 32 + 14 * 32 + 6.5 * 8),
        (GROUPED, 2 * 3 * 16 + 2 * 16 + 2 * 8, 12 * 32 + 14 * (16 + 8)),
        # Norms read and write once; positions are in the embedding.
        (OPT, 2 * 3 * 16 + 2 * 32 + 2 * 8, 2 * 32),
    ],
)
def test_a_layer_passes_over_its_rows_between_products(changes: dict[str, Any], plain: float, busy: float) -> None:
    assert of_layer(make_model(**changes)) == Passes(plain=plain, busy=busy)


@pytest.mark.parametrize(
    ("changes", "plain", "busy"),
    [
        # The last sum, 3 * 16; keys and values; ReLU. Either norm is one kernel, 2 * 16, the second with the sum before it, 4 * 16;
        # a rotation reads and writes, and sines and cosines take a fifth more.
        ({}, 3 * 16 + 2 * 32 + 2 * 8 + 6 * 16 + 2.4 * 32, 0),
        ({"gated_mlp": True}, 3 * 16 + 2 * 32 + 6 * 16 + 2.4 * 32 + 3 * 8, 0),
        (GROUPED, 3 * 16 + 2 * 16 + 2 * 8 + 6 * 16 + 2.4 * (16 + 8), 0),
        (OPT, 3 * 16 + 2 * 32 + 2 * 8 + 4 * 16, 2 * 16),  # torch's LayerNorm, before attention
    ],
)
def test_a_fused_layer_reads_and_writes_once_in_each_kernel(changes: dict[str, Any], plain: float, busy: float) -> None:
    assert of_layer(make_model(**changes), fused=True) == pytest.approx(Passes(plain=plain, busy=busy), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "apart", "fused"),
    [
        ({}, 12 * 16 + 14 * 16, 2.4 * 16),
        (GROUPED, 12 * 16 + 14 * 8, 2.4 * 8),  # only keys are rotated
        ({"positions": 4096}, 12 * 16, 0),
        (OPT, 2 * 16, 0),
    ],
)
def test_inputs_are_normed_and_their_keys_rotated(changes: dict[str, Any], apart: float, fused: float) -> None:
    """By operations of torch; or they were saved normed, and a kernel that reads and writes once turns their keys."""
    model = make_model(**changes)

    assert of_inputs(model, fused=False) == Passes(busy=apart)
    assert of_inputs(model, fused=True) == Passes(plain=fused)


def test_each_kind_of_pass_has_a_rate_of_its_own() -> None:
    """512 B/s of HBM: a half of it for sums, a quarter for norms."""
    cost = make_cost(elementwise_efficiency=0.5, norm_efficiency=0.25)
    passes = Passes(plain=3, busy=2)

    assert passes.seconds(cost, DType.FP16) == 3 * 2 / 256 + 2 * 2 / 128
    assert passes.seconds(cost, DType.FP16, 10) == 10 * (3 * 2 / 256 + 2 * 2 / 128)
    assert passes.seconds(cost, DType.FP32, 10) == 10 * (3 * 4 / 256 + 2 * 4 / 128)


def test_every_operation_reads_and_writes_each_entry_once_at_least() -> None:
    least = {"digest_once": 1 + 2 / PAGE_TOKENS}  # a page's least and greatest keys are written
    assert all(sum(passes) >= least.get(name, 2) for name, passes in OPERATIONS.items())

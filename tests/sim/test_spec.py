"""Specs: parameters and bytes counted by hand, rates by type, and refusals at construction."""

from dataclasses import replace
from typing import Any

import pytest

from sim.spec import (
    DType,
    GpuSpec,
    HostSpec,
    LinkSpec,
    MachineSpec,
    ModelSpec,
    WeightFormat,
    weight_bytes_per_parameter,
)

GPU = GpuSpec(
    name="card",
    hbm_bytes=1000,
    hbm_bytes_per_s=10.0,
    fp16_flop_per_s=400.0,
    fp32_flop_per_s=100.0,
    fp8_flop_per_s=800.0,
    int8_op_per_s=None,
    has_bf16=False,
    sm_count=4,
    link=LinkSpec(name="wire", bytes_per_s=1.0),
    launch_s=0.0,
    source="by hand",
)
HOST = HostSpec(name="box", dram_bytes=1000, dram_bytes_per_s=5.0, cores=2, flop_per_s=50.0, source="by hand")
# 2 layers, hidden 8, 4 heads of 2 (keys and values: 2 heads), feed-forward 16, 10 tokens.
PLAIN = ModelSpec(
    name="plain",
    family="llama",
    layers=2,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=10,
    positions=0,
    embedding_dim=8,
    context_tokens=32,
    gated_mlp=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    head_bias=False,
    norm_bias=False,
    norms_per_layer=2,
    final_norm=True,
    qk_norm=False,
    tied_embeddings=True,
    source="by hand",
)
# Attention 8*8 + 2*8*4 + 8*8 = 192, feed-forward 2*8*16 = 256, norms 2*8 = 16: 464 a layer; embedding 80; last norm 8.
PLAIN_PARAMETERS = 2 * 464 + 80 + 8


def test_parameters_of_a_plain_model() -> None:
    assert (PLAIN.kv_dim, PLAIN.query_dim) == (4, 8)
    assert (PLAIN.qkv_parameters, PLAIN.out_parameters, PLAIN.mlp_parameters) == (128, 64, 256)
    assert (PLAIN.layer_parameters, PLAIN.parameters) == (464, PLAIN_PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"gated_mlp": True}, 2 * 8 * 16),
        ({"qkv_bias": True}, 2 * (8 + 4 + 4)),
        ({"out_bias": True}, 2 * 8),
        ({"mlp_bias": True}, 2 * (16 + 8)),
        ({"mlp_bias": True, "gated_mlp": True}, 2 * (8 * 16 + 2 * 16 + 8)),
        ({"norm_bias": True}, (2 * 2 + 1) * 8),
        ({"norms_per_layer": 1}, -2 * 8),
        ({"final_norm": False}, -8),
        ({"qk_norm": True}, 2 * 2 * 2),
        ({"positions": 34}, 34 * 8),
        ({"tied_embeddings": False}, 10 * 8),
        ({"tied_embeddings": False, "head_bias": True}, 10 * 8 + 10),
        # Embedding 10*4 instead of 10*8, and a projection in and one out.
        ({"embedding_dim": 4}, -10 * 4 + 2 * 4 * 8),
        # Heads wider than the hidden size is shared out: queries, keys, values and output grow.
        ({"head_dim": 4}, 2 * (2 * 8 * 8 + 2 * 8 * 4)),
    ],
)
def test_what_each_part_of_a_shape_adds(changes: dict[str, Any], more: int) -> None:
    assert replace(PLAIN, **changes).parameters == PLAIN_PARAMETERS + more


def test_the_head_is_counted_apart_from_its_tie() -> None:
    assert PLAIN.head_parameters == 80
    assert replace(PLAIN, tied_embeddings=False, head_bias=True).head_parameters == 90


@pytest.mark.parametrize(
    ("dtype", "weight_format", "layer_bytes", "other_bytes"),
    [
        (DType.FP16, WeightFormat.NATIVE, 2.0, 2),
        (DType.BF16, WeightFormat.NATIVE, 2.0, 2),
        (DType.FP32, WeightFormat.NATIVE, 4.0, 4),
        (DType.FP16, WeightFormat.INT8, 1.0625, 2),
        (DType.FP32, WeightFormat.INT4, 0.5625, 4),
    ],
)
def test_weight_bytes(dtype: DType, weight_format: WeightFormat, layer_bytes: float, other_bytes: int) -> None:
    assert weight_bytes_per_parameter(dtype, weight_format) == layer_bytes
    assert PLAIN.weight_bytes(dtype, weight_format) == 2 * 464 * layer_bytes + 88 * other_bytes


def test_rates_by_type() -> None:
    assert (GPU.flop_per_s(DType.FP16), GPU.flop_per_s(DType.FP32)) == (400.0, 100.0)
    assert replace(GPU, has_bf16=True).flop_per_s(DType.BF16) == 400.0
    with pytest.raises(ValueError, match=r"^dtype=bf16, card has no bf16 arithmetic: use fp16 or fp32$"):
        GPU.flop_per_s(DType.BF16)


def test_a_host_keeps_some_memory_for_itself() -> None:
    assert (HOST.usable_bytes, replace(HOST, usable_share=0.5).usable_bytes) == (900, 500)


def test_a_machine_is_a_gpu_in_a_host() -> None:
    assert MachineSpec(name="card", gpu=GPU, host=HOST).overrides == ()


@pytest.mark.parametrize("name", ["hbm_bytes_per_s", "fp16_flop_per_s", "fp32_flop_per_s", "fp8_flop_per_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_gpu_refuses_a_rate_that_is_none(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^gpu.{name}={value}, must be a finite number above 0$"):
        replace(GPU, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["hbm_bytes", "sm_count"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_a_gpu_refuses_a_count_that_is_none(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^gpu.{name}={value}, must be a whole number of at least 1$"):
        replace(GPU, **{name: value})  # type: ignore[arg-type]


def test_a_link_and_a_launch_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^link.bytes_per_s=0, must be a finite number above 0$"):
        LinkSpec(name="wire", bytes_per_s=0)
    with pytest.raises(ValueError, match=r"^gpu.launch_s=-1, must be a finite number of at least 0$"):
        replace(GPU, launch_s=-1)


def test_a_host_refuses_what_cannot_be_but_may_have_no_memory() -> None:
    assert replace(HOST, dram_bytes=0).usable_bytes == 0
    for name, value in (
        ("dram_bytes", -1),
        ("dram_bytes_per_s", 0),
        ("flop_per_s", 0),
        ("cores", 0),
        ("usable_share", 1.1),
    ):
        with pytest.raises(ValueError, match=f"^host.{name}={value}, must "):
            replace(HOST, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["layers", "hidden", "intermediate", "heads", "head_dim", "vocab", "embedding_dim"])
def test_a_model_refuses_a_size_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"^model.{name}=0, must be a whole number of at least 1$"):
        replace(PLAIN, **{name: 0})  # type: ignore[arg-type]


def test_a_model_refuses_kv_heads_that_heads_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"^model.kv_heads=3, must divide heads=4$"):
        replace(PLAIN, kv_heads=3)

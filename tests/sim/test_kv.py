"""Bytes of a cached token, counted by hand."""

import pytest

from builders import make_machine, make_model, refuses
from sim.kv import (
    KvFormat,
    KvFormats,
    inputs_layer_bytes,
    kv_layer_bytes,
    open_group_bytes,
    require_kv_format,
)
from sim.spec import DType

MODEL = make_model(heads=4, kv_heads=2, head_dim=32, hidden=128)  # keys and values of 64 elements each


@pytest.mark.parametrize(
    ("dtype", "kv_format", "size_bytes"),
    [
        (DType.FP16, KvFormat.NATIVE, 2 * 64 * 2),
        (DType.BF16, KvFormat.NATIVE, 2 * 64 * 2),
        (DType.FP32, KvFormat.NATIVE, 2 * 64 * 4),
        (DType.FP16, KvFormat.FP8, 2 * 64),
        # 64 key channels share a 4-byte scale among 64 tokens: 4 bytes a token. 2 heads have one each for the value.
        (DType.FP16, KvFormat.INT8, 2 * 64 + 4 + 2 * 4),
        (DType.FP32, KvFormat.INT8, 2 * 64 + 4 + 2 * 4),
        (DType.FP16, KvFormat.INT4, 64 + 4 + 2 * 4),
    ],
)
def test_a_tokens_key_and_value_in_one_layer(dtype: DType, kv_format: KvFormat, size_bytes: int) -> None:
    assert kv_layer_bytes(MODEL, dtype, kv_format) == size_bytes


def test_odd_sizes_are_rounded_up_to_whole_bytes() -> None:
    """3 channels: 3 bytes of int4 pairs, 12/64 of a byte of key scales, one value scale."""
    assert kv_layer_bytes(make_model(head_dim=3), DType.FP16, KvFormat.INT4) == 3 + 1 + 4


@pytest.mark.parametrize(
    ("kv_format", "size_bytes"),
    [(KvFormat.NATIVE, 0), (KvFormat.FP8, 0), (KvFormat.INT8, 64 * 64 * 2), (KvFormat.INT4, 64 * 64 * 2)],
)
def test_the_newest_64_keys_wait_unquantised(kv_format: KvFormat, size_bytes: int) -> None:
    assert open_group_bytes(MODEL, DType.FP16, kv_format) == size_bytes


def test_layer_inputs_are_smaller_only_without_much_grouping() -> None:
    """128 elements of hidden state against 2 x 64 of key and value; two heads fewer would make KV the smaller one."""
    assert inputs_layer_bytes(MODEL, DType.FP16) == 128 * 2 == kv_layer_bytes(MODEL, DType.FP16, KvFormat.NATIVE)
    assert inputs_layer_bytes(MODEL, DType.FP32) == 128 * 4


def test_native_on_both_tiers_is_native() -> None:
    assert KvFormats().are_native
    assert not KvFormats(gpu=KvFormat.INT8).are_native
    assert not KvFormats(host=KvFormat.FP8).are_native


def test_fp8_needs_a_card_that_has_it() -> None:
    old = make_machine(fp8_flop_per_s=None).gpu

    with refuses("kv_format=fp8, card has no fp8 arithmetic: use native, int8 or int4"):
        require_kv_format(old, KvFormat.FP8)
    require_kv_format(old, KvFormat.INT4)
    require_kv_format(make_machine().gpu, KvFormat.FP8)

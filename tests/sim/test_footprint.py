"""What HBM holds besides the KV cache, added up by hand."""

from functools import partial

import pytest

from builders import make_machine, make_model
from sim import catalogue
from sim.footprint import (
    kv_budget_bytes,
    layer_weight_bytes,
    prefill_rows,
    resident_weight_bytes,
    weighed_at_once,
    workspace_bytes,
)
from sim.spec import DType, WeightFormat

FP16, NATIVE = DType.FP16, WeightFormat.NATIVE
LAYER = 3 * 256 + 256 + 2 * 16 * 8  # qkv, out, feed-forward: 1280 parameters of the tiny model
EMBEDDING = 16 * 16
MODEL = make_model(layers=5)


def test_a_pass_takes_whole_sequences_as_many_as_fit_8192_tokens() -> None:
    assert prefill_rows(sequences=4, prompt_tokens=128) == 512
    assert prefill_rows(sequences=100, prompt_tokens=128) == 64 * 128
    assert prefill_rows(sequences=100, prompt_tokens=3000) == 2 * 3000
    assert prefill_rows(sequences=100, prompt_tokens=9000) == 9000


def test_workspace_of_one_prefill_pass() -> None:
    """Each of 4 x 8 rows: four hidden states (the layer's input and output, its norm, what it adds), query and attention's
    output, key and value, the rotated query and key, and 8 of feed-forward; logits in fp32.
    """
    rows, sequences = 32, 4

    expected = rows * (4 * 16 + 2 * 16 + 2 * 16 + 2 * 16 + 8) * 2 + sequences * 16 * 4

    assert workspace_bytes(MODEL, FP16, sequences, prompt_tokens=8) == expected


def test_a_gated_feed_forward_holds_two_columns_and_long_prompts_run_it_in_chunks() -> None:
    rows = 10_000

    expected = rows * 160 * 4 + 8192 * 2 * 8 * 4 + 1 * 16 * 4

    assert workspace_bytes(make_model(gated_mlp=True), DType.FP32, 1, prompt_tokens=rows) == expected


def test_many_short_prompts_need_room_for_a_row_each() -> None:
    """One token each, 9,000 at once: decode is wider than a prefill pass."""
    assert workspace_bytes(MODEL, FP16, 9000, prompt_tokens=1) == (9000 * 160 + 8192 * 8) * 2 + 9000 * 16 * 4


def test_learned_positions_leave_nothing_to_rotate_but_normed_queries_are_new_rows_too() -> None:
    learned, normed = make_model(positions=64), make_model(positions=64, qk_norm=True)

    assert workspace_bytes(learned, FP16, 4, 8) == 32 * (128 + 8) * 2 + 4 * 16 * 4
    assert workspace_bytes(normed, FP16, 4, 8) == 32 * (160 + 8) * 2 + 4 * 16 * 4


def test_prompts_that_wait_for_their_pass_hold_a_row_of_each_token_where_weights_stream() -> None:
    """8192 of 3 x 4096 tokens pass at once."""
    whole = workspace_bytes(MODEL, FP16, 3, 4096)

    assert workspace_bytes(MODEL, FP16, 3, 4096, 0.5) == whole + 4096 * 16 * 2
    assert workspace_bytes(MODEL, FP16, 2, 4096, 0.5) == workspace_bytes(MODEL, FP16, 2, 4096)


def test_weights() -> None:
    assert layer_weight_bytes(MODEL, FP16, NATIVE) == 2 * LAYER
    assert layer_weight_bytes(MODEL, FP16, WeightFormat.INT4) == LAYER * (0.5 + 4 / 64)
    assert resident_weight_bytes(MODEL, FP16, NATIVE, 0.0) == 2 * (5 * LAYER + EMBEDDING)


@pytest.mark.parametrize(
    ("share", "lacking"), [(0.25, 768 - 320), (0.6, 0), (0.75, 256 - 192), (0.85, 128 - 64), (1.0, 0)]
)
def test_streamed_weights_leave_two_layers_worth_of_buffers(share: float, lacking: int) -> None:
    """Each has room for all of the matrix that the share ends in."""
    kept = 5 * (1 - share) * 2 * LAYER
    buffers = 2 * (share * 2 * LAYER + 2 * lacking)

    assert resident_weight_bytes(MODEL, FP16, NATIVE, share) == kept + buffers + 2 * EMBEDDING


def test_a_single_layer_needs_one_buffer() -> None:
    assert resident_weight_bytes(make_model(layers=1), FP16, NATIVE, 1.0) == 2 * LAYER + 2 * EMBEDDING


def test_weights_in_fewer_bits_leave_room_to_widen_the_largest_matrix() -> None:
    """Queries, keys and values of the tiny model: 48 rows of 16; with much of a gated feed-forward that."""
    wide = make_model(gated_mlp=True, intermediate=40)
    room, wider = 16 * 48 * 2, 16 * 80 * 4
    for weight_format in (WeightFormat.INT8, WeightFormat.INT4):
        stored, all_of_it = MODEL.weight_bytes(FP16, weight_format), wide.weight_bytes(DType.FP32, weight_format)

        assert resident_weight_bytes(MODEL, FP16, weight_format, 0.0) == stored + room
        assert resident_weight_bytes(wide, DType.FP32, weight_format, 0.0) == all_of_it + wider


def test_the_kv_budget_is_what_is_left_or_what_is_missing() -> None:
    machine = make_machine(hbm_bytes=100_000)
    weights, workspace = 2 * (5 * LAYER + EMBEDDING), workspace_bytes(MODEL, FP16, 4, 8)

    def budget(reserve_bytes: int) -> int:
        return kv_budget_bytes(machine, MODEL, FP16, sequences=4, prompt_tokens=8, reserve_bytes=reserve_bytes)

    assert budget(1000) == 100_000 - 1000 - weights - workspace
    assert budget(100_000) == -weights - workspace


def test_a_first_choice_weighs_as_many_lanes_as_find_room_where_the_feed_forward_was() -> None:
    """OPT-1.3B in fp16: 8192 + 3 x 2048 entries of a row have gone, 28,672 bytes; a query pays a token 32 x 8 bytes. That is
    112 queries for each lane: of 16 lanes 9 with 180 each, of fewer tokens no fewer.
    """
    model = catalogue.model("OPT-1.3B")
    at_once = partial(weighed_at_once, model, FP16)

    assert at_once(16, 512, 180) == (16 * 112 // 180, 180) == (9, 180)
    assert at_once(32, 256, 112) == (32, 112)
    assert at_once(32, 256, 113) == (31, 113)


def test_of_a_long_prompt_some_queries_are_weighed_at_a_time_and_few_bytes_are_not_worth_it() -> None:
    model = catalogue.model("OPT-1.3B")

    assert weighed_at_once(model, FP16, 4, 2048, 700) == (1, 4 * 112)
    assert weighed_at_once(model, FP16, 1, 512, 180) == (1, 180)  # 24 MB for 15
    assert weighed_at_once(model, FP16, 1, 512, 400) == (1, 2**25 // (512 * 256))


@pytest.mark.parametrize("name", ["OPT-13B", "Llama 3 8B"])
def test_what_is_weighed_at_once_fits_the_workspace(name: str) -> None:
    """Beside the layer's input and output, queries, keys and values."""
    model, (lanes, tokens) = catalogue.model(name), (16, 512)
    rows = lanes * tokens
    rotated = 0 if model.positions else model.query_dim + model.kv_dim

    some, queries = weighed_at_once(model, FP16, lanes, tokens, 480)

    beside = rows * (2 * model.hidden + model.query_dim + 2 * model.kv_dim + rotated) * 2 + lanes * model.vocab * 4
    assert beside + some * queries * tokens * model.heads * 8 <= workspace_bytes(model, FP16, lanes, tokens)

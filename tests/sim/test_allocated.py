"""What an allocator gives out at most, added up by hand for the tiny model of ``builders``."""

from dataclasses import replace

import pytest

from builders import in_hbm, make_cost, make_homes, make_model, make_setting, newest_in_hbm
from sim.allocated import peak_allocated_bytes
from sim.attention import Selector
from sim.capture import is_captured
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Placement, Plan, Recompute
from sim.spec import DType, WeightFormat

WEIGHTS = 2 * (2 * 1280 + 256)  # of two layers and the embedding, fp16
LIBRARIES = 1000.0


def workspace(rows: int, chunk_rows: int, sequences: int) -> int:
    """160 entries of 2 bytes a row, 8 of the feed-forward's in chunks, 16 logits of 4 bytes a sequence; what libraries keep."""
    return 2 * (rows * 160 + chunk_rows * 8) + sequences * 16 * 4 + 1000


def captured(rows: int, chunk_rows: int, sequences: int) -> int:
    """The same without room for 32 entries of rotated queries and keys a row, and with another stream's libraries."""
    return workspace(rows, chunk_rows, sequences) - 2 * rows * 32 + 1000


def peak(plan: Plan) -> int:
    return peak_allocated_bytes(plan, make_cost(plan.setting.machine, library_bytes=LIBRARIES))


def test_a_captured_dense_plan_holds_its_pools_from_the_start() -> None:
    """Three sequences of 7 tokens at most, 64 bytes in each of two layers; 12 rows of one prefill pass."""
    plan = in_hbm(make_setting(batch=3))
    assert is_captured(plan.setting)

    assert peak(plan) == WEIGHTS + captured(12, 12, 3) + 3 * 7 * 2 * 64


def test_slots_are_what_later_steps_need_not_the_spilling_prefill() -> None:
    """Two slots and two layers of 5 fetched tokens at the last step. The prefill's two layers of four are its own rows."""
    plan = newest_in_hbm(make_setting(batch=3), slots=2)

    assert peak(plan) == WEIGHTS + captured(12, 12, 3) + 3 * (2 * 2 * 64 + 2 * 5 * 64)


def test_a_forwarded_prefix_is_staged_and_goes_through_layers_in_a_prefills_passes() -> None:
    """Three slots and, at the last step, a layer's keys and values of four tokens and twice its inputs, 32 bytes each; what
    else a pass over them holds is workspace.
    """
    homes = make_homes((4, 3, 3, 3), dropped=(0, 2, 3, 4))
    plan = Plan(setting=make_setting(batch=3, recompute=Recompute.TOKENS), homes=homes)
    assert is_captured(plan.setting)

    assert peak(plan) == WEIGHTS + captured(12, 12, 3) + 3 * (3 * 2 * 64 + 4 * (64 + 2 * 32))


def test_a_single_step_has_no_later_ones() -> None:
    plan = in_hbm(make_setting(output=1))

    assert peak(plan) == WEIGHTS + captured(4, 4, 1) + 4 * 2 * 64


def test_an_eager_prefill_of_several_passes_holds_rows_of_all() -> None:
    """100 prompts of 128 tokens, 64 of them a pass: besides one pass's activations, of all 12,800 rows the input and the
    output (16 each), the query (16), and keys and values (32), 2 bytes an entry.
    """
    setting = make_setting(Selector.H2O, batch=100, prompt=128, output=2, sparsity=0.5)
    assert not is_captured(setting)
    living = [
        cached - dead for cached, dead in zip(setting.token_counts.cached, setting.token_counts.dead, strict=True)
    ]

    state_bytes = 4 * living[1]  # of H2O: a running sum in float32 for each token that lives, in each layer
    pool_bytes = 100 * 2 * (64 * living[1] + state_bytes)
    static = WEIGHTS + workspace(8192, 8192, 100)
    assert peak(in_hbm(setting)) == static + pool_bytes + 12_800 * (2 * 16 + 16 + 32) * 2


def test_captured_passes_go_through_all_layers_one_by_one() -> None:
    plan = in_hbm(make_setting(batch=100, prompt=128, output=2))

    assert peak(plan) == WEIGHTS + captured(8192, 8192, 100) + 100 * 129 * 2 * 64


def test_captured_steps_read_rounded_tokens_where_they_lie() -> None:
    """36 bytes a token in int8 and no ring; the ranges of a group's keys, 4 bytes a channel, are there in any case, and room
    for 64 keys of an open group, 32 bytes each.
    """
    both = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    plan = newest_in_hbm(make_setting(kv_format=both, model=make_model()), slots=2)
    assert is_captured(plan.setting)

    assert peak(plan) == WEIGHTS + captured(4, 4, 1) + 2 * (2 * 36 + 16 * 4 + 64 * 32)


def test_a_captured_window_holds_what_its_choices_are_made_from() -> None:
    """Of 8 to 10 tokens half are attended to, half of those the newest; 7 live at most. So there are 8 entries, weights that 3
    queries paid each, and 6 scores of the one head.
    """
    setting = make_setting(Selector.SWA, sparsity=0.5, placement=Placement.RESIDENT, batch=3, prompt=8, output=3)
    counts = setting.token_counts
    assert [n - gone for n, gone in zip(counts.cached, counts.dead, strict=True)] == [6, 6, 7]
    assert (counts.local[-1], counts.selected[-1]) == (3, 3)

    kv, past_weights = 7 * 64, 3 * 8 * 2
    numbers = 8 * (4 + 4) + 6 + (6 + 2) + 2  # of entries and moves, of the list, of its scores, and how many
    layer_bytes = kv + past_weights + 4 * numbers
    assert peak(in_hbm(setting)) == WEIGHTS + captured(24, 24, 3) + 3 * 2 * layer_bytes


@pytest.mark.parametrize(
    ("weight_format", "dtype", "entry_bytes"),
    [
        (WeightFormat.INT8, DType.FP16, 4 + 2),  # float32, then fp16 levels
        (WeightFormat.INT4, DType.FP16, 1 + 4 + 2),
        (WeightFormat.INT8, DType.BF16, 4 + 4),  # the sum is taken in float32, and rounded when the levels are gone
        (WeightFormat.INT4, DType.FP32, 1 + 4 + 4),
    ],
)
def test_torch_widens_by_way_of_float32_a_kernel_at_once(
    weight_format: WeightFormat, dtype: DType, entry_bytes: int
) -> None:
    """The largest matrix has 48 rows of 16."""

    def more(selector: Selector) -> int:
        sparsity = 0.0 if selector is Selector.DENSE else 0.5
        setting = make_setting(selector, sparsity=sparsity, dtype=dtype, output=2)
        assert is_captured(setting) == (selector is Selector.DENSE)
        native, stored = in_hbm(setting), in_hbm(replace(setting, weight_format=weight_format))
        model = setting.model
        return peak(stored) - peak(native) + model.weight_bytes(dtype) - model.weight_bytes(dtype, weight_format)

    assert more(Selector.DENSE) == 16 * 48 * dtype.size_bytes
    assert more(Selector.H2O) == 16 * 48 * entry_bytes


def test_pages_take_the_whole_budget() -> None:
    setting = make_setting(batch=3, admission=Admission.CONTINUOUS, kv_budget_bytes=50_000)

    assert peak(in_hbm(setting)) == WEIGHTS + captured(12, 12, 3) + 50_000


def test_prompts_that_pages_do_not_do_for_are_no_rows_of_a_pass() -> None:
    """Two pages, of 16 tokens in two layers: the third sequence enters when another has ended."""
    setting = make_setting(batch=3, admission=Admission.CONTINUOUS, kv_budget_bytes=2 * 16 * 2 * 64)

    assert peak(in_hbm(setting)) == WEIGHTS + captured(8, 8, 3) + 4096

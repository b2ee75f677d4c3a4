"""Settings and plans: what follows from the choices, and what is refused with what was given and what is allowed."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from builders import in_hbm, make_homes, make_machine, make_model, make_setting, newest_in_hbm, refuses
from sim.access import measured_access
from sim.attention import Selector
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Placement, Plan, Recompute
from sim.spec import DType, WeightFormat
from sim.workload import Workload
from strategies import plans


def test_a_batch_runs_in_full_waves_and_a_rest() -> None:
    assert make_setting(batch=7, concurrency=7).wave_sizes == (7,)
    assert make_setting(batch=7, concurrency=3).wave_sizes == (3, 3, 1)
    assert make_setting(batch=6, concurrency=3).wave_sizes == (3, 3)
    assert make_setting(batch=7, concurrency=3, admission=Admission.CONTINUOUS).wave_sizes == (7,)


def test_the_first_output_token_comes_with_the_prefill() -> None:
    work = Workload(batch=1, prompt_tokens=128, output_tokens=512)

    assert (work.decode_steps, work.cached_tokens) == (511, 639)


@pytest.mark.parametrize(
    ("changes", "lossless"),
    [
        ({}, True),
        ({"recompute": Recompute.TOKENS}, True),
        ({"kv_format": KvFormats(host=KvFormat.INT8)}, False),
        ({"weight_format": WeightFormat.INT4}, False),
        ({"selector": Selector.TOPK}, False),
    ],
)
def test_lossless_is_dense_in_the_compute_type(changes: dict[str, Any], lossless: bool) -> None:
    assert make_setting(**changes).is_lossless is lossless


def test_slots_that_a_step_cannot_do_without() -> None:
    """8 and 9 tokens, 2 newest and 2 older ones kept."""
    sparse = make_setting(Selector.TOPK, prompt=8, output=2, sparsity=0.5)

    assert make_setting(prompt=8, output=2).slots_needed == (1, 1)
    assert sparse.slots_needed == (2, 2)
    assert replace(sparse, placement=Placement.RESIDENT).slots_needed == (4, 4)


def test_only_the_dead_or_a_dense_prefix_may_be_dropped() -> None:
    assert make_setting(prompt=8, output=2).most_dropped == (0, 0)
    assert make_setting(prompt=8, output=2, recompute=Recompute.TOKENS).most_dropped == (8, 8)
    assert make_setting(Selector.LOCAL, prompt=8, output=2, sparsity=0.5).most_dropped == (4, 4)
    assert make_setting(Selector.LOCAL, prompt=8, output=2, sparsity=0.5, drop_dead=False).most_dropped == (0, 0)


def test_inputs_are_saved_for_every_token_that_will_need_them() -> None:
    setting = make_setting(recompute=Recompute.ACTIVATIONS_HOST)
    homes = make_homes((4, 4, 4, 4), host_kv=(0, 1, 0, 0), activations=(0, 0, 2, 3))

    assert Plan(setting=setting, homes=homes).saved_inputs_tokens == 3
    assert in_hbm(setting).saved_inputs_tokens == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 4, "concurrency": 0}, "concurrency=0, must be a whole number of at least 1"),
        ({"batch": 4, "concurrency": 5}, "concurrency=5, must be at most the batch of 4"),
        ({"batch": 4, "concurrency": 1.5}, "concurrency=1.5, must be a whole number of at least 1"),
        ({"batch": 4, "concurrency": True}, "concurrency=True, must be a whole number of at least 1"),
        ({"weights_on_host": 1.2}, "weights_on_host=1.2, must lie in [0, 1]"),
        ({"weights_on_host": float("nan")}, "weights_on_host=nan, must lie in [0, 1]"),
        ({"kv_budget_bytes": -1}, "kv_budget_bytes=-1, must be a whole number of at least 0"),
        ({"prefetch_layers": 0}, "prefetch_layers=0, must be one of 1"),
        ({"prefetch_layers": 2}, "prefetch_layers=2, must be one of 1"),
        (
            {"prefetch_layers": 4, "model": make_model(layers=4)},
            "prefetch_layers=4, must be one of 1, 2, 3",
        ),
        (
            {"prompt": 4096, "output": 2},
            "prompt + output - 1 = 4097 tokens, must fit tiny's context of 4096",
        ),
        (
            {"dtype": DType.BF16, "machine": make_machine(has_bf16=False)},
            "dtype=bf16, card has no bf16 arithmetic: use fp16 or fp32",
        ),
        (
            {"kv_format": KvFormats(host=KvFormat.FP8), "machine": make_machine(fp8_flop_per_s=None)},
            "kv_format=fp8, card has no fp8 arithmetic: use native, int8 or int4",
        ),
        ({"access": measured_access(Selector.SWA)}, "access.selector=swa, must be the plan's dense"),
        (
            {"placement": Placement.RESIDENT},
            "placement=resident, needs a sparse selector: dense attention selects every token",
        ),
        (
            {"selector": Selector.SWA, "host_attention": True},
            "host_attention=True, needs dense attention and native KV on the host",
        ),
        (
            {"host_attention": True, "kv_format": KvFormats(host=KvFormat.INT8)},
            "host_attention=True, needs dense attention and native KV on the host",
        ),
        (
            {"selector": Selector.SWA, "recompute": Recompute.TOKENS},
            "recompute=tokens, is exact only under dense attention: use activations_host",
        ),
        (
            {"selector": Selector.TOPK, "prefetch_layers": 2, "model": make_model(layers=4)},
            "prefetch_layers=2, must be 1: topk can guess one layer ahead",
        ),
        (
            {"admission": Admission.CONTINUOUS, "weights_on_host": 0.5},
            "admission=continuous, needs weights, KV and attention on the GPU: use waves",
        ),
        (
            {"admission": Admission.CONTINUOUS, "host_attention": True},
            "admission=continuous, needs weights, KV and attention on the GPU: use waves",
        ),
        ({"guess_hits": 0.5}, "guess_hits=0.5, must be null: dense knows its picks a step ahead"),
        ({"selector": Selector.PAGES, "guess_hits": 1.5}, "guess_hits=1.5, must lie in [0, 1]"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with refuses(message):
        make_setting(**changes)


@pytest.mark.parametrize("name", ["batch", "prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan")])
def test_work_is_counted_in_whole_numbers(name: str, value: Any) -> None:
    with refuses(f"{name}={value}, must be a whole number of at least 1"):
        Workload(**({"batch": 1, "prompt_tokens": 1, "output_tokens": 1} | {name: value}))


SWA: dict[str, Any] = {"selector": Selector.SWA, "prompt": 10, "sparsity": 0.8}  # 7, 8, 9, 10 of 10 to 13 tokens die
TOPK: dict[str, Any] = {"selector": Selector.TOPK, "sparsity": 0.5}  # of 4 to 7 tokens, 1 or 2 newest and as many older


@pytest.mark.parametrize(
    ("setting", "homes", "message"),
    [
        ({}, make_homes((4, 5, 6)), "homes, 3 rows, must have one for each of 4 output tokens"),
        ({}, make_homes((4, 5, 6, 6)), "homes at step 3, 6 tokens, must hold all 7 cached ones"),
        ({}, make_homes((4, 5, 6, 8)), "homes at step 3, 8 tokens, must hold all 7 cached ones"),
        (
            {},
            make_homes((4, 4, 5, 6), host_kv=(0, 1, 1, 1), copies=(0, 0, 1, 0)),
            "homes.copies at step 2=1, must be at most 0",
        ),
        (
            TOPK | {"placement": Placement.RESIDENT},
            make_homes((4, 4, 5, 6), host_kv=(0, 1, 1, 1), copies=(0, 0, 2, 0)),
            "homes.copies at step 2=2, must be at most 1",
        ),
        (
            {},
            make_homes((4, 4, 5, 6), dropped=(0, 1, 1, 1)),
            "homes.dropped at step 1=1, must lie in [0, 0]",
        ),
        (
            {"recompute": Recompute.TOKENS},
            make_homes((4, 1, 1, 1), dropped=(0, 4, 5, 6)),
            "homes.dropped at step 2=5, must lie in [0, 4]",
        ),
        (SWA, make_homes((3, 4, 4, 4), dropped=(7, 7, 8, 9)), "homes.dropped at step 1=7, must lie in [8, 8]"),
        (
            {},
            make_homes((4, 4, 5, 6), activations=(0, 1, 1, 1)),
            "homes.activations at step 1=1, must be 0 with recompute=none",
        ),
        (
            {"recompute": Recompute.TOKENS},
            make_homes((4, 4, 5, 6), activations=(0, 1, 1, 1)),
            "homes.activations at step 1=1, must be 0 with recompute=tokens",
        ),
        (
            {"admission": Admission.CONTINUOUS},
            make_homes((4, 4, 5, 6), host_kv=(0, 1, 1, 1)),
            "admission=continuous, needs all living tokens in HBM: use waves",
        ),
        (
            {"admission": Admission.CONTINUOUS, "recompute": Recompute.TOKENS},
            make_homes((4, 4, 5, 6), dropped=(0, 1, 1, 1)),
            "admission=continuous, needs all living tokens in HBM: use waves",
        ),
        (
            {},
            make_homes((4, 0, 0, 0), host_kv=(0, 5, 6, 7)),
            "homes at step 1, 0 slots in HBM, recent placement needs 1",
        ),
        (
            TOPK | {"placement": Placement.RESIDENT},
            make_homes((1, 1, 1, 1), host_kv=(3, 4, 5, 6), copies=(1, 1, 1, 2)),
            "homes at step 2, 2 slots in HBM, resident placement needs 4",
        ),
    ],
)
def test_homes_that_do_not_go_with_their_setting(setting: dict[str, Any], homes: TokenHomes, message: str) -> None:
    with refuses(message):
        Plan(setting=make_setting(**setting), homes=homes)


@given(plans())
def test_drawn_plans_hold_every_cached_token_once(plan: Plan) -> None:
    """The strategy on which the other properties rest."""
    homes = plan.homes
    rows = zip(homes.hbm, homes.host_kv, homes.activations, homes.dropped, strict=True)

    assert [sum(row) for row in rows] == list(plan.setting.token_counts.cached)


def test_phases_know_the_dead_from_the_recomputed() -> None:
    swa = newest_in_hbm(make_setting(**SWA), slots=3)
    prefix = Plan(
        setting=make_setting(recompute=Recompute.TOKENS), homes=make_homes((4, 5, 4, 4), dropped=(0, 0, 2, 3))
    )

    assert [(phase.name, phase.first_step) for phase in swa.phases] == [("gpu", 0)]
    assert [(phase.name, phase.first_step) for phase in prefix.phases] == [("gpu", 0), ("recompute", 2)]

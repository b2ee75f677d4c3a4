"""Captured steps whose weights stream in give what eager ones give: texts, bytes moved, memory held.

Without a GPU the kernels are interpreted, nothing is captured, and copies are made where they are asked for.
"""

from dataclasses import replace

import pytest
import torch

from runtime.execute import execute
from runtime.graph.execute import Captures
from runtime.graph.run import GraphWave
from runtime.models import Decoder, as_planned
from runtime.models.streamed import StreamedLayers
from sim.attention import Selector
from sim.kv import KvFormat, KvFormats
from sim.plan import Mechanism, Placement, Plan, Recompute
from sim.spec import DType, WeightFormat
from sim.trace import Resource, Tier
from tests.runtime.graphs import (
    DTYPES_TRIED,
    ON_GPU,
    compare,
    decoder,
    draw_prompts,
    kernels,
    newest_in_hbm,
    padded,
    resident,
)
from tests.runtime.plans import Choice, all_in_hbm
from tests.runtime.recorded import assert_replayed_alike
from tests.runtime.test_captured import CAPTURED, EAGER, both, decoded, held, moved

STEPS = 18 if ON_GPU else 4
GROUPED = ["dense", "streamed", "inputs", "tokens", "tokens beside kv", "swa"] if ON_GPU else ["inputs", "tokens"]
PIECEWISE = ("streamed", "inputs", "tokens beside kv")


def dense_plan(made: Decoder, kind: str, choice: Choice) -> Plan:
    """All in HBM; read in place from the host, natively or in 8 bit; copied from it; projected again from inputs there, or
    the prompt's forwarded again from token ids, but for a token that the host may have, in 8 bit too.
    """
    levels = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    plan = all_in_hbm(made.spec, choice)
    if kind == "dense":
        return plan
    if kind == "int8":
        return newest_in_hbm(replace(plan, setting=replace(plan.setting, kv_format=levels)), 8)
    if kind == "in place":
        return newest_in_hbm(replace(plan, setting=replace(plan.setting, fetch_by=Mechanism.GATHER_KERNEL)), 8)
    plan = newest_in_hbm(plan, 8)
    if kind == "streamed":
        return plan
    away, none = plan.homes.host_kv, (0,) * plan.homes.steps
    if "inputs" in kind:
        recompute, homes = Recompute.ACTIVATIONS_HOST, replace(plan.homes, host_kv=none, activations=away)
    else:
        kept = tuple(min(1, tokens) for tokens in away) if kind == "tokens beside kv" else none
        lost = tuple(min(choice.prompt, gone - there) for gone, there in zip(away, kept, strict=True))
        cached = plan.setting.token_counts.cached
        hbm = tuple(tokens - gone - there for tokens, gone, there in zip(cached, lost, kept, strict=True))
        recompute, homes = Recompute.TOKENS, replace(plan.homes, hbm=hbm, host_kv=kept, dropped=lost)
    formats = levels if "int8" in kind else plan.setting.kv_format
    return Plan(setting=replace(plan.setting, recompute=recompute, kv_format=formats), homes=homes)


def plan_of(made: Decoder, kind: str, dtype: DType = DType.FP32, share: float = 0.5, **changes: object) -> Plan:
    choice = Choice(batch=3, concurrency=3, prompt=12, output=STEPS, dtype=dtype, weights_on_host=share)
    choice = replace(choice, **changes)  # type: ignore[arg-type]
    if kind not in ("swa", "pages"):
        return dense_plan(made, kind, choice)
    sparse = replace(choice, sparsity=0.6, prompt=40, placement=Placement.RESIDENT, selector=Selector(kind))
    return resident(all_in_hbm(made.spec, sparse), 24 if kind == "swa" else 34)


def lengths(plan: Plan) -> list[int]:
    return [plan.setting.workload.prompt_tokens, 5, 9][: plan.setting.concurrency]


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("opt", kind) for kind in ("dense", "in place", "streamed", "inputs", "tokens", "tokens beside kv", "swa")),
        *(("grouped qwen3", kind) for kind in GROUPED),
    ],
)
def test_decoding_with_streamed_weights_is_eager_decoding(family: str, kind: str, dtype: DType) -> None:
    made = decoder(family, dtype, seed=2)
    plan = plan_of(made, kind, dtype)
    compare(plan, as_planned(made, plan.setting), lengths(plan), dtype)


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped qwen3"] if ON_GPU else ["opt"])
def test_pages_with_streamed_weights_are_eager_ones(family: str) -> None:
    made = decoder(family, DType.FP32, seed=2)
    plan = plan_of(made, "pages")

    eager, run = both(plan, made, lengths(plan))

    assert run.completions == eager.completions


@kernels
@pytest.mark.parametrize("kind", ["int8", "int8 inputs", "int8 tokens"])
def test_eight_bit_waves_with_streamed_weights_are_eager_ones(kind: str) -> None:
    made = decoder("opt", DType.FP32, seed=1)
    plan = plan_of(made, kind)

    eager, run = both(plan, made, lengths(plan))

    assert run.completions == eager.completions


@kernels
@pytest.mark.parametrize(
    ("kind", "share", "ahead"),
    [
        ("dense", 0.01, 1),
        ("dense", 0.5, 3),
        ("streamed", 0.77, 3),
        ("inputs", 1.0, 1),
        ("tokens", 0.5, 3),
        ("tokens beside kv", 0.77, 1),
    ],
)
def test_any_share_and_any_ring_that_divides_the_layers(kind: str, share: float, ahead: int) -> None:
    made = decoder("deep opt", DType.FP32, seed=2)
    plan = plan_of(made, kind, share=share, prefetch_layers=ahead, output=STEPS)

    eager, run = both(plan, made, lengths(plan))

    assert run.completions == eager.completions
    assert decoded(moved(run)) == decoded(moved(eager))
    prefills = [moved(one)[0, Resource.H2D, 0] for one in (run, eager)]
    assert prefills[0] == prefills[1] > 0
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)


@kernels
@pytest.mark.parametrize(
    ("kind", "weight_format"), [("dense", WeightFormat.INT4), ("inputs", WeightFormat.INT8), ("swa", WeightFormat.INT8)]
)
def test_what_is_stored_in_fewer_bits_streams_so_and_is_widened_where_it_came(
    kind: str, weight_format: WeightFormat
) -> None:
    made = decoder("opt", DType.FP32, seed=2)
    plan = plan_of(made, kind, weight_format=weight_format)

    eager, run = both(plan, made, lengths(plan))

    assert run.completions == eager.completions


@kernels
@pytest.mark.parametrize("kind", ["dense", "streamed", "tokens"])
def test_waves_follow_each_other_and_eager_ones_come_between(kind: str) -> None:
    """What they leave in the ring is not what the next wave begins with."""
    made = decoder("deep opt", DType.FP32, seed=3)
    plan, kept = plan_of(made, kind, output=3, concurrency=2), Captures()
    stored, prompts = as_planned(made, plan.setting), draw_prompts([12, 3, 9], seed=4)
    first = execute(plan, stored, prompts, options=CAPTURED, captured=kept)

    eager = execute(plan, stored, prompts, options=EAGER)
    again = execute(plan, stored, prompts, options=CAPTURED, captured=kept)

    assert first.completions == again.completions == eager.completions


@kernels
def test_prompts_of_many_passes_take_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, begun = decoder("deep opt", DType.FP32, seed=2), list[int]()
    plan = plan_of(made, "dense", output=3)
    stored, prompts, begin = as_planned(made, plan.setting), draw_prompts([12, 7, 12], 1), StreamedLayers.begin
    whole = execute(plan, stored, prompts, options=EAGER)

    def spy(layers: StreamedLayers, place: int) -> None:
        begun.append(place)
        begin(layers, place)

    monkeypatch.setattr(StreamedLayers, "begin", spy)
    monkeypatch.setattr("runtime.graph.run.prefill_rows", lambda _, tokens: 2 * tokens)
    run = execute(plan, stored, prompts, options=CAPTURED)

    assert run.completions == whole.completions
    assert begun == list(range(4))


@kernels
@pytest.mark.skipif(ON_GPU, reason="a GPU captures")
@pytest.mark.parametrize("kind", PIECEWISE)
def test_pieces_captured_once_take_the_weights_that_come_between(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder("deep opt", DType.FP32, seed=2)
    plan = plan_of(made, kind, output=3)
    stored = as_planned(made, plan.setting)
    prompts = padded(plan, stored, draw_prompts(lengths(plan), 1))

    sets = assert_replayed_alike(GraphWave(plan, stored, prompts.padding.tolist()), prompts, monkeypatch)

    assert all(len(replays) == 2 * made.spec.layers + 1 for replays in sets)
    assert [sum(each) for each in zip(*sets, strict=True)] == (2 * made.spec.layers + 1) * [plan.homes.steps - 1]
    assert len(sets) == len(set(plan.homes.dropped[1:]))  # another for each number of forwarded tokens


@kernels
def test_a_ring_that_does_not_divide_the_layers_is_refused() -> None:
    made = decoder("deep opt", DType.FP32, seed=2)
    plan = plan_of(made, "dense", prefetch_layers=2)

    with pytest.raises(
        ValueError, match="layers=4, a captured step with weights_on_host needs a multiple of the 3 buffers"
    ):
        execute(plan, made, draw_prompts([12], 1), options=CAPTURED)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_a_layer_comes_as_one_block_and_is_whole(weight_format: WeightFormat, share: float) -> None:
    """In the buffer of its own, after its first bytes have been copied there, and those of the tensor that is cut."""
    made = decoder("deep opt", DType.FP32, seed=2)
    setting = plan_of(made, "dense", share=share, weight_format=weight_format).setting
    stored, kept = as_planned(made, setting), as_planned(made, replace(setting, weights_on_host=0.0))
    layers = stored.weights.layers
    assert isinstance(layers, StreamedLayers)
    layers.start(len(layers), overlap=False)

    for layer, (there, here) in enumerate(zip(layers.in_place(), kept.weights.layers, strict=True)):
        layers.begin(layer)
        for got, want in zip(tensors(there), tensors(here), strict=True):
            assert torch.equal(got, want)
            assert got.data_ptr() % 16 == 0


def tensors(noun: object) -> list[torch.Tensor]:
    from runtime.models.streamed import _tensors

    return list(_tensors(noun))


def test_a_plan_that_looks_further_ahead_finds_the_same_weights_in_a_larger_ring() -> None:
    made = decoder("deep opt", DType.FP32, seed=2)
    one, two = (plan_of(made, "dense", prefetch_layers=ahead).setting for ahead in (1, 3))
    stored = as_planned(made, one)

    again = as_planned(stored, two)

    layers, others = stored.weights.layers, again.weights.layers
    assert isinstance(layers, StreamedLayers)
    assert isinstance(others, StreamedLayers)
    assert (layers.buffers, others.buffers) == (2, 4)
    assert as_planned(again, two) is again
    froms = [[ring.move(layer).come_from for layer in range(4)] for ring in (layers, others)]
    assert froms[0] == froms[1]

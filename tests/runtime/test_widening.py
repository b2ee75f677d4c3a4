"""Weights in 8 and 4 bits under captured steps: widened by one kernel, bit for bit as eagerly; texts and bytes are the same."""

from dataclasses import replace

import pytest
import torch

from runtime.execute import execute
from runtime.graph.execute import Captures
from runtime.graph.step import fuses
from runtime.graph.widening import sharing_room, widen
from runtime.models import as_planned
from runtime.models.decoder import Affine, Decoder
from runtime.models.quantised import quantised
from sim.attention import Selector
from sim.footprint import largest_matrix_entries
from sim.plan import Admission, Placement, Plan, Preemption, Recompute
from sim.spec import DType, WeightFormat
from sim.trace import Tier
from tests.runtime.graphs import (
    DEVICE,
    DTYPES_TRIED,
    ON_GPU,
    compare,
    decoder,
    draw_prompts,
    kernels,
    newest_in_hbm,
    resident,
)
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_captured import CAPTURED, both, decoded, held, moved, rules_of
from tests.runtime.test_dense import checkpoint
from tests.runtime.where import Where

pytestmark = kernels
STORED = [WeightFormat.INT8, WeightFormat.INT4]
STEPS = 20 if ON_GPU else 5
ROUNDED = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # interpreted, bfloat16 is cut off


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (37, 192), (21, 100), (5, 3), (70, 128)])
def test_a_matrix_is_widened_as_torch_widens_it(
    weight_format: WeightFormat, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    """Groups alike, short ones, large and flat ones; nothing is written beside the matrix."""
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(DEVICE, dtype)
    weight[::7] *= 50
    weight[3] = 0.25
    affine = quantised(Affine(weight=weight), weight_format)
    room = torch.full((outputs * inputs + 64,), 7.0, dtype=dtype, device=DEVICE)

    widen(affine, room[: outputs * inputs].view(outputs, inputs))

    assert torch.equal(room[: outputs * inputs].view(outputs, inputs), affine.widened())
    assert bool((room[outputs * inputs :] == 7).all())
    below = affine.below(4)
    widen(below, room[: below.weight.shape[0] * inputs].view(-1, inputs))
    assert torch.equal(room[: below.weight.shape[0] * inputs].view(-1, inputs), affine.widened()[4:])


def test_all_matrices_share_the_room_of_the_largest() -> None:
    made = decoder("llama", DType.FP32, seed=1)
    plan = all_in_hbm(made.spec, Choice(weight_format=WeightFormat.INT8, dtype=DType.FP32))
    given = as_planned(made, plan.setting)

    shared = sharing_room(given, 2)

    first, last = shared.weights.layers[0].up.widened(), shared.weights.layers[1].qkv.widened()
    assert first.data_ptr() == last.data_ptr()
    assert first.untyped_storage().nbytes() == 4 * largest_matrix_entries(made.spec) == 4 * 64 * 2 * 96  # gate and up
    assert torch.equal(last, given.weights.layers[1].qkv.widened())
    assert shared.weights.head is given.weights.head
    assert sharing_room(made, 2) is made


def stored_plan(made: Decoder, weight_format: WeightFormat, plan: Plan) -> tuple[Decoder, Plan]:
    plan = replace(plan, setting=replace(plan.setting, weight_format=weight_format))
    return as_planned(made, plan.setting), plan


def kinds(made: Decoder) -> dict[str, Plan]:
    """One for each kind of slots that waves have."""
    choice = Choice(batch=3, concurrency=2, prompt=12, output=STEPS, dtype=DType.FP32)
    dense = all_in_hbm(made.spec, choice)
    inputs = newest_in_hbm(dense, 8)
    homes = replace(inputs.homes, host_kv=inputs.homes.activations, activations=inputs.homes.host_kv)
    again = Plan(setting=replace(dense.setting, recompute=Recompute.ACTIVATIONS_HOST), homes=homes)
    sparse = replace(choice, sparsity=0.6, prompt=40, placement=Placement.RESIDENT)
    swa = resident(all_in_hbm(made.spec, replace(sparse, selector=Selector.SWA)), 24)
    pages = resident(all_in_hbm(made.spec, replace(sparse, selector=Selector.PAGES)), 34)
    return {"dense": dense, "streamed": newest_in_hbm(dense, 8), "inputs": again, "swa": swa, "pages": pages}


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("kind", ["dense", "streamed", "inputs", "swa", "pages"])
def test_waves_give_the_texts_of_eager_ones(weight_format: WeightFormat, kind: str) -> None:
    made = decoder("grouped llama" if kind == "pages" else "opt", DType.FP32, seed=2)
    made, plan = stored_plan(made, weight_format, kinds(made)[kind])
    prompt = plan.setting.workload.prompt_tokens

    eager, run = both(plan, made, [prompt, 5, 9])

    assert run.completions == eager.completions
    if kind in ("dense", "streamed", "inputs"):
        assert decoded(moved(run)) == decoded(moved(eager))
        assert held(run, Tier.HBM) == held(eager, Tier.HBM)


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("name", ["opt_post_norm", "gpt_neox"])
def test_families_that_are_not_fused_widen_in_their_own_operations(
    weight_format: WeightFormat, name: str, where: Where
) -> None:
    _, made = checkpoint(name, replace(where, dtype=torch.float32))
    choice = Choice(batch=2, concurrency=2, prompt=9, output=STEPS, dtype=DType.FP32)
    made, plan = stored_plan(made, weight_format, all_in_hbm(made.spec, choice))
    assert not fuses(made)

    eager, run = both(plan, made, [9, 4])

    assert run.completions == eager.completions


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("preemption", Preemption)
def test_continuous_admission_gives_the_texts_of_an_eager_one(
    weight_format: WeightFormat, preemption: Preemption
) -> None:
    made = decoder("llama", DType.FP32, seed=4)
    choice = Choice(batch=4, concurrency=3, prompt=13, output=8, dtype=DType.FP32, admission=Admission.CONTINUOUS)
    made, plan = stored_plan(made, weight_format, all_in_hbm(made.spec, replace(choice, preemption=preemption)))
    plan = with_budget(plan, round(1.99 * max(rules_of(plan).held_bytes)))

    eager, run = both(plan, made, [13, 4, 13, 9])

    assert run.completions == eager.completions
    assert moved(run) == moved(eager)
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)


def test_a_job_keeps_its_captured_step() -> None:
    made = decoder("opt", DType.FP32, seed=3)
    choice = Choice(batch=2, concurrency=2, prompt=9, output=3, dtype=DType.FP32, weight_format=WeightFormat.INT8)
    plan, kept = all_in_hbm(made.spec, choice), Captures()
    given = as_planned(made, plan.setting)
    first = kept.wave(plan, given, 2)

    execute(plan, given, draw_prompts([9, 3], seed=1), options=CAPTURED, captured=kept)

    assert kept.wave(plan, given, 2) is first
    assert kept.wave(plan, as_planned(made, plan.setting), 2) is not first


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
def test_logits_are_those_of_the_eager_step(weight_format: WeightFormat, dtype: DType) -> None:
    """On a GPU of a model wide enough for the runtime's own products."""
    made = decoder("wide opt" if ON_GPU else "opt", dtype, seed=5)
    choice = Choice(batch=2, concurrency=2, prompt=12, output=STEPS, dtype=dtype)
    made, plan = stored_plan(made, weight_format, all_in_hbm(made.spec, choice))

    compare(plan, made, [12, 7], dtype)

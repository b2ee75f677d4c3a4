"""Compiles every kernel that captured steps launch for a Hopper GPU, without one: ``python -m tests.runtime.compiled``.

Launches become compilations for the arguments at hand; nothing runs, so what steps compute is arbitrary. One line a kernel.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from runtime.execute import DTYPES
from runtime.graph.paged_run import PagedWave, rules_of
from runtime.graph.run import GraphWave
from runtime.graph.widening import widen
from runtime.models import as_planned
from runtime.models.config import config_from_json
from runtime.models.decoder import Affine, Decoder
from runtime.models.quantised import quantised
from runtime.models.random_weights import random_decoder
from runtime.wave import Prompts
from sim.attention import Selector
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Mechanism, Plan, Preemption, Recompute, WriteBack
from sim.spec import DType, WeightFormat
from tests.runtime.graphs import newest_in_hbm, recent, resident
from tests.runtime.plans import Choice, all_in_hbm, with_budget
from tests.runtime.test_graph_recall import recalled

LANES, PROMPT, OUTPUT = 32, 40, 12  # so many lanes that kernels are chained
_SHAPE = {"vocab_size": 512, "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8}
_SHAPE |= {"max_position_embeddings": 128}
MODELS = {
    "opt": _SHAPE | {"ffn_dim": 2048, "word_embed_proj_dim": 1024},
    "qwen3": _SHAPE | {"intermediate_size": 2048, "num_key_value_heads": 2, "head_dim": 128},
}


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, _: int) -> int:
        return 0


def compiling(seen: set[str]) -> Callable[..., Any]:
    """Stands for ``kernel[grid]``."""

    def launched(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_it(*args: Any, **options: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **options)
            if made.hash not in seen:
                seen.add(made.hash)
                print(f"{kernel.fn.__module__}.{kernel.fn.__name__}: {made.metadata.shared} bytes of shared memory")

        return compile_it

    return launched


def plans(spec: Any, dtype: DType) -> list[Plan]:
    """One for each kind of slots."""

    def plan(selector: Selector, kv_format: KvFormat = KvFormat.NATIVE) -> Plan:
        sparsity, formats = (0.0 if selector is Selector.DENSE else 0.8), KvFormats(gpu=kv_format, host=kv_format)
        choice = Choice(
            selector=selector, sparsity=sparsity, batch=LANES, concurrency=LANES, prompt=PROMPT, output=OUTPUT
        )
        return all_in_hbm(spec, replace(choice, dtype=dtype, kv_format=formats))

    few = newest_in_hbm(plan(Selector.DENSE), 20)
    read = replace(few, setting=replace(few.setting, fetch_by=Mechanism.GATHER_KERNEL))
    homes = few.homes
    inputs = TokenHomes(
        hbm=homes.hbm, host_kv=homes.activations, activations=homes.host_kv, dropped=homes.dropped, copies=homes.copies
    )
    again = Plan(setting=replace(few.setting, recompute=Recompute.ACTIVATIONS_HOST), homes=inputs)
    found = [
        newest_in_hbm(plan(Selector.DENSE), 200),
        few,
        read,
        again,
        forwarding(few),
        *(rounded(one) for one in (again, forwarding(few), mixed(again))),
        resident(plan(Selector.SWA), 14),
        resident(plan(Selector.SWA, KvFormat.INT8), 14),
        recent(plan(Selector.SWA), [8]),
        recent(plan(Selector.SWA, KvFormat.INT8), [8]),
    ]
    found.append(recalled(plan(Selector.PAGES), 20, WriteBack.AT_EVICTION))
    found += [newest_in_hbm(plan(Selector.DENSE, KvFormat.INT8), slots) for slots in (20, 200)]
    formats = [KvFormat.NATIVE, KvFormat.INT8, *([] if dtype is DType.FP32 else [KvFormat.FP8])]
    whole = [plan(Selector.DENSE, kv_format) for kv_format in formats]
    return found + [swapping(one) for one in whole]


def forwarding(plan: Plan) -> Plan:
    """What ``plan`` has on the host is dropped."""
    homes = replace(plan.homes, host_kv=plan.homes.dropped, dropped=plan.homes.host_kv)
    return Plan(setting=replace(plan.setting, recompute=Recompute.TOKENS), homes=homes)


def rounded(plan: Plan) -> Plan:
    """In INT8."""
    return replace(plan, setting=replace(plan.setting, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)))


def mixed(plan: Plan) -> Plan:
    """Half of the inputs that ``plan`` keeps are keys and values instead."""
    kept = tuple(tokens // 2 for tokens in plan.homes.activations)
    moved = tuple(tokens - left for tokens, left in zip(plan.homes.activations, kept, strict=True))
    return replace(plan, homes=replace(plan.homes, activations=kept, host_kv=moved))


def swapping(plan: Plan) -> Plan:
    """Continuous admission, pages for four fifths of the lanes."""
    setting = replace(plan.setting, admission=Admission.CONTINUOUS, preemption=Preemption.SWAP)
    plan = replace(plan, setting=setting)
    return with_budget(plan, round(0.8 * LANES * max(rules_of(plan).held_bytes)))


def stored(plan: Plan, weight_format: WeightFormat) -> Plan:
    return replace(plan, setting=replace(plan.setting, weight_format=weight_format))


def widen_narrow() -> None:
    """Matrices whose last group is short."""
    for weight_format in (WeightFormat.INT8, WeightFormat.INT4):
        for dtype in DTYPES.values():
            affine = quantised(Affine(weight=torch.zeros((48, 80), dtype=dtype)), weight_format)
            widen(affine, torch.empty((48, 80), dtype=dtype), chained=True)


def run(plan: Plan, made: Decoder) -> None:
    made = as_planned(made, plan.setting)
    tokens, padding = torch.zeros((LANES, PROMPT), dtype=torch.int64), torch.zeros(LANES, dtype=torch.int64)
    prompts = Prompts(tokens=tokens, padding=padding)
    if plan.setting.admission is Admission.CONTINUOUS:
        PagedWave(plan, made).run(prompts)
    else:
        wave = GraphWave(plan, made, [0] * LANES)
        wave.prefill(prompts)
        wave.decode(1, 3)


def main() -> None:
    driver.set_active(NoGpu())
    seen: set[str] = set()
    with (
        mock.patch.object(JITFunction, "__getitem__", compiling(seen)),
        mock.patch("runtime.graph.launch.chains", return_value=True),
        mock.patch("runtime.graph.products.chains", return_value=True),
        mock.patch("runtime.graph.widening.chains", return_value=True),
        mock.patch("runtime.graph.support.interpreted", return_value=True),
    ):
        for family, keys in MODELS.items():
            config = config_from_json({"model_type": family} | keys, name=family, source="test")
            made = random_decoder(config, device=torch.device("cpu"), dtype=DTYPES[DType.FP16])
            for plan in plans(made.spec, DType.FP16):
                run(plan, made)
            for weight_format in (WeightFormat.INT8, WeightFormat.INT4):
                run(stored(plans(made.spec, DType.FP16)[0], weight_format), made)
        widen_narrow()


if __name__ == "__main__":
    main()

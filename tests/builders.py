"""Small machines, models and plans whose numbers can be followed by hand."""

import re
from collections.abc import Mapping, Sequence
from math import cos, pi, sin
from typing import Any

import pytest

from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.cost import CostModel
from sim.homes import TokenHomes
from sim.kv import KvFormats
from sim.plan import Plan, Setting
from sim.profile import MeasuredProduct, Profile
from sim.spec import DType, GpuSpec, HostSpec, LinkSpec, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload

AMPLE_BYTES = 2**62


def make_machine(
    *,
    hbm_bytes: int = AMPLE_BYTES,
    hbm_bytes_per_s: float = 512.0,
    flop_per_s: float = 1e300,
    link_bytes_per_s: float = 64.0,
    launch_s: float = 0.0,
    dram_bytes: int = AMPLE_BYTES,
    dram_bytes_per_s: float = 64.0,
    host_flop_per_s: float = 1e300,
    usable_share: float = 1.0,
    **gpu: Any,
) -> MachineSpec:
    """A machine of round numbers: HBM 512 B/s, link and DRAM 64 B/s, arithmetic that takes no time."""
    facts = {
        "fp16_flop_per_s": flop_per_s,
        "fp32_flop_per_s": flop_per_s / 2,
        "fp8_flop_per_s": 2 * flop_per_s,
        "int8_op_per_s": None,
        "has_bf16": True,
        "sm_count": 10,
    }
    card = GpuSpec(
        name="card",
        hbm_bytes=hbm_bytes,
        hbm_bytes_per_s=hbm_bytes_per_s,
        link=LinkSpec(name="wire", bytes_per_s=link_bytes_per_s),
        launch_s=launch_s,
        source="test",
        **(facts | gpu),
    )
    host = HostSpec(
        name="box",
        dram_bytes=dram_bytes,
        dram_bytes_per_s=dram_bytes_per_s,
        cores=2,
        flop_per_s=host_flop_per_s,
        usable_share=usable_share,
        source="test",
    )
    return MachineSpec(name="card", gpu=card, host=host)


def make_model(**changes: Any) -> ModelSpec:
    """Two layers, hidden 16, one head. In fp16 a layer's matrices take 1536 (qkv), 512 (out) and 512 (mlp) bytes, the head 512.

    One token's KV takes 64 bytes a layer.
    """
    shape: dict[str, Any] = {
        "name": "tiny",
        "family": "opt",
        "layers": 2,
        "hidden": 16,
        "intermediate": 8,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 16,
        "vocab": 16,
        "positions": 0,
        "embedding_dim": 16,
        "context_tokens": 4096,
        "gated_mlp": False,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "head_bias": False,
        "norm_bias": False,
        "norms_per_layer": 0,
        "final_norm": False,
        "qk_norm": False,
        "tied_embeddings": True,
        "source": "test",
    }
    return ModelSpec(**(shape | changes))


def make_profile(**changes: Any) -> Profile:
    """Every efficiency 1, every overhead 0, except as said in ``changes``."""
    ideal = {
        name: 1.0 if kind == "share" and not name.endswith("sm_share") else 0.0
        for name, kind in Profile.constants().items()
    }
    return Profile(name="ideal", basis="test", **(ideal | changes))


def hypotenuse(one: float, other: float) -> float:
    """By its tangents at a whole number of eighths of a half turn: to 2 %, as products are priced."""
    return max(one * cos(turn * pi / 8) + other * sin(turn * pi / 8) for turn in range(5))


def make_cost(machine: MachineSpec | None = None, **constants: Any) -> CostModel:
    """A cost model of ``machine`` on an ideal profile."""
    return CostModel(machine=machine or make_machine(), profile=make_profile(**constants))


def make_products(
    cost: CostModel, model: ModelSpec, ratios: Mapping[int, float], dtype: DType = DType.FP16
) -> tuple[MeasuredProduct, ...]:
    """Of all matrices of a layer, by rows: as many times as long as ``cost`` says without them. Gate and up are one."""
    up = (1 + model.gated_mlp) * model.intermediate
    shapes = (
        (model.hidden, model.query_dim + 2 * model.kv_dim),
        (model.query_dim, model.hidden),
        (model.hidden, up),
        (model.intermediate, model.hidden),
    )
    return tuple(
        MeasuredProduct(
            inputs=inputs,
            outputs=outputs,
            dtype=dtype,
            rows=tuple(ratios),
            seconds=tuple(
                times * cost.gemm(inputs, outputs, dtype, WeightFormat.NATIVE).at_one(rows)
                for rows, times in ratios.items()
            ),
        )
        for inputs, outputs in dict.fromkeys(shapes)
    )


def make_setting(
    selector: Selector = Selector.DENSE,
    *,
    batch: int = 1,
    prompt: int = 4,
    output: int = 4,
    sparsity: float = 0.0,
    local_fraction: float = 0.5,
    **changes: Any,
) -> Setting:
    """One sequence, four tokens given, four generated, on a machine with room for all; everything else by ``changes``."""
    choices: dict[str, Any] = {
        "machine": make_machine(),
        "model": make_model(),
        "workload": Workload(batch=batch, prompt_tokens=prompt, output_tokens=output),
        "dtype": DType.FP16,
        "concurrency": batch,
        "attention": Attention(selector=selector, sparsity=sparsity, local_fraction=local_fraction),
        "access": measured_access(selector),
        "kv_format": KvFormats(),
        "kv_budget_bytes": AMPLE_BYTES,
    }
    return Setting(**(choices | changes))


def make_homes(
    hbm: Sequence[int],
    *,
    host_kv: Sequence[int] = (),
    activations: Sequence[int] = (),
    dropped: Sequence[int] = (),
    copies: Sequence[int] = (),
) -> TokenHomes:
    """Token homes; columns that are left out are 0 at every step."""
    none = (0,) * len(hbm)
    return TokenHomes(
        hbm=tuple(hbm),
        host_kv=tuple(host_kv) or none,
        activations=tuple(activations) or none,
        dropped=tuple(dropped) or none,
        copies=tuple(copies) or none,
    )


def in_hbm(setting: Setting) -> Plan:
    """``setting`` with every living token in HBM."""
    counts = setting.token_counts
    hbm = [cached - gone for cached, gone in zip(counts.cached, counts.dead, strict=True)]
    return Plan(setting=setting, homes=make_homes(hbm, dropped=counts.dead))


def newest_in_hbm(setting: Setting, slots: int) -> Plan:
    """``setting`` with the newest ``slots`` living tokens at home in HBM and the others on the host."""
    counts = setting.token_counts
    living = [cached - gone for cached, gone in zip(counts.cached, counts.dead, strict=True)]
    hbm = [min(slots, tokens) for tokens in living]
    host_kv = [tokens - near for tokens, near in zip(living, hbm, strict=True)]
    return Plan(setting=setting, homes=make_homes(hbm, host_kv=host_kv, dropped=counts.dead))


def refuses(message: str) -> "pytest.RaisesExc[ValueError]":
    """Expect a ValueError that says exactly ``message``."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")

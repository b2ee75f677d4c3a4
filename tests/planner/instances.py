"""Small planning problems drawn by seed: tiny models on made-up machines, family by family, so that every regime occurs.

What a family is about is said where it is defined. Rates are drawn relative to HBM bandwidth, memories relative to what
weights and the whole KV cache take, so the names of real cards stand for ratios.
"""

import random
from dataclasses import dataclass, replace

from builders import make_machine, make_model
from planner.request import Objective, Request
from sim.attention import Selector
from sim.footprint import workspace_bytes
from sim.kv import KvFormat, kv_layer_bytes
from sim.profile import Profile
from sim.spec import DType, MachineSpec, ModelSpec
from sim.workload import Workload

HBM_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Ranges to draw from. Rates are decades of HBM bandwidth; memory is a share of the KV that a whole batch comes to."""

    link_decades: tuple[float, float] = (-2.3, -0.7)
    flop_decades: tuple[float, float] = (0.5, 3.0)
    dram_decades: tuple[float, float] = (-2.0, -0.5)
    hbm_share: tuple[float, float] = (0.2, 0.95)
    host_share: tuple[float, float] = (0.3, 3.0)
    hidden: tuple[int, ...] = (8, 16, 32)
    head_dim: tuple[int, ...] = (4, 8, 16)
    layers: tuple[int, ...] = (2, 3, 4)
    batch: tuple[int, int] = (1, 4)
    prompt: tuple[int, int] = (2, 12)
    output: tuple[int, int] = (4, 12)
    max_sparsity: tuple[float, ...] = (0.0,)
    selectors: tuple[Selector, ...] = (Selector.SWA,)
    kv_formats: tuple[tuple[KvFormat, ...], ...] = ((),)
    all_at_once: tuple[bool, ...] = (False,)
    objectives: tuple[Objective, ...] = (Objective.THROUGHPUT,)


def draw_request(ratios: Ratios, rng: random.Random) -> Request:
    """One problem of the family that ``ratios`` describe."""
    model = _model(ratios, rng)
    work = Workload(
        batch=rng.randint(*ratios.batch),
        prompt_tokens=rng.randint(*ratios.prompt),
        output_tokens=rng.randint(*ratios.output),
    )
    machine = _machine(ratios, rng, model, work)
    return Request(
        machine=machine,
        profile=_profile(machine, rng),
        model=model,
        workload=work,
        max_sparsity=rng.choice(ratios.max_sparsity),
        selectors=(rng.choice(ratios.selectors),),
        kv_formats=rng.choice(ratios.kv_formats),
        concurrency=work.batch if rng.choice(ratios.all_at_once) else None,
        objective=rng.choice(ratios.objectives),
    )


def _model(ratios: Ratios, rng: random.Random) -> ModelSpec:
    hidden, kv_heads = rng.choice(ratios.hidden), rng.choice((1, 2))
    return make_model(
        layers=rng.choice(ratios.layers),
        hidden=hidden,
        intermediate=rng.choice((1, 2, 4)) * hidden,
        heads=kv_heads * rng.choice((1, 1, 2)),
        kv_heads=kv_heads,
        head_dim=rng.choice(ratios.head_dim),
        vocab=8,
        embedding_dim=hidden,
    )


def _machine(ratios: Ratios, rng: random.Random, model: ModelSpec, work: Workload) -> MachineSpec:
    kv_bytes = work.batch * work.cached_tokens * model.layers * kv_layer_bytes(model, DType.FP16, KvFormat.NATIVE)
    static = model.weight_bytes(DType.FP16) + workspace_bytes(model, DType.FP16, work.batch, work.prompt_tokens)
    dram = HBM_BYTES_PER_S * 10 ** rng.uniform(*ratios.dram_decades)
    return make_machine(
        hbm_bytes=int(static + kv_bytes * rng.uniform(*ratios.hbm_share)),
        hbm_bytes_per_s=HBM_BYTES_PER_S,
        flop_per_s=HBM_BYTES_PER_S * 10 ** rng.uniform(*ratios.flop_decades),
        link_bytes_per_s=HBM_BYTES_PER_S * 10 ** rng.uniform(*ratios.link_decades),
        dram_bytes=int(kv_bytes * rng.uniform(*ratios.host_share)),
        dram_bytes_per_s=dram,
        host_flop_per_s=dram * rng.uniform(1, 30),
    )


def _profile(machine: MachineSpec, rng: random.Random) -> Profile:
    """Nominal shares; fixed times scaled down to a tiny model's steps, or none."""
    nominal, scale = Profile.nominal(machine), rng.choice((0.0, 0.003))
    fixed = {
        name: scale * getattr(nominal, name)
        for name in ("copy_setup_s", "copy_floor_s", "gather_setup_s", "step_overhead_s", "host_round_trip_s")
    }
    return replace(nominal, reserve_bytes=0.0, gemm_half_rows=rng.choice((0.0, 4.0, 128.0)), **fixed)

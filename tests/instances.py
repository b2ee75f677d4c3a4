"""Small planning problems drawn by seed: tiny models on made-up machines, family by family, so that every regime occurs.

Rates are drawn as decades of HBM bandwidth, memories as shares of what the whole batch's KV takes, fixed times scaled
down with the models. So a family stands for ratios, and real hardware for a family: its ``hardware`` says which.
"""

import random
from dataclasses import dataclass, field, replace

from builders import make_machine, make_model
from planner.request import Objective, Request
from sim.attention import Selector
from sim.footprint import workspace_bytes
from sim.kv import KvFormat, kv_layer_bytes
from sim.profile import Profile
from sim.spec import DType, MachineSpec, ModelSpec
from sim.workload import Workload

HBM_BYTES_PER_S = 1e9
FIXED = (
    *("copy_setup_s", "copy_floor_s", "copy_handover_s", "gather_setup_s"),
    *("step_overhead_s", "branch_s", "host_round_trip_s"),
)
Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """What to draw from. ``dram_decades`` is how fast the CPU reads KV, ``all_at_once`` whether waves are forbidden."""

    link_decades: Range = (-2.3, -0.7)
    flop_decades: Range = (0.5, 3.0)
    dram_decades: Range = (-2.0, -0.5)
    hbm_share: Range = (0.2, 0.95)
    host_share: Range = (0.3, 3.0)
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
    query_heads: tuple[int, ...] = (1, 1, 2)
    fixed_scales: tuple[float, ...] = (0.0, 0.003)
    host_operations_s: tuple[float, ...] = (0.0, 5e-6)
    sustained: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``seeds`` problems drawn from ``ratios``, so many of them ``feasible``; of those at least so many optima have a trait."""

    name: str
    hardware: str
    ratios: Ratios
    seeds: int
    feasible: int
    least: dict[str, int] = field(default_factory=dict)

    def request(self, seed: int) -> Request:
        return draw_request(self.ratios, random.Random(f"{self.name} {seed}"))


SLOW_CPU: Range = (-4.0, -2.5)

FAMILIES = (
    Family(
        name="waves",
        hardware="any card whose decode reads more KV than weights: running in waves then costs little",
        ratios=Ratios(batch=(2, 4), dram_decades=SLOW_CPU, link_decades=(-2.7, -1.5), hbm_share=(0.3, 0.9)),
        seeds=34,
        feasible=34,
        least={"waves": 24},
    ),
    Family(
        name="8-bit KV",
        hardware="any; half the bytes, at the price of conversions on cards with little bandwidth to spare",
        ratios=Ratios(kv_formats=((KvFormat.INT8,),), dram_decades=(-4.0, -1.0)),
        seeds=26,
        feasible=25,
        least={"waves": 12, "host KV": 4},
    ),
    Family(
        name="all at once",
        hardware="PCIe 4 and 5 cards (link 1 to 5 % of HBM bandwidth) with a batch that may not wait",
        ratios=Ratios(all_at_once=(True,), dram_decades=(-3.0, -1.5)),
        seeds=44,
        feasible=36,
        least={"host KV": 20, "recompute": 8},
    ),
    Family(
        name="arithmetic to spare",
        hardware="hundreds of FLOP for each byte of HBM and a slow link: L4, L40S, RTX cards on PCIe 4 x8; wide KV (no GQA)",
        ratios=Ratios(
            all_at_once=(True,),
            hidden=(8,),
            head_dim=(8, 16),
            link_decades=(-2.7, -1.5),
            flop_decades=(1.5, 3.0),
            dram_decades=SLOW_CPU,
        ),
        seeds=30,
        feasible=27,
        least={"recompute": 15, "host KV": 8},
    ),
    Family(
        name="small host",
        hardware="workstations and cloud shapes with less DRAM than the KV that does not fit HBM",
        ratios=Ratios(
            all_at_once=(True,),
            hidden=(16, 32),
            head_dim=(16,),
            host_share=(0.05, 0.4),
            hbm_share=(0.5, 0.9),
            link_decades=(-1.4, -0.5),
            flop_decades=(1.0, 3.0),
            dram_decades=SLOW_CPU,
            layers=(3, 4),
        ),
        seeds=44,
        feasible=25,
        least={"host limit": 14, "recompute": 18, "p1 < p2": 6, "host KV": 10},
    ),
    Family(
        name="the link fills up",
        hardware="GH200 and PCIe 5 cards (link 2 to 20 % of HBM bandwidth) under models whose layers outweigh their KV: the "
        "first tokens off HBM are fetched behind the weights, from p1 on; when that time is used up, the next are recomputed",
        ratios=Ratios(
            all_at_once=(True,),
            hidden=(16,),
            head_dim=(16,),
            link_decades=(-1.4, -0.7),
            flop_decades=(1.0, 2.0),
            dram_decades=SLOW_CPU,
            hbm_share=(0.5, 0.95),
            host_share=(0.2, 0.6),
            layers=(3, 4),
            batch=(1, 2),
            output=(8, 16),
        ),
        seeds=44,
        feasible=37,
        least={"p1 < p2": 20, "host limit": 16, "host KV": 25, "recompute": 25},
    ),
    Family(
        name="sparse",
        hardware="any; selectors that forget and selectors that recall",
        ratios=Ratios(
            max_sparsity=(0.3, 0.5, 0.8),
            selectors=(Selector.SWA, Selector.SWA, Selector.H2O, Selector.TOPK, Selector.PAGES, Selector.LOCAL),
            all_at_once=(True, False),
            dram_decades=(-4.0, -2.0),
            hbm_share=(0.15, 0.6),
        ),
        seeds=51,
        feasible=36,
        least={"sparse": 12, "host KV": 6},
    ),
    Family(
        name="latency",
        hardware="any, judged by the time between tokens or to the first one",
        ratios=Ratios(
            objectives=(Objective.TPOT, Objective.TTFT), all_at_once=(True, False), dram_decades=(-3.0, -1.0)
        ),
        seeds=24,
        feasible=21,
        least={"host KV": 8},
    ),
    Family(
        name="long",
        hardware="any; up to 24 steps and 64 tokens",
        ratios=Ratios(
            all_at_once=(True,),
            batch=(1, 1),
            prompt=(24, 40),
            output=(16, 24),
            hidden=(8,),
            head_dim=(16,),
            hbm_share=(0.85, 0.97),
        ),
        seeds=10,
        feasible=10,
        least={"host KV": 4},
    ),
    Family(
        name="open group",
        hardware="CUDA cards beside a host that launches slowly, so that captured steps win; texts of one or two groups of keys, "
        "INT8 in both tiers",
        ratios=Ratios(
            all_at_once=(True,),
            batch=(1, 1),
            prompt=(70, 130),
            output=(3, 5),
            layers=(8, 12),
            hidden=(64,),
            head_dim=(16,),
            query_heads=(1,),
            kv_formats=((KvFormat.INT8,),),
            hbm_share=(0.45, 0.8),
            link_decades=(-3.2, -2.0),
            flop_decades=(0.0, 0.7),
            dram_decades=SLOW_CPU,
            fixed_scales=(0.003,),
            host_operations_s=(0.02,),
        ),
        seeds=14,
        feasible=14,
        least={"host KV": 8, "open group": 5},
    ),
    Family(
        name="clocks fall",
        hardware="cards whose power limit a prefill meets: the steps after it are slower, each by less; here so little is left of "
        "the clocks that a prefill of microseconds tells",
        ratios=Ratios(
            all_at_once=(True, False),
            batch=(2, 4),
            dram_decades=(-2.0, -0.5),
            hbm_share=(0.4, 0.9),
            link_decades=(-1.6, -0.7),
            sustained=(1e-4,),
            kv_formats=((), (KvFormat.INT8,)),
        ),
        seeds=16,
        feasible=15,
        least={"host KV": 6},
    ),
)


def draw_request(ratios: Ratios, rng: random.Random) -> Request:
    """One problem of the kind that ``ratios`` describe."""
    model = _model(ratios, rng)
    work = Workload(
        batch=rng.randint(*ratios.batch),
        prompt_tokens=rng.randint(*ratios.prompt),
        output_tokens=rng.randint(*ratios.output),
    )
    machine = _machine(ratios, rng, model, work)
    return Request(
        machine=machine,
        profile=_profile(ratios, machine, rng),
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
        heads=kv_heads * rng.choice(ratios.query_heads),
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


def _profile(ratios: Ratios, machine: MachineSpec, rng: random.Random) -> Profile:
    """Nominal shares; fixed times scaled down to a tiny model's steps, or none."""
    nominal, scale = Profile.nominal(machine), rng.choice(ratios.fixed_scales)
    fixed = {name: scale * getattr(nominal, name) for name in FIXED}
    ramps = random.Random(machine.gpu.hbm_bytes)  # by itself: the other draws stay what they were
    fixed |= {
        name: scale * ramps.choice((0.0, 5e-6))
        for name in ("product_setup_s", "attention_setup_s", "attention_token_s")
    }
    fixed["host_operation_s"] = scale * ramps.choice(ratios.host_operations_s)
    fixed["prefill_sustained_share"] = ramps.choice(ratios.sustained)
    fixed["piece_setup_s"] = 0.0  # a prefix beside fetches feels it in all steps: the search, where a step fetches
    return replace(nominal, reserve_bytes=0.0, gemm_half_rows=rng.choice((0.0, 4.0, 128.0)), **fixed)

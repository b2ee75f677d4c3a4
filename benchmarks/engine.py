"""How fast a plan is simulated, event by event and by the fast path.

    python benchmarks/engine.py [--runs 7]

OPT-13B (40 layers), 64 sequences, prompt 128, 512 tokens each on an A100 40 GB: prefill and 511 decode steps. All on
one core. "homes vary" prices plans of one setting, as a search over token homes does; "settings vary" prices plans no
two of which share a setting, so that nothing but token counts can be kept from one to the next. Seconds are CPU
seconds of this process: what a machine without neighbours takes.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sim import catalogue
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.footprint import kv_budget_bytes
from sim.forecast import forecast, over_capacity
from sim.homes import TokenHomes
from sim.kv import KvFormats
from sim.plan import Mechanism, Placement, Plan, Setting
from sim.profile import Profile
from sim.spec import DType, MachineSpec
from sim.workload import Workload

LIMIT_S = 0.5
REQUIRED_PER_S = 5000
SETTINGS = 300  # more than any cache of the fast path keeps
HOMES = 30

KINDS: dict[str, tuple[Selector, dict[str, Any]]] = {
    "all in HBM, waves of 16": (Selector.DENSE, {"concurrency": 16}),
    "dense, older tokens fetched": (Selector.DENSE, {}),
    "dense, CPU attends, weights streamed": (Selector.DENSE, {"host_attention": True, "weights_on_host": 0.3}),
    "SWA, selection resident": (Selector.SWA, {"placement": Placement.RESIDENT}),
    "pages, recalled, gathered": (Selector.PAGES, {"fetch_by": Mechanism.GATHER_KERNEL}),
    "pages, half guessed ahead": (Selector.PAGES, {"guess_hits": 0.5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs for each median (default 7)")
    runs = parser.parse_args().runs
    _use_one_core()
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, one core of {_hardware()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}; medians of {runs} runs, ratios to what is required in brackets")
    print(f"required: at most {LIMIT_S} s through SimPy, at least {REQUIRED_PER_S:,} plans a second by the fast path\n")
    print(f"{'plan':<38}{'spans':>9}{'SimPy':>18}{'homes vary':>22}{'settings vary':>22}")
    for name, (selector, choices) in KINDS.items():
        print(f"{name:<38}{_row(_setting(selector, choices), runs)}")


def _row(setting: Setting, runs: int) -> str:
    cost = CostModel(machine=setting.machine, profile=Profile.nominal(setting.machine))
    slots = _most_slots(setting, cost)
    plan = _plan(setting, slots)
    spans = sum(len(wave.spans) for wave in simulate(plan, cost).waves)
    engine_s = statistics.median(_seconds(lambda: simulate(plan, cost)) for _ in range(runs))
    homes = [_plan(setting, slots - fewer) for fewer in range(min(HOMES, slots - _fewest_slots(setting)))]
    settings = [replace(plan, setting=_budgeted(setting, fewer)) for fewer in range(SETTINGS)]
    rates = (_plans_per_s(plans, cost, runs) for plans in (homes, settings))
    fast = "".join(f"{f'{rate:,.0f}/s ({rate / REQUIRED_PER_S:.2f} x)':>22}" for rate in rates)
    return f"{spans:>9,}{f'{engine_s:.3f} s ({engine_s / LIMIT_S:.2f} x)':>18}{fast}"


def _plans_per_s(plans: list[Plan], cost: CostModel, runs: int) -> float:
    def price_all() -> None:
        for plan in plans:
            assert forecast(plan, cost).outcome

    rounds = max(1, SETTINGS // len(plans))
    price_all()
    seconds = statistics.median(_seconds(lambda: [price_all() for _ in range(rounds)]) for _ in range(runs))
    return rounds * len(plans) / seconds


def _setting(selector: Selector, choices: dict[str, Any]) -> Setting:
    gpu = catalogue.gpu("a100-40g")
    machine, model = MachineSpec(name=gpu.name, gpu=gpu, host=catalogue.host()), catalogue.model("opt-13b")
    workload = Workload(batch=64, prompt_tokens=128, output_tokens=512)
    budget = kv_budget_bytes(
        machine,
        model,
        DType.FP16,
        sequences=choices.get("concurrency", workload.batch),
        prompt_tokens=workload.prompt_tokens,
        reserve_bytes=round(Profile.nominal(machine).reserve_bytes),
        weights_on_host=choices.get("weights_on_host", 0.0),
    )
    return Setting(
        machine=machine,
        model=model,
        workload=workload,
        dtype=DType.FP16,
        attention=Attention(selector=selector, sparsity=0.0 if selector is Selector.DENSE else 0.8),
        access=measured_access(selector),
        kv_format=KvFormats(),
        kv_budget_bytes=budget,
        **({"concurrency": workload.batch} | choices),
    )


def _budgeted(setting: Setting, fewer_bytes: int) -> Setting:
    return replace(setting, kv_budget_bytes=setting.kv_budget_bytes - fewer_bytes)


def _most_slots(setting: Setting, cost: CostModel) -> int:
    """As many of the newest tokens in HBM as fit there."""
    fits, too_many = _fewest_slots(setting), setting.workload.cached_tokens + 1
    while too_many - fits > 1:
        slots = (fits + too_many) // 2
        fits, too_many = (fits, slots) if _overflows(_plan(setting, slots), cost) else (slots, too_many)
    return fits


def _overflows(plan: Plan, cost: CostModel) -> bool:
    return any((over > 0).any() for over in over_capacity(forecast(plan, cost)))


def _fewest_slots(setting: Setting) -> int:
    return max(setting.slots_needed)


def _plan(setting: Setting, slots: int) -> Plan:
    """The newest ``slots`` living tokens at home in HBM, the others on the host."""
    counts = setting.token_counts
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    none = (0,) * len(living)
    homes = TokenHomes(
        hbm=tuple(min(slots, tokens) for tokens in living),
        host_kv=tuple(max(0, tokens - slots) for tokens in living),
        activations=none,
        dropped=counts.dead,
        copies=none,
    )
    return Plan(setting=setting, homes=homes)


def _seconds(work: Callable[[], object]) -> float:
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def _use_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _hardware() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

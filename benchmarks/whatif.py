"""How many points a second ``planner whatif`` solves, starting its processes included.

    python benchmarks/whatif.py [--jobs N]

Every point asks for two optima, the best plan and the best lossless one. The first grid is what most people would ask;
in the second, only lossless, most points have a program to solve.
"""

import argparse
import os
import platform
import sys
import time
from datetime import UTC, datetime
from math import prod
from pathlib import Path

REQUIRED_PER_S = 30
REQUIRED_ON = "two cores"
MACHINES = {"gpu": ("v100-32g", "a100-40g", "l40s"), "link_gb_s": (12, 25)}
WORK = {"model": ("opt-13b", "llama-3-8b"), "batch": (8, 16, 32, 64), "prompt": (128, 512), "output": (256, 512)}
GRIDS = {
    "with sparsity and int8 KV allowed": {**MACHINES, **WORK},
    "lossless only": {**MACHINES, **WORK, "lossless": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    jobs = parser.parse_args().jobs
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {_hardware()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}\n")
    for name, grid in GRIDS.items():
        _report(name, grid, jobs)


def _report(name: str, grid: dict[str, object], jobs: int) -> None:
    from planner.sweep import Figures, sweep

    started = time.perf_counter()
    points = sweep(jobs=jobs, **grid)
    seconds = time.perf_counter() - started
    per_s = len(points) / seconds
    fit = sum(isinstance(point.outcome, Figures) for point in points)
    print(f"{name}: {prod(len(axis) for axis in grid.values() if isinstance(axis, tuple))} points, {fit} with a plan")
    print(f"  solved    {per_s:.1f} a second with {jobs} processes ({seconds:.2f} s in all)")
    print(f"  required  {REQUIRED_PER_S} a second on {REQUIRED_ON}: {per_s / REQUIRED_PER_S:.2f} of it\n")


def _hardware() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()

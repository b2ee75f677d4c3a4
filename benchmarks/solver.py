"""How long solving takes: 200 problems of full size drawn by a seed, and problems of the size of FlexGen's search.

    python benchmarks/solver.py [--problems 200]

The model, GPU and work of each problem come from the catalogue. A problem that nothing fits is drawn again.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from datetime import UTC, datetime

from planner.optimum import optimum
from planner.request import Request
from planner.solution import Infeasible
from planner.solve import solve
from planner.solvers import default_solver
from sim import catalogue
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

REQUIRED_MEDIAN_S, REQUIRED_WORST_S = 0.060, 1.0
FLEXGEN_S = "2.7 to 6.6 s"  # its policy search, as the issue that asked for this states it; not measured here
FLEXGEN_SIZED = (("t4", "opt-30b", 48), ("t4", "opt-6.7b", 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="how many are drawn (default 200)")
    problems = parser.parse_args().problems
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.processor() or platform.machine()}, {default_solver()}")
    print(f"command: python {' '.join(sys.argv)}\n")
    timings = [_timed(request) for request in _drawn(problems, random.Random(0))]
    alone = sorted(optimum_s for optimum_s, _, _ in timings)
    both = sorted(both_s for _, both_s, _ in timings)
    print(f"{len(timings)} problems              median     worst   required")
    for name, seconds in (("the best plan", alone), ("and the best lossless one", both)):
        print(f"{name:26s} {1e3 * statistics.median(seconds):6.0f} ms {1e3 * seconds[-1]:6.0f} ms   60 ms, 1000 ms")
    gaps = sorted(gap for _, _, gap in timings)
    print(f"gap of the certificate: median {gaps[len(gaps) // 2]:.5f}, worst {gaps[-1]:.5f}")
    print(f"\nproblems of the size of FlexGen's search, which takes {FLEXGEN_S}")
    for gpu, model, batch in FLEXGEN_SIZED:
        optimum_s, both_s, _ = _timed(_request(gpu, model, batch, 512, 32))
        print(
            f"  {model} on {gpu}, batch {batch}: {1e3 * optimum_s:.0f} ms, with the lossless one {1e3 * both_s:.0f} ms"
        )


def _timed(request: Request) -> tuple[float, float, float]:
    started = time.perf_counter()
    best = optimum(request)
    optimum_s = time.perf_counter() - started
    started = time.perf_counter()
    solve(request)
    assert best is not None
    return optimum_s, time.perf_counter() - started, best.certificate.gap


def _drawn(problems: int, rng: random.Random) -> list[Request]:
    requests: list[Request] = []
    while len(requests) < problems:
        try:
            request = _request(
                rng.choice(catalogue.gpu_names()),
                rng.choice(catalogue.model_names()),
                rng.choice((8, 16, 32, 64)),
                rng.choice((128, 512, 1024)),
                rng.choice((128, 256, 512)),
            )
            solve(request, suggest=False)
        except (Infeasible, ValueError):
            continue
        requests.append(request)
    return requests


def _request(gpu: str, model: str, batch: int, prompt: int, output: int) -> Request:
    machine = MachineSpec(name=gpu, gpu=catalogue.gpu(gpu), host=catalogue.host())
    return Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model(model),
        workload=Workload(batch=batch, prompt_tokens=prompt, output_tokens=output),
    )


if __name__ == "__main__":
    main()

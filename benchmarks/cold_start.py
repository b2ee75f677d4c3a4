"""How long the command line takes from a cold start, and where the time goes.

    python benchmarks/cold_start.py [--runs 11]

Each run is a process of its own; files are in the page cache, as they are from the second call of the day on.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

SOLVE = ("solve", "--gpu", "a100-40g")
HELP = ("--help",)
# Seconds that are required, and what others were said to take when that was asked for; theirs is not measured here.
REQUIRED_S = {SOLVE: 1.0, HELP: 0.3}
OTHERS = {
    SOLVE: "aiconfigurator 2.4 to 9 s, FlexGen's policy search 4.3 s",
    HELP: "aiconfigurator 0.85 s",
}
SHOWN_PACKAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="processes for each median (default 11)")
    runs = parser.parse_args().runs
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {_hardware()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}; median of {runs} runs, least and most in brackets\n")
    for words in (SOLVE, HELP):
        _report(words, runs)
    _report_parts()


def _report(words: tuple[str, ...], runs: int) -> None:
    seconds = sorted(_run_s(words) for _ in range(runs))
    median_s, required_s = statistics.median(seconds), REQUIRED_S[words]
    print(f"planner {' '.join(words)}")
    print(f"  takes     {median_s:.3f} s [{seconds[0]:.3f}, {seconds[-1]:.3f}]")
    print(f"  required  {required_s:.1f} s: {median_s / required_s:.2f} of it")
    print(f"  others    {OTHERS[words]}\n")


def _report_parts() -> None:
    """One solve taken apart: the interpreter, imports by package, the solver, the rest."""
    total_s = statistics.median(_run_s(SOLVE) for _ in range(5))
    bare_s = statistics.median(_seconds([sys.executable, "-c", ""]) for _ in range(5))
    imports_s = _import_seconds()
    answer = json.loads(subprocess.run([*_planner(), *SOLVE, "--json"], capture_output=True, check=True).stdout)
    solve_s = answer["solver"]["solve_s"]
    print(f"where the {total_s:.3f} s of one solve go (imports are slower under -X importtime, so read them as shares)")
    parts = {"interpreter": bare_s, "imports": sum(imports_s.values()), "search for the plan": solve_s}
    for name, seconds in parts.items():
        print(f"  {name:<22} {seconds:.3f} s")
    for package, seconds in sorted(imports_s.items(), key=lambda item: -item[1])[:SHOWN_PACKAGES]:
        print(f"    import {package:<15} {seconds:.3f} s")
    print(f"  {'the rest':<22} {max(0.0, total_s - sum(parts.values())):.3f} s (catalogue, lossless plan, summary)")


def _import_seconds() -> dict[str, float]:
    """Own import time of each top-level package that a solve loads."""
    module = [sys.executable, "-X", "importtime", "-m", "planner", *SOLVE]
    log = subprocess.run(module, capture_output=True, text=True, check=True, cwd=_root()).stderr
    seconds: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        own, _, name = line.removeprefix("import time:").split("|") if line.count("|") == 2 else ("", "", "")
        if own.strip().isdigit():
            package = name.strip().split(".")[0]
            seconds[package if _is_installed(package) else "standard library"] += int(own) * 1e-6
    return dict(seconds)


def _is_installed(package: str) -> bool:
    return package.lstrip("_") not in {name.lstrip("_") for name in sys.stdlib_module_names}


def _run_s(words: tuple[str, ...]) -> float:
    return _seconds([*_planner(), *words])


def _seconds(command: list[str]) -> float:
    start_s = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=_root())
    return time.perf_counter() - start_s


def _planner() -> list[str]:
    """The installed program beside this interpreter, else the package of this checkout."""
    program = shutil.which("planner", path=str(Path(sys.executable).parent))
    return [program] if program else [sys.executable, "-m", "planner"]


def _root() -> Path:
    return Path(__file__).parents[1]


def _hardware() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


if __name__ == "__main__":
    main()

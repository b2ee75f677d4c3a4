"""Runtime speed on one GPU, row by row: tokens/s end to end, beside the limit of the memory that must be read.

    python benchmarks/runtime_speed.py [--table benchmarks/results/h200.json] [--row NAME …] [--again]

OPT-6.7B's shape, random weights, batch 64, prompt 128, output 512, fp16, median of three, where a row says nothing else.
A table is resumed where it stopped; each row carries its date and hardware, and each kind of GPU has a table. Without a
GPU the H200's is shown. Capturing and pinning are done once for many runs: reported apart.
"""

import argparse
import datetime
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed_rows import continuous, waves
from speed_rows.common import Rates, Row, figures

from runtime.models.config import config_from_spec
from runtime.models.random_weights import random_decoder
from sim import catalogue
from sim.files import write_atomically
from sim.units import GIB

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, Row] = {**waves.ROWS, **continuous.ROWS}


def measured_rates() -> Rates:
    """A sum over gigabytes, a copy from pinned memory, and keys and values of 8,192 rows projected from random inputs."""
    source = torch.ones(2 * GIB // 8, dtype=torch.int64, device="cuda")
    pinned = torch.ones(GIB // 32, dtype=torch.int64, pin_memory=True)
    hbm_s = median_seconds(source.sum)
    link_s = median_seconds(lambda: source[: pinned.numel()].copy_(pinned, non_blocking=True))
    rows, weight = (torch.randn(8192, 4096, dtype=torch.float16, device="cuda") for _ in range(2))
    matrix_s = median_seconds(lambda: rows @ weight.t())
    flop = 2 * rows.numel() * weight.shape[0]
    return Rates(hbm=source.numel() * 8 / hbm_s, link=pinned.numel() * 8 / link_s, matrix=flop / matrix_s)


def median_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def kind_of_gpu() -> str:
    """As in NVIDIA H200; the H200 where there is none."""
    words = torch.cuda.get_device_name().split() if torch.cuda.is_available() else ["NVIDIA", "H200"]
    return words[min(1, len(words) - 1)].lower()


def report(table: dict[str, Any]) -> None:
    print(
        f"{'row':38} {'tokens/s':>9} {'must':>6} {'aim':>6} {'limit':>6} {'step ms':>8} {'HBM GB/s':>8} {'link':>5}"
        f" {'peak GiB':>8}  date, hardware"
    )
    for name, row in table.items():
        marks = ("*" if row["sampled"] else "") + ("" if row.get("within_hbm", True) else "!")
        print(
            f"{name + ' ' + marks:38} {row['tokens_per_s']:9.0f} {row['must']:6.0f} {row['aim']:6.0f}"
            f" {row['limit_tokens_per_s']:6.0f} {row['step_ms']:8.3f} {row['hbm_gb_per_s']:8.0f} {row['link_gb_per_s']:5.1f}"
            f" {row['peak_hbm_gib']:8.2f}  {row['date']}, {row['hardware']}"
        )
    print("* sampled: 16 steps at each of five context lengths, integrated")
    if not all(row.get("within_hbm", True) for row in table.values()):
        print("! more HBM than weights, KV budget and 1.5 GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="JSON file to resume; by default that of this kind of GPU")
    parser.add_argument("--row", action="append", choices=ROWS, help="rows to measure; all by default")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the table has")
    asked = parser.parse_args()
    path = asked.table or RESULTS / f"{kind_of_gpu()}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    waiting = [name for name in asked.row or ROWS if asked.again or name not in table]
    if waiting and torch.cuda.is_available():
        rates = measured_rates()
        decoder, model = None, None
        for name in waiting:
            torch.cuda.empty_cache()
            if model != ROWS[name].model:
                decoder, model = None, ROWS[name].model  # the one before gives its memory back first
                config = replace(config_from_spec(catalogue.model(model)), stop_tokens=())
                decoder = random_decoder(config, device=torch.device("cuda"), dtype=torch.float16)
            assert decoder is not None
            torch.cuda.reset_peak_memory_stats()
            result = figures(ROWS[name], ROWS[name].measure(decoder), decoder, rates)
            stamp = {"date": datetime.date.today().isoformat(), "hardware": torch.cuda.get_device_name()}
            table[name] = stamp | result
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(table, indent=1) + "\n")
            gc.collect()
    report(table)


if __name__ == "__main__":
    main()

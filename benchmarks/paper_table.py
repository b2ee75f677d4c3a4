"""ALISA's throughput over FlexGen and vLLM, as the paper measured it and as one nominal profile predicts it.

    python benchmarks/paper_table.py

Nothing is tuned to the paper: every system is a plan that the same engine prices under ``Profile.nominal``. Figures of
the paper: arXiv 2403.17312, evaluation (prompt 128, output 512, sparsity 80 %, link 20 GB/s, batch 4 to 64).
"""

from dataclasses import replace
from datetime import date

from rich.console import Console
from rich.table import Table

from planner.compare import Row, compare
from planner.request import Request
from sim import catalogue
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

CASES = (("opt-6.7b", "v100-16g"), ("opt-13b", "v100-32g"), ("opt-30b", "h100-80g-sxm"))
BATCHES = (4, 8, 16, 32, 64)
LINK_BYTES_PER_S = 20e9
PAPER = (
    "paper: over FlexGen 1.4 to 3.0, growing with batch; over vLLM up to 1.9 at large batch and tight memory, below 1 "
    "for a small model at batch 4; DeepSpeed-ZeRO out of memory at large batch"
)


def request(model: str, gpu: str, batch: int) -> Request:
    card = catalogue.gpu(gpu)
    card = replace(card, link=replace(card.link, bytes_per_s=LINK_BYTES_PER_S))
    machine = MachineSpec(name=gpu, gpu=card, host=catalogue.host("alisa-xeon"), overrides=("link_gb_s=20",))
    return Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model(model),
        workload=Workload(batch=batch, prompt_tokens=128, output_tokens=512),
    )


def speed(row: Row) -> float | None:
    return row.outcome.tokens_per_s if row.outcome else None


def ratio(first: float | None, second: float | None) -> str:
    return f"{first / second:.2f}" if first and second else "-"


def main() -> None:
    table = Table(title=f"Tokens/s under the nominal profiles, {date.today()}", box=None)
    columns = ("model", "GPU", "batch", "ALISA", "FlexGen", "vLLM", "vLLM-8bit", "ZeRO", "optimum", "/FlexGen", "/vLLM")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for model, gpu in CASES:
        for batch in BATCHES:
            rows = {row.policy: speed(row) for row in compare(request(model, gpu, batch))}
            shown = [rows[name] for name in ("alisa", "flexgen", "vllm", "vllm-8bit", "deepspeed-zero", "optimum")]
            figures = [f"{value:,.0f}" if value else "oom" for value in shown]
            over = [ratio(rows["alisa"], rows[name]) for name in ("flexgen", "vllm")]
            table.add_row(model, gpu, str(batch), *figures, *over)
    console = Console(width=110)
    console.print(table)
    console.print(PAPER)


if __name__ == "__main__":
    main()

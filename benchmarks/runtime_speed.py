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
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rows.recall import LLAMA_CASE, OPT_CASE, recall_plan, selections, turnover_of

from runtime.graph.run import GraphWave
from runtime.models import Decoder
from runtime.models.config import config_from_spec
from runtime.models.random_weights import random_decoder
from runtime.wave import Prompts
from sim import catalogue
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormats, inputs_layer_bytes, kv_layer_bytes
from sim.plan import Mechanism, Placement, Plan, Setting
from sim.profile import Profile
from sim.spec import DType, MachineSpec
from sim.units import GIB
from sim.workload import Workload

BATCH, PROMPT, OUTPUT, REPEATS, SAMPLED_STEPS = 64, 128, 512, 3, 16
BUDGET_BYTES = int(4.5 * GIB)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``must`` and ``aim`` are tokens/s, None where the link alone sets them. A ``sampled`` row runs 16 steps at each of
    five context lengths, and its decoding time is the integral over them. Selections have the ``turnover`` given.
    """

    plan: Callable[[], Plan]
    must: float | None = None
    aim: float | None = None
    sampled: bool = False
    turnover: float | None = None
    repeats: int = REPEATS


def setting(attention: Attention, budget_bytes: int, *, concurrency: int = BATCH, **options: Any) -> Setting:
    machine = MachineSpec(name="measured", gpu=catalogue.gpu("H200"), host=catalogue.host())
    return Setting(
        machine=machine,
        model=catalogue.model("OPT-6.7B"),
        workload=Workload(batch=BATCH, prompt_tokens=PROMPT, output_tokens=OUTPUT),
        dtype=DType.FP16,
        concurrency=concurrency,
        attention=attention,
        access=measured_access(attention.selector),
        kv_format=KvFormats(),
        kv_budget_bytes=budget_bytes,
        **options,
    )


def dense_plan(budget_bytes: int = 24 * GIB, concurrency: int = BATCH) -> Plan:
    """As many tokens in HBM as the budget has slots for, the rest on the host, read where they lie."""
    dense = Attention(selector=Selector.DENSE)
    chosen = setting(dense, budget_bytes, concurrency=concurrency, fetch_by=Mechanism.GATHER_KERNEL)
    cached, slots = chosen.token_counts.cached, budget_bytes // slot_bytes(chosen)
    none = (0,) * len(cached)
    hbm, host = tuple(min(n, slots) for n in cached), tuple(max(0, n - slots) for n in cached)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none)
    return Plan(setting=chosen, homes=homes)


def waves_plan() -> Plan:
    """So few sequences at once that all their KV fits; no more waves than that takes, and even ones."""
    budget = setting(Attention(selector=Selector.DENSE), BUDGET_BYTES, concurrency=1)
    fit = BUDGET_BYTES // (budget.workload.cached_tokens * slot_bytes(budget))
    return dense_plan(BUDGET_BYTES, ceil(BATCH / ceil(BATCH / fit)))


def slot_bytes(chosen: Setting) -> int:
    """A token's keys and values, all layers, of all sequences that run at once."""
    model = chosen.model
    return chosen.concurrency * model.layers * kv_layer_bytes(model, chosen.dtype, chosen.kv_format.gpu)


def window_plan() -> Plan:
    """As many slots as the budget has; beyond them the newest tokens and the selected ones are in HBM."""
    chosen = setting(Attention(selector=Selector.SWA, sparsity=0.8), BUDGET_BYTES, placement=Placement.RESIDENT)
    counts, model = chosen.token_counts, chosen.model
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    history = max(counts.local) * (1 + max(living)) * BATCH * model.layers * chosen.dtype.size_bytes
    slots, off, rows = (BUDGET_BYTES - history) // slot_bytes(chosen), 0, []
    for alive, local, selected in zip(living, counts.local, counts.selected, strict=True):
        if alive > slots:
            off = max(off, min(alive - local, selected + alive - slots))
        rows.append((alive - off, off, max(0, min(off, slots - (alive - off)))))
    hbm, host, copies = zip(*rows, strict=True)
    none = (0,) * len(rows)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=counts.dead, copies=copies)
    return Plan(setting=chosen, homes=homes)


def copied_plan() -> Plan:
    """What is not in HBM comes by the copy engine, a layer ahead; the ring of fetched layers lies in the budget too."""
    chosen = setting(Attention(selector=Selector.DENSE), BUDGET_BYTES)
    cached, slot = chosen.token_counts.cached, slot_bytes(chosen)
    staged = (chosen.prefetch_layers + 1) * slot // chosen.model.layers
    none = (0,) * len(cached)
    hbm = tuple(
        min(n, (BUDGET_BYTES - n * staged) // (slot - staged)) if n * slot > BUDGET_BYTES else n for n in cached
    )
    host = tuple(n - near for n, near in zip(cached, hbm, strict=True))
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none)
    return Plan(setting=chosen, homes=homes)


def recompute_plan() -> Plan:
    """The planner's own for the whole batch at once, without loss: it keeps layer inputs on the host."""
    from planner import Request, solve

    chosen = setting(Attention(selector=Selector.DENSE), BUDGET_BYTES)
    asked = Request(
        machine=chosen.machine,
        profile=Profile.nominal(chosen.machine),
        model=chosen.model,
        workload=chosen.workload,
        max_sparsity=0.0,
        kv_formats=(),
        concurrency=BATCH,
        kv_budget_bytes=BUDGET_BYTES,
    )
    return solve(asked).plan


ROWS = {
    "SWA, keep 20 %, resident": Row(plan=window_plan, must=9000, aim=11000),
    "dense, all in HBM": Row(plan=dense_plan, must=7500, aim=8500),
    "dense in the budget, waves, fp16": Row(plan=waves_plan, must=2500, aim=3300),
    "lossless, rest fetched, fp16": Row(plan=lambda: dense_plan(BUDGET_BYTES), sampled=True),
    "lossless, rest copied ahead, fp16": Row(plan=copied_plan, sampled=True),
    # 1.5 and 1.8 times what fetching reached, 380
    "lossless, rest recomputed, fp16": Row(plan=recompute_plan, must=570, aim=684, sampled=True),
    "page digests, keep 10 %": Row(plan=lambda: recall_plan(OPT_CASE), must=4000, aim=7000, turnover=0.28),
    "Llama-3.1-8B, 32k, pages, keep 5 %": Row(plan=lambda: recall_plan(LLAMA_CASE), turnover=0.28, repeats=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Ceilings of this machine: bytes a second read from HBM and copied from pinned host memory, FLOP a second of products."""

    hbm: float
    link: float
    matrix: float


def measure(row: Row, decoder: Decoder, rates: Rates) -> dict[str, Any]:
    plan = row.plan()
    work = plan.setting.workload
    generated = work.batch * work.output_tokens
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    wave = GraphWave(plan, decoder, [0] * plan.setting.concurrency)
    if row.turnover is not None:
        wave.slots.bias = selections(plan, row.turnover, decoder.device)
        wave.capture()
    torch.cuda.synchronize()
    setup_s = time.perf_counter() - start
    prompts = batches(plan, wave)
    run = run_sampled if row.sampled else run_whole
    runs = sorted(run(wave, prompts) for _ in range(1 if row.sampled else row.repeats))
    seconds, prefill_s = runs[len(runs) // 2]
    decode_steps = len(prompts) * work.decode_steps
    step_s = (seconds - prefill_s) / decode_steps
    hbm_bytes, link_bytes = mean_step_bytes(plan, decoder)
    recalls = plan.setting.attention.selector.recalls
    if recalls:
        hbm_bytes, link_bytes = hbm_bytes + digest_bytes(plan), fetched_bytes(plan, wave.slots.fetched_tokens)
    flop = mean_step_flop(plan)
    limit_step_s = max(hbm_bytes / rates.hbm, link_bytes / rates.link, flop / rates.matrix)
    limit = generated / (prefill_s + decode_steps * limit_step_s)
    return {
        "tokens_per_s": generated / seconds,
        "all_tokens_per_s": [generated / every for every, _ in runs],
        "sampled": row.sampled,
        "turnover": turnover_of(plan, wave.slots.fetched_tokens) if recalls else None,
        "must": row.must or 0.85 * limit,
        "aim": row.aim or 0.95 * limit,
        "limit_tokens_per_s": limit,
        "waves": len(prompts),
        "step_ms": step_s * 1e3,
        "limit_step_ms": limit_step_s * 1e3,
        "hbm_gb_per_s": hbm_bytes / step_s / 1e9,
        "link_gb_per_s": link_bytes / step_s / 1e9,
        "recompute_tflop_per_s": flop / step_s / 1e12,
        "ceiling_hbm_gb_per_s": rates.hbm / 1e9,
        "ceiling_link_gb_per_s": rates.link / 1e9,
        "ceiling_tflop_per_s": rates.matrix / 1e12,
        "prefill_s": prefill_s,
        "setup_s": setup_s,
        "kv_gib": wave.slots.kv_bytes / GIB,
        "peak_hbm_gib": torch.cuda.max_memory_allocated() / GIB,
        "allowed_hbm_gib": (weight_bytes(decoder) + plan.setting.kv_budget_bytes) / GIB + 1.5,
    }


def batches(plan: Plan, wave: GraphWave) -> list[Prompts]:
    """The batch's prompts, a wave each; what the last wave lacks is filled up and not counted."""
    generator = torch.Generator("cuda").manual_seed(0)
    size, work = plan.setting.concurrency, plan.setting.workload
    shape = (ceil(work.batch / size), size, work.prompt_tokens)
    tokens = torch.randint(0, plan.setting.model.vocab, shape, generator=generator, device="cuda")
    return [Prompts(tokens=rows, padding=wave.padding) for rows in tokens]


def run_whole(wave: GraphWave, prompts: list[Prompts]) -> tuple[float, float]:
    """Seconds of it all, and of the prefills among them; after a prefill whose kernels are chosen and loaded."""
    wave.prefill(prompts[0])
    runs = [wave.run(part) for part in prompts]
    prefill_s = sum(run.prefill_s for run in runs)
    return prefill_s + sum(run.decode_s for run in runs), prefill_s


def run_sampled(wave: GraphWave, prompts: list[Prompts]) -> tuple[float, float]:
    """Steps at five lengths, the time between them by the trapezoidal rule. Slots hold what they held before."""
    assert len(prompts) == 1
    wave.prefill(prompts[0])
    prefill_s, rows = wave.prefill(prompts[0]), [1, 124, 248, 372, OUTPUT - SAMPLED_STEPS]
    times = [wave.decode(row, row + SAMPLED_STEPS) / SAMPLED_STEPS for row in rows]
    middles = [row + (SAMPLED_STEPS - 1) / 2 for row in rows]
    between = sum((b - a) * (s + t) / 2 for a, b, s, t in zip(middles, middles[1:], times, times[1:], strict=False))
    ends = (middles[0] - 0.5) * times[0] + (OUTPUT - 0.5 - middles[-1]) * times[-1]
    return prefill_s + between + ends, prefill_s


def weight_bytes(decoder: Decoder) -> int:
    weights = decoder.weights
    layers = [part for layer in weights.layers for part in (layer.qkv, layer.out, layer.up, layer.down)]
    tensors = [weights.embedding, weights.positions, *(part.weight for part in layers)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def mean_step_bytes(plan: Plan, decoder: Decoder) -> tuple[float, float]:
    """Of HBM: each matrix, and the keys and values of each token attended to there. Of the link: what the others cross as."""
    counts, homes, chosen = plan.setting.token_counts, plan.homes, plan.setting
    attended = [near + far for near, far in zip(counts.local, counts.selected, strict=True)][1:]
    dense = chosen.attention.is_dense
    fetched, recomputed = (statistics.mean(home[1:]) if dense else 0.0 for home in (homes.host_kv, homes.activations))
    positions = decoder.weights.positions
    unread = 0 if positions is None else positions.numel() * positions.element_size()
    token_bytes = slot_bytes(chosen)
    inputs_bytes = chosen.concurrency * chosen.model.layers * inputs_layer_bytes(chosen.model, chosen.dtype)
    kept = statistics.mean(attended) - fetched - recomputed
    link = token_bytes * fetched + inputs_bytes * recomputed
    return weight_bytes(decoder) - unread + token_bytes * kept, link


def digest_bytes(plan: Plan) -> float:
    """Of HBM, that a step reads to know which pages it wants."""
    chosen = plan.setting
    per_token = chosen.attention.state_bytes_per_token(chosen.model, chosen.dtype)
    return chosen.concurrency * chosen.model.layers * per_token * statistics.mean(chosen.token_counts.cached[1:])


def fetched_bytes(plan: Plan, tokens: torch.Tensor) -> float:
    """Of the link, in a mean step; ``tokens`` [layer, row, lane]."""
    chosen = plan.setting
    token_bytes = kv_layer_bytes(chosen.model, chosen.dtype, chosen.kv_format.gpu)
    return float(tokens[:, 1:].sum()) * token_bytes / chosen.workload.decode_steps


def mean_step_flop(plan: Plan) -> float:
    """Of projecting saved inputs to keys and values again."""
    model = plan.setting.model
    rows = plan.setting.concurrency * statistics.mean(plan.homes.activations[1:])
    return rows * model.layers * 2 * model.hidden * 2 * model.kv_dim


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
        f"{'row':34} {'tokens/s':>9} {'must':>6} {'aim':>6} {'limit':>6} {'step ms':>8} {'HBM GB/s':>8} {'link':>5}"
        f" {'peak GiB':>8}  date, hardware"
    )
    for name, row in table.items():
        print(
            f"{name + (' *' if row['sampled'] else ''):34} {row['tokens_per_s']:9.0f} {row['must']:6.0f} {row['aim']:6.0f}"
            f" {row['limit_tokens_per_s']:6.0f} {row['step_ms']:8.3f} {row['hbm_gb_per_s']:8.0f} {row['link_gb_per_s']:5.1f}"
            f" {row['peak_hbm_gib']:8.2f}{'!' if row['peak_hbm_gib'] > row['allowed_hbm_gib'] else ' '}"
            f" {row['date']}, {row['hardware']}"
        )
    print("* sampled: 16 steps at each of five context lengths, integrated; ! more than weights + budget + 1.5 GiB")


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
        torch.cuda.empty_cache()
        decoder: Decoder | None = None
        for name in waiting:
            model = ROWS[name].plan().setting.model
            if decoder is None or decoder.spec.name != model.name:
                decoder = None  # its memory is needed
                config = replace(config_from_spec(model), stop_tokens=())
                decoder = random_decoder(config, device=torch.device("cuda"), dtype=torch.float16)
            result = measure(ROWS[name], decoder, rates)
            stamp = {"date": datetime.date.today().isoformat(), "hardware": torch.cuda.get_device_name()}
            table[name] = stamp | result
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(table, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()
    report(table)


if __name__ == "__main__":
    main()

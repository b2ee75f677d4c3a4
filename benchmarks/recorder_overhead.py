"""What recording costs a run: steps alone (always on, to stay under 2 %), selections, and layers too, beside a bare run.

    python benchmarks/recorder_overhead.py --device cpu|cuda [--model opt-125m] [--rounds 7]

One wave of a model with random weights under sparse window attention, all living tokens in HBM. The kinds alternate
within each round; printed are each kind's median seconds and the median over rounds of its ratio to that round's bare
run. A bare run marks no time and counts no token.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from runtime.clock import Clock
from runtime.execute import DTYPES
from runtime.models import Decoder, random_decoder
from runtime.models.config import config_from_spec
from runtime.recorder import Record, Recorder
from runtime.sampling import Sampler, Sampling
from runtime.tally import Tally
from runtime.wave import Wave, WaveOptions, padded
from sim import catalogue
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormats
from sim.plan import Placement, Plan, Setting
from sim.spec import DType, MachineSpec
from sim.workload import Workload

LIMIT = 1.02  # of steps alone
KINDS = {
    "bare": None,
    "steps": Record(selections=False),
    "selections": Record(),
    "selections and layers": Record(layers=True),
}


class NoRecorder(Recorder):
    """Marks nothing."""

    def begin_step(self, row: int) -> None:
        """Nothing."""

    def end_step(self, row: int, logits: torch.Tensor) -> None:
        """Nothing."""


class NoTally(Tally):
    """Counts nothing."""

    def add(self, row: int, layer: int, **tokens: torch.Tensor) -> None:
        """Nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--dtype", choices=[*DType], type=DType, default=DType.FP16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    plan, device = make_plan(asked), torch.device(asked.device)
    decoder = random_decoder(config_from_spec(plan.setting.model), device=device, dtype=DTYPES[asked.dtype])
    runs = {kind: partial(run_once, plan, decoder, record) for kind, record in KINDS.items()}
    report(measure(runs, asked.rounds), asked)


def make_plan(asked: argparse.Namespace) -> Plan:
    attention = Attention(selector=Selector.SWA, sparsity=0.8)
    setting = Setting(
        machine=MachineSpec(name="measured", gpu=catalogue.gpu("H200"), host=catalogue.host()),
        model=catalogue.model(asked.model),
        workload=Workload(batch=asked.batch, prompt_tokens=asked.prompt, output_tokens=asked.output),
        dtype=asked.dtype,
        concurrency=asked.batch,
        attention=attention,
        access=measured_access(attention.selector),
        kv_format=KvFormats(),
        placement=Placement.RESIDENT,
        kv_budget_bytes=2**50,
    )
    counts = setting.token_counts
    living = tuple(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
    none = (0,) * len(living)
    homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
    return Plan(setting=setting, homes=homes)


@torch.inference_mode()
def run_once(plan: Plan, decoder: Decoder, record: Record | None) -> float:
    """Seconds of one wave, its trace included where there is one."""
    rng, work, device = random.Random(0), plan.setting.workload, decoder.device
    rows = [[rng.randrange(decoder.spec.vocab) for _ in range(work.prompt_tokens)] for _ in range(work.batch)]
    kind = NoRecorder if record is None else Recorder
    recorder = kind(plan, Clock(device), record or Record(selections=False))
    options = WaveOptions(per_head=False, published_ranges=False, overlap=True)
    wave = Wave(plan, decoder, padded(rows, work.prompt_tokens, device), recorder, options=options)
    if record is None:
        wave.cache.tally = NoTally(work.output_tokens, decoder.spec.layers, device)
    recorder.tally = wave.cache.tally
    sampler = Sampler(Sampling(), range(work.batch), work.output_tokens, device)
    synchronise(device)
    start_s = time.perf_counter()
    wave.run(sampler, (), lambda _: None)
    if record is not None:
        recorder.trace(work.batch, wave.lanes.count)
    synchronise(device)
    return time.perf_counter() - start_s


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; one before them is not counted, and every other round goes the other way round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds + 1):
        for kind in runs if number % 2 else reversed(runs):
            seconds[kind].append(runs[kind]())
    return {kind: every[1:] for kind, every in seconds.items()}


def report(seconds: dict[str, list[float]], asked: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if asked.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{asked.model}, {asked.batch} x {asked.prompt} + {asked.output}, {asked.dtype}, {where}, {asked.rounds} rounds"
    )
    for kind, every in seconds.items():
        ratios = [mine / bare for mine, bare in zip(every, seconds["bare"], strict=True)]
        ratio = statistics.median(ratios)
        limit = f", at most {LIMIT:.2f}: {'yes' if ratio <= LIMIT else 'NO'}" if kind == "steps" else ""
        print(f"{kind:22} median {statistics.median(every):8.3f} s, {ratio:6.3f} times bare{limit}")


if __name__ == "__main__":
    main()

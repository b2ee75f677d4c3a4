"""``planner run``: loaded by the command line when it is called. torch is imported only once a plan has been read."""

import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.codec import to_plain
from sim.cost import CostModel
from sim.files import load_plan, trace_text, write_atomically
from sim.forecast import forecast
from sim.outputs import require_outputs
from sim.plan import Plan
from sim.profile import Profile
from sim.profile_files import profile_for
from sim.spec import WeightFormat
from sim.trace import Trace, chrome_events
from sim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from runtime.models import Decoder
    from runtime.options import Options, Run

EPILOG = """\
[bold]Examples[/bold]

  planner run plan.json --random-weights

  planner run plan.json --checkpoint opt-6.7b --prompts prompts.jsonl -o completions.jsonl

A line of prompts is {"id": 1, "prompt": "text"} or {"id": 1, "tokens": [5, 9]}.

Interrupted, the same command goes on where it stopped.
"""


def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, as `planner solve -o` writes it.")],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with config.json and safetensors; else the plan's own.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw weights instead of reading them.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="prompts.jsonl; random tokens without it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="completions.jsonl, appended to.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to run.")] = "cpu",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability that is drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of draws, random weights and random prompts.")] = 0,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Select for every key head instead of all together.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the run's steps to this file (Perfetto, chrome://tracing)."),
    ] = None,
    save_trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the run to this file, exactly, for `planner report`.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Profile that predicts, as `planner calibrate` writes it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Generate text as a plan says, and set what was measured beside what was predicted."""
    require_outputs([output, trace, save_trace], [plan, prompts, profile])
    loaded = load_plan(plan)
    predicting = profile_for(loaded.setting.machine, profile)
    if (prompts is None) != (output is None):
        raise ValueError("--prompts and --output, one is missing: give both, or neither for random prompts")
    _require_torch()
    from runtime.options import Options
    from runtime.sampling import Sampling

    options = Options(
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed), per_head=per_head, stop=prompts is not None
    )
    folder = _folder(loaded, checkpoint, random_weights)
    decoder = _decoder(loaded, folder, device, seed)
    if prompts is None or output is None:
        runs = [_run_random(loaded, decoder, options, seed)]
    else:
        runs = _run_prompts(loaded, decoder, options, folder, prompts, output, quiet=as_json)
    measured = _joined([ran.trace for ran in runs])
    if trace is not None and measured is not None:
        events = {"traceEvents": list(chrome_events(measured)), "displayTimeUnit": "ms"}
        write_atomically(trace, json.dumps(events) + "\n")
    if save_trace is not None and measured is not None:
        write_atomically(save_trace, trace_text(measured))
    generated = sum(len(tokens) for ran in runs for tokens in ran.completions)
    _report(loaded, predicting, measured, generated, as_json)


def _require_torch() -> None:
    """Raise ValueError where the extra is missing.

    Threads that wait spin briefly: for long, that cost a factor of ten on busy cores; not at all, a factor of two on idle ones.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kvplan[runtime]'") from None


def _folder(plan: Plan, checkpoint: Path | None, random_weights: bool) -> Path | None:
    """The checkpoint to read, None for random weights. A plan made for a folder's config.json runs that folder."""
    if checkpoint is not None and random_weights:
        raise ValueError("--checkpoint and --random-weights, exclude each other: give one")
    if random_weights or checkpoint is not None:
        return checkpoint
    source = Path(plan.setting.model.source)
    if source.name == "config.json" and source.is_file():
        return source.parent
    raise ValueError(f"{plan.setting.model.name} is known by its shape only: give --checkpoint DIR or --random-weights")


def _decoder(plan: Plan, folder: Path | None, device: str, seed: int) -> "Decoder":
    import torch

    from runtime.execute import DTYPES, require_same_model
    from runtime.memory import memory_limits, require_host_memory
    from runtime.models import as_planned, load_decoder, random_decoder
    from runtime.models.checkpoint import load_config
    from runtime.models.config import config_from_spec

    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device}, must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, torch finds no GPU here: use --device cpu")
    setting, where = plan.setting, torch.device(device)
    as_they_are = setting.weight_format is WeightFormat.NATIVE and not setting.weights_on_host
    first, dtype = where if as_they_are else torch.device("cpu"), DTYPES[setting.dtype]
    weights = format_bytes(setting.model.weight_bytes(setting.dtype, setting.weight_format))
    advice = f"{setting.model.name} has {weights} of weights"
    if first.type == "cpu":
        require_host_memory(setting.model.weight_bytes(setting.dtype, WeightFormat.NATIVE), advice)
    with memory_limits(gpu=advice, host=advice):
        if folder is None:
            decoder = random_decoder(config_from_spec(setting.model), device=first, dtype=dtype, seed=seed)
        else:
            require_same_model(setting.model, load_config(folder).spec)
            decoder = load_decoder(folder, device=first, dtype=dtype)
        return as_planned(decoder, setting, where)


def _run_random(plan: Plan, decoder: "Decoder", options: "Options", seed: int) -> "Run":
    """The plan's workload, with random prompts."""
    from runtime.execute import execute
    from runtime.job import SMALLER_BATCH, SMALLER_BUDGET
    from runtime.memory import memory_limits

    rng, work = random.Random(seed), plan.setting.workload
    prompts = [[rng.randrange(plan.setting.model.vocab) for _ in range(work.prompt_tokens)] for _ in range(work.batch)]
    progress = _Progress(work.batch * work.output_tokens)
    try:
        with memory_limits(gpu=SMALLER_BUDGET, host=SMALLER_BATCH):
            return execute(plan, decoder, prompts, options=options, on_tokens=progress.show)
    finally:
        progress.end()


def _run_prompts(
    plan: Plan, decoder: "Decoder", options: "Options", folder: Path | None, prompts: Path, output: Path, *, quiet: bool
) -> list["Run"]:
    from runtime.job import run_job
    from runtime.prompts import Text, read_prompts

    text = Text(folder)
    wanted = read_prompts(prompts, text)
    progress, runs = _Progress(len(wanted), "prompts"), list["Run"]()

    def tell(done: int, ran: "Run") -> None:
        runs.append(ran)
        progress.show(done)

    try:
        had = run_job(plan, decoder, wanted, output, text, options=options, on_wave=tell)
    finally:
        progress.end()
    if not quiet:
        print(f"{output}: {len(wanted)} completions, {had} of them from before")
    return runs


def _joined(traces: list[Trace]) -> Trace | None:
    """One run after the other; None if there was none."""
    if not traces:
        return None
    return replace(traces[0], waves=tuple(wave for trace in traces for wave in trace.waves))


def _report(plan: Plan, profile: Profile, measured: Trace | None, generated: int, as_json: bool) -> None:
    """Predicted beside measured; a job of other size than the plan's workload is to be compared by its rates."""
    machine = plan.setting.machine
    predicted = forecast(plan, CostModel(machine=machine, profile=profile)).outcome
    got = None if measured is None else measured.outcome
    if as_json:
        outcomes = {"predicted": to_plain(predicted), "measured": to_plain(got), "generated_tokens": generated}
        print(json.dumps(outcomes, indent=2, allow_nan=False))
    elif got is not None:
        rows = [
            ("tokens/s", f"{predicted.tokens_per_s:,.1f}", f"{generated / got.makespan_s:,.1f}"),
            ("time to first token", format_seconds(predicted.ttft_s), format_seconds(got.ttft_s)),
            ("time between tokens", _seconds(predicted.tpot_s), _seconds(got.tpot_s)),
            ("time in all", format_seconds(predicted.makespan_s), format_seconds(got.makespan_s)),
            ("moved to GPU", format_bytes(predicted.h2d_bytes), format_bytes(got.h2d_bytes)),
            ("moved to host", format_bytes(predicted.d2h_bytes), format_bytes(got.d2h_bytes)),
        ]
        print(f"{'':20}{'predicted':>16}{'measured':>16}")
        for name, expected, found in rows:
            print(f"{name:20}{expected:>16}{found:>16}")
        print(
            f"predicted for {machine.name} with profile {profile.name} ({profile.basis}); {generated} tokens generated"
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


class _Progress:
    """A line on stderr, where that is a terminal: how much is done, and how fast."""

    def __init__(self, total: int, unit: str = "tokens") -> None:
        self.total, self.unit, self.start_s = total, unit, time.monotonic()

    def show(self, done: int) -> None:
        if sys.stderr.isatty():
            rate = done / max(time.monotonic() - self.start_s, 1e-9)
            print(f"\r{done}/{self.total} {self.unit}, {rate:,.1f} a second ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)

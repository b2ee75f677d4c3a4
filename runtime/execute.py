"""Runs a plan on a decoder: completions, and what happened in the simulator's own terms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.continuous import run_continuously
from runtime.graph.execute import Captures, captures, recorded, run_admitted, run_wave
from runtime.graph.run import GraphWave
from runtime.models import Decoder, as_planned
from runtime.options import Options, Run
from runtime.quantise import plane_shapes
from runtime.recorder import LanePicks, Recorder, SelectionStats
from runtime.sampling import Sampler
from runtime.wave import BudgetExceeded, Wave, WaveOptions, padded, until_stop
from sim.flows import flows_of, home_columns
from sim.forecast import static_hbm_bytes, static_host_bytes
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan, Recompute
from sim.spec import DType, ModelSpec
from sim.trace import Trace, WaveTrace
from sim.units import format_bytes

DTYPES = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}


@torch.inference_mode()
def execute(
    plan: Plan,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    options: Options | None = None,
    on_tokens: Callable[[int], None] | None = None,
    captured: Captures | None = None,
) -> Run:
    """Generate after ``prompts``, in waves of the plan's concurrency or as they are admitted, and record it.

    ``on_tokens`` is told after every step how many tokens there are. ``captured`` keeps a job's captured step between calls.

    Raises ValueError for prompts or a decoder that the plan is not for, BudgetExceeded where the KV does not fit.
    """
    options, decoder = options or Options(), as_planned(decoder, plan.setting)
    _require_runnable(plan, decoder, options)
    require_prompts(plan, prompts)
    tell = on_tokens or _ignore
    captured, replays = captured or Captures(), captures(plan, decoder, options)
    if plan.setting.admission is Admission.CONTINUOUS:
        if replays:
            return run_admitted(captured.paged(plan, decoder, len(prompts)), prompts, options, tell)
        return run_continuously(plan, decoder, prompts, options, tell)
    size, waves, tokens = plan.setting.concurrency, list[_WaveRun](), plan.setting.workload.output_tokens
    for at in range(0, len(prompts), size):
        wave = prompts[at : at + size]

        def tell_step(row: int, before: int = at * tokens, sequences: int = len(wave)) -> None:
            tell(before + sequences * (row + 1))

        if replays:
            waves.append(_run_captured(captured.wave(plan, decoder, len(wave)), wave, options, tell_step))
        else:
            waves.append(_run_wave(plan, decoder, wave, options, at, tell_step))
    return _joined(plan, waves, options)


def _ignore(_: int) -> None:
    """Nobody wants to know how far the run has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveRun:
    completions: list[tuple[int, ...]]
    trace: WaveTrace
    kv_allocated_bytes: int
    stats: tuple[SelectionStats, ...]
    picks: LanePicks
    logits: Tensor | None


def _run_wave(
    plan: Plan,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Options,
    at: int,
    on_step: Callable[[int], None],
) -> _WaveRun:
    steps = plan.setting.workload.output_tokens
    recorder = Recorder(plan, Clock(decoder.device), options.record)
    wave = Wave(
        plan,
        decoder,
        padded(prompts, plan.setting.workload.prompt_tokens, decoder.device),
        recorder,
        options=WaveOptions(
            per_head=options.per_head, published_ranges=options.published_ranges, overlap=options.overlap
        ),
    )
    recorder.tally = wave.cache.tally
    stop_tokens = decoder.config.stop_tokens if options.stop else ()
    places = (options.places or range(at + len(prompts)))[at : at + len(prompts)]
    generated = wave.run(Sampler(options.sampling, places, steps, decoder.device), stop_tokens, on_step)
    lanes = wave.lanes.count
    _require_budget(plan, len(prompts) * recorder.occupancy(lanes).hbm.max(), "needed")
    return _WaveRun(
        completions=[until_stop(row, stop_tokens) for row in generated.tolist()],
        trace=recorder.trace(len(prompts), lanes),
        kv_allocated_bytes=wave.cache.on_device.size_bytes,
        stats=recorder.stats(lanes),
        picks=recorder.picks(),
        logits=torch.stack(recorder.logits, dim=1) if options.record.logits else None,
    )


def _run_captured(
    wave: GraphWave, prompts: Sequence[Sequence[int]], options: Options, on_step: Callable[[int], None]
) -> _WaveRun:
    plan, decoder = wave.plan, wave.decoder
    recorder = Recorder(plan, Clock(decoder.device), recorded(plan, options.record), captured=True)
    stop_tokens = decoder.config.stop_tokens if options.stop else ()
    prepared = padded(prompts, plan.setting.workload.prompt_tokens, decoder.device)
    generated = run_wave(wave, prepared, recorder, stop_tokens, on_step)
    return _WaveRun(
        completions=[until_stop(row, stop_tokens) for row in generated.tolist()],
        trace=recorder.trace(len(prompts), len(prompts)),
        kv_allocated_bytes=wave.slots.kv_bytes,
        stats=recorder.stats(len(prompts)),
        picks=[],
        logits=None,
    )


def _joined(plan: Plan, waves: list[_WaveRun], options: Options) -> Run:
    """Waves side by side, in the order of their prompts."""
    trace = Trace(
        source="measured",
        output_tokens=plan.setting.workload.output_tokens,
        static_hbm_bytes=static_hbm_bytes(plan.setting),
        static_host_bytes=static_host_bytes(plan.setting),
        waves=tuple(wave.trace for wave in waves),
    )
    logits = [wave.logits for wave in waves if wave.logits is not None]
    return Run(
        completions=tuple(tokens for wave in waves for tokens in wave.completions),
        trace=trace,
        kv_allocated_bytes=max(wave.kv_allocated_bytes for wave in waves),
        stats=tuple(wave.stats for wave in waves),
        picks=_joined_picks(waves) if options.record.picks else None,
        logits=torch.cat(logits) if logits else None,
    )


def _joined_picks(waves: list[_WaveRun]) -> LanePicks:
    """As long as the wave that ended first."""
    steps = zip(*(wave.picks for wave in waves), strict=False)
    return [[list(chain.from_iterable(layer)) for layer in zip(*step, strict=True)] for step in steps]


def require_prompts(plan: Plan, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for prompts that ``plan`` is not for."""
    if not prompts:
        raise ValueError("prompts, there are none: give at least one")
    longest, vocab = plan.setting.workload.prompt_tokens, plan.setting.model.vocab
    for place, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt {place}, {len(prompt)} tokens, must have 1 to the plan's {longest}")
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ValueError(f"prompt {place}, token {wrong}, must lie in [0, {vocab}), the model's vocabulary")


def _require_runnable(plan: Plan, decoder: Decoder, options: Options) -> None:
    setting = plan.setting
    require_same_model(setting.model, decoder.spec)
    if decoder.dtype is not DTYPES[setting.dtype]:
        raise ValueError(f"weights in {decoder.dtype}, must be in the plan's {setting.dtype}")
    if setting.guess_hits is not None:
        raise ValueError(f"guess_hits={setting.guess_hits}, the runtime fetches once the query is known: use null")
    if options.per_head and setting.recompute is not Recompute.NONE:
        raise ValueError(f"per_head=True with recompute={setting.recompute}, needs recompute=none")
    window = decoder.config.window
    if window is not None and setting.workload.cached_tokens > window:
        raise ValueError(
            f"{setting.workload.cached_tokens} cached tokens, must fit the checkpoint's window of {window}"
        )
    for kv_format in (setting.kv_format.gpu, setting.kv_format.host):
        plane_shapes(kv_format, decoder.spec.kv_heads, decoder.spec.head_dim, decoder.dtype)
    homes = home_columns(plan.homes)
    if setting.admission is Admission.WAVES:
        expected = occupancy_of(plan, homes, flows_of(plan, homes)).hbm.max()
        _require_budget(plan, setting.concurrency * expected, "planned")


def require_same_model(planned: ModelSpec, loaded: ModelSpec) -> None:
    """Raise ValueError where ``loaded`` is of another shape; names and sources may differ."""
    for name in ModelSpec.__dataclass_fields__:
        want, got = getattr(planned, name), getattr(loaded, name)
        if name not in ("name", "source") and want != got:
            raise ValueError(f"checkpoint {loaded.name} has {name}={got}, the plan's {planned.name} has {want}")


def _require_budget(plan: Plan, held_bytes: float, when: str) -> None:
    budget = plan.setting.kv_budget_bytes
    if held_bytes > budget:
        raise BudgetExceeded(
            f"KV of {format_bytes(held_bytes)} is {when}, the plan's budget is {format_bytes(budget)}: "
            "solve again with what this run recorded, or for less concurrency"
        )

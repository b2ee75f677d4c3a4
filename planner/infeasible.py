"""From a request that no plan fits to an error that says why, in one line, and what to change."""

from dataclasses import replace

from planner.optimum import optimum
from planner.options import concurrencies
from planner.remedy import suggestions_for
from planner.request import Objective, Request
from planner.shortage import memory_shortage, with_more
from planner.solution import Blame, Infeasible, Shortage, Suggestion, Tier
from sim.kv import KvFormat, kv_layer_bytes
from sim.spec import WeightFormat
from sim.units import format_bytes, format_per_s, format_seconds

_TIERS = {Tier.HBM: "HBM", Tier.HOST: "host memory"}


def infeasible(request: Request, *, suggest: bool = True) -> Infeasible:
    """The error for ``request``, which has no plan; ``suggest`` also solves for changes that fit."""
    shortage = diagnose(request)
    if suggest:
        shortage = replace(shortage, suggestions=suggestions_for(request, shortage))
    return Infeasible(_message(request, shortage, suggest), shortage)


def diagnose(request: Request) -> Shortage:
    """Which memory is short, or that it is time; without suggestions."""
    short = memory_shortage(request)
    if short is not None:
        return short
    if request.max_tpot_s is not None and optimum(replace(request, max_tpot_s=None)) is not None:
        return Shortage(blame=Blame.LATENCY, blamed_bytes=0, tier=None, step=None, missing_bytes=0)
    return _short_by_tokens(request)


def _short_by_tokens(request: Request) -> Shortage:
    """Whole tokens, and what couples the steps, take the last bytes: so much of what seems to be there is not to be had."""
    token_bytes = request.model.layers * kv_layer_bytes(request.model, request.dtype, KvFormat.NATIVE)
    less_bytes = token_bytes * concurrencies(request)[-1]
    while less_bytes < request.machine.gpu.hbm_bytes:
        for tier in (Tier.HOST, Tier.HBM):
            short = memory_shortage(_with_less(request, tier, less_bytes))
            if short is not None:
                return replace(short, step=short.step or 0, missing_bytes=less_bytes)
        less_bytes *= 2
    return Shortage(blame=Blame.KV, blamed_bytes=0, tier=Tier.HBM, step=0, missing_bytes=less_bytes)


def _with_less(request: Request, tier: Tier, less_bytes: int) -> Request:
    usable = request.machine.host.usable_bytes if tier is Tier.HOST else request.kv_budget_bytes or less_bytes
    return with_more(request, tier, -min(less_bytes, usable))


def _message(request: Request, shortage: Shortage, suggest: bool) -> str:
    why = _latency_text(request) if shortage.tier is None else _memory_text(request, shortage, shortage.tier)
    return f"{why}; {_changes_text(request, shortage.suggestions)}" if suggest else why


def _latency_text(request: Request) -> str:
    limit_s = request.max_tpot_s or 0.0
    best = optimum(replace(request, max_tpot_s=None, objective=Objective.TPOT))
    quickest_s = None if best is None else best.found.priced.outcome.tpot_s
    quickest = "" if quickest_s is None else f", the quickest plan takes {format_seconds(quickest_s)}"
    return f"no plan of {_subject(request)} keeps to {format_seconds(limit_s)} per output token{quickest}"


def _memory_text(request: Request, shortage: Shortage, tier: Tier) -> str:
    sequences = concurrencies(request)[-1]
    takers = {
        Blame.WEIGHTS: "weights take",
        Blame.WORKSPACE: f"the workspace of {_count(sequences)} takes",
        Blame.KV: f"KV of {_count(sequences)} takes up to",
    }
    when = {None: "before the first step", 0: "from the prefill on"}.get(shortage.step, f"from step {shortage.step} on")
    return (
        f"{_subject(request)} does not fit: {_TIERS[tier]} is {format_bytes(shortage.missing_bytes)} short {when}; "
        f"{takers[shortage.blame]} {format_bytes(shortage.blamed_bytes)}"
    )


def _subject(request: Request) -> str:
    weights = "" if request.weight_format is WeightFormat.NATIVE else f", {request.weight_format} weights"
    return f"{request.model.name} ({request.dtype}{weights}) on {request.machine.name}"


def _count(sequences: int) -> str:
    return f"{sequences:,} sequences at once" if sequences > 1 else "a single sequence"


def _changes_text(request: Request, suggestions: tuple[Suggestion, ...]) -> str:
    if not suggestions:
        return "no single change of format, length, memory or card was found to help"
    return f"what fits: {', '.join(_suggestion_text(request, one) for one in suggestions)}"


def _suggestion_text(request: Request, suggestion: Suggestion) -> str:
    link = suggestion.request.machine.gpu.link.name
    other = "" if link == request.machine.gpu.link.name else f"{link}, "
    return f"{suggestion.words} ({other}{format_per_s(suggestion.tokens_per_s)} tokens/s)"

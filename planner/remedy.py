"""The nearest changes after which a plan fits. Each is solved for before it is suggested."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from math import ceil

from planner.optimum import optimum
from planner.request import Objective, Request
from planner.shortage import memory_shortage, with_more
from planner.solution import Blame, Shortage, Suggestion, Tier
from sim import catalogue
from sim.kv import KvFormat, require_kv_format
from sim.profile_files import profile_for
from sim.spec import GpuSpec, WeightFormat
from sim.units import GIB, MILLI

Change = tuple[str, Request]

SOLVES_PER_KIND = 2  # of each kind of change, nearest first, so many are solved at most
PATIENCE_S = 2.0  # no further kind is looked at after so long
WIDER = (1.0, 2.0)  # multiples of what is missing; the least is found step by step, so it may not suffice
LARGEST_SHARES = (1.0, 3 / 4)  # of the largest number that seems to fit


def suggestions_for(request: Request, shortage: Shortage) -> tuple[Suggestion, ...]:
    """One suggestion of each kind of change that can help, the least one of that kind; what matters most comes first."""
    started = time.perf_counter()
    found: dict[str, Suggestion] = {}
    for changes in _kinds(request, shortage):
        if time.perf_counter() - started > PATIENCE_S:
            break
        possible = (change for change in changes if memory_shortage(change[1]) is None)
        solved = (_solved(*change) for change in islice(possible, SOLVES_PER_KIND))
        first = next((one for one in solved if one is not None), None)
        if first is not None:
            found.setdefault(first.words, first)
    return tuple(found.values())


def _solved(words: str, changed: Request) -> Suggestion | None:
    best = optimum(changed)
    if best is None:
        return None
    return Suggestion(words=words, request=changed, tokens_per_s=best.found.priced.outcome.tokens_per_s)


def _kinds(request: Request, shortage: Shortage) -> Iterator[Iterable[Change]]:
    if shortage.blame is Blame.LATENCY:
        yield from (_slower(request), _at_will(request), _weight_formats(request), _quicker_cards(request))
        return
    yield from (_fewer_at_once(request), _more_hbm(request, shortage), _weight_formats(request))
    if shortage.blame is not Blame.WEIGHTS:
        yield _kv_formats(request)
    yield _more_host(request, shortage)
    yield from (_larger_cards(request, same_link=True), _larger_cards(request, same_link=False))
    yield _smaller_batch(request)
    if shortage.blame is not Blame.WEIGHTS:
        yield _shorter(request)


def _fewer_at_once(request: Request) -> Iterator[Change]:
    """In waves; only where the user fixed how many run at once, else one at a time has been tried."""
    for sequences in _largest(request.concurrency or 1, lambda number: replace(request, concurrency=number)):
        yield f"--concurrency {sequences}", replace(request, concurrency=sequences)


def _smaller_batch(request: Request) -> Iterator[Change]:
    """Where all sequences must run at once, fewer of them."""

    def with_batch(batch: int) -> Request:
        return replace(request, workload=replace(request.workload, batch=batch), concurrency=batch)

    if request.concurrency == request.workload.batch:
        for batch in _largest(request.workload.batch, with_batch):
            yield f"--batch {batch} --concurrency all", with_batch(batch)


def _kv_formats(request: Request) -> Iterator[Change]:
    for kv_format in (KvFormat.INT8, KvFormat.INT4):
        if kv_format not in request.kv_formats:
            formats = (*request.kv_formats, kv_format)
            yield f"--kv-formats {','.join(formats)}", replace(request, kv_formats=formats)


def _weight_formats(request: Request) -> Iterator[Change]:
    """Smaller ones, the nearest first."""
    now = request.model.weight_bytes(request.dtype, request.weight_format)
    for weight_format in (WeightFormat.INT8, WeightFormat.INT4):
        if request.model.weight_bytes(request.dtype, weight_format) < now:
            yield f"--weight-format {weight_format}", replace(request, weight_format=weight_format)


def _shorter(request: Request) -> Iterator[Change]:
    """Fewer tokens to generate; where even the fewest are too many, a shorter prompt."""
    work = request.workload
    least = 1 if request.max_tpot_s is None and request.objective is not Objective.TPOT else 2

    def with_output(tokens: int) -> Request:
        return replace(request, workload=replace(work, output_tokens=tokens))

    def with_prompt(tokens: int) -> Request:
        return replace(request, workload=replace(work, prompt_tokens=tokens))

    for tokens in _largest(work.output_tokens, with_output, least=least):
        yield f"--output {tokens}", with_output(tokens)
    for tokens in _largest(work.prompt_tokens, with_prompt):
        yield f"--prompt {tokens}", with_prompt(tokens)


def _largest(below: int, changed: Callable[[int], Request], *, least: int = 1) -> Iterator[int]:
    """Numbers from ``least`` to ``below`` - 1 that seem to fit: the largest, then a smaller one to be safe."""
    if below <= least or memory_shortage(changed(least)) is not None:
        return
    fits, fails = least, below
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if memory_shortage(changed(middle)) is None else (fits, middle)
    yield from dict.fromkeys(max(least, int(share * fits)) for share in LARGEST_SHARES)


def _more_host(request: Request, shortage: Shortage) -> Iterator[Change]:
    """In whole GiB."""
    if shortage.tier is not Tier.HOST:
        return
    for share in WIDER:
        enough = with_more(request, Tier.HOST, ceil(share * shortage.missing_bytes))
        gib = ceil(enough.machine.host.dram_bytes / GIB)
        host = replace(request.machine.host, dram_bytes=gib * GIB)
        yield f"--host-gib {gib}", replace(request, machine=replace(request.machine, host=host))


def _more_hbm(request: Request, shortage: Shortage) -> Iterator[Change]:
    """Where the user set how much there is; else a card has what it has."""
    budget, missing = request.kv_budget_bytes, shortage.missing_bytes
    if shortage.tier is not Tier.HBM:
        return
    for share in WIDER if budget is not None else ():
        gib = ceil(((budget or 0) + share * missing) / GIB * 1000) / 1000
        yield f"--kv-budget-gib {gib:g}", replace(request, kv_budget_bytes=round(gib * GIB))
    for share in WIDER if _overrides(request, "hbm_gib") else ():
        gib = ceil((request.machine.gpu.hbm_bytes + share * missing) / GIB)
        gpu = replace(request.machine.gpu, hbm_bytes=gib * GIB)
        yield f"--hbm-gib {gib}", replace(request, machine=replace(request.machine, gpu=gpu))


def _larger_cards(request: Request, *, same_link: bool) -> Iterator[Change]:
    """Cards of the catalogue with more HBM, the smallest first: in the same kind of slot, or in any."""
    now = request.machine.gpu
    larger = (gpu for gpu in catalogue.gpus() if gpu.hbm_bytes > now.hbm_bytes)
    for gpu in sorted(larger, key=lambda gpu: gpu.hbm_bytes):
        if gpu.link.name == now.link.name or not same_link:
            yield from _on_card(request, gpu)


def _quicker_cards(request: Request) -> Iterator[Change]:
    """Cards of the catalogue that read their HBM faster, the slowest first."""
    quicker = (gpu for gpu in catalogue.gpus() if gpu.hbm_bytes_per_s > request.machine.gpu.hbm_bytes_per_s)
    for gpu in sorted(quicker, key=lambda gpu: gpu.hbm_bytes_per_s):
        yield from _on_card(request, gpu)


def _on_card(request: Request, gpu: GpuSpec) -> Iterator[Change]:
    """``request`` on that card, with the user's overrides; nothing if it lacks an arithmetic that is asked for."""
    words = f"--gpu {gpu.name}"
    if _overrides(request, "hbm_gib"):
        return  # the size that the user set would hold for any card
    if _overrides(request, "link_gb_s"):
        gpu = replace(gpu, link=replace(gpu.link, bytes_per_s=request.machine.gpu.link.bytes_per_s))
    machine = replace(request.machine, name=gpu.name, gpu=gpu)
    try:
        for kv_format in request.kv_formats:
            require_kv_format(gpu, kv_format)
        yield words, replace(request, machine=machine, profile=profile_for(machine))
    except ValueError:
        return


def _slower(request: Request) -> Iterator[Change]:
    """The least time per output token that can be had."""
    best = optimum(replace(request, max_tpot_s=None, objective=Objective.TPOT))
    if best is not None and best.found.priced.outcome.tpot_s is not None:
        limit_ms = ceil(best.found.priced.outcome.tpot_s / MILLI * 100) / 100
        yield f"--max-tpot-ms {limit_ms:g}", replace(request, max_tpot_s=limit_ms * MILLI)


def _at_will(request: Request) -> Iterator[Change]:
    if request.concurrency is not None:
        yield "--concurrency auto", replace(request, concurrency=None)


def _overrides(request: Request, name: str) -> bool:
    return any(override.startswith(f"{name}=") for override in request.machine.overrides)

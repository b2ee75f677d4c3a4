"""The discrete choices of a request: which settings there are to compare."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from planner.request import Request
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.footprint import kv_budget_bytes
from sim.kv import KvFormat, KvFormats
from sim.plan import Mechanism, Placement, Recompute, Setting


def concurrencies(request: Request) -> tuple[int, ...]:
    """Sequences at once, most first: one for each number of waves, as even as can be."""
    if request.concurrency is not None:
        return (request.concurrency,)
    batch = request.workload.batch
    return tuple(sorted({-(-batch // waves) for waves in range(1, batch + 1)}, reverse=True))


def resident_settings(request: Request) -> Iterator[Setting]:
    """One for each choice that matters while everything fits HBM: concurrency, attention, format in HBM."""
    for concurrency, attention, kv_format in product(concurrencies(request), _attentions(request), _formats(request)):
        budget = kv_budget(request, concurrency)
        if budget < 0:
            continue
        dense = attention.is_dense
        yield Setting(
            machine=request.machine,
            model=request.model,
            workload=request.workload,
            dtype=request.dtype,
            weight_format=request.weight_format,
            concurrency=concurrency,
            attention=attention,
            access=measured_access(attention.selector),
            kv_format=KvFormats(gpu=kv_format, host=kv_format),
            placement=Placement.RECENT if dense else Placement.RESIDENT,
            fetch_by=Mechanism.COPY_ENGINE if dense else Mechanism.GATHER_KERNEL,
            kv_budget_bytes=budget,
        )


def spilling_settings(setting: Setting, request: Request) -> Iterator[Setting]:
    """The choices that open up when ``setting`` does not fit HBM: placement, host format, recomputation.

    Recomputing nothing is what each recomputation source comes to when no token is homed there. Writing back at birth
    moves and holds more than at eviction, so the search looks at it only where a plan waits for its write-backs.
    """
    dense = setting.attention.is_dense
    placements = (Placement.RECENT,) if dense else (Placement.RESIDENT, Placement.RECENT)
    sources = [Recompute.ACTIVATIONS_HOST, Recompute.ACTIVATIONS_HBM, *([Recompute.TOKENS] if dense else [])]
    for placement, host, source in product(placements, _formats(request), sources):
        formats = KvFormats(gpu=setting.kv_format.gpu, host=host)
        yield replace(setting, placement=placement, kv_format=formats, recompute=source)


def kv_budget(request: Request, concurrency: int, weights_on_host: float = 0.0) -> int:
    """HBM for KV pools when ``concurrency`` sequences run: what is left, or the user's budget if that is less."""
    left = kv_budget_bytes(
        request.machine,
        request.model,
        request.dtype,
        sequences=concurrency,
        prompt_tokens=request.workload.prompt_tokens,
        reserve_bytes=int(request.profile.reserve_bytes),
        weight_format=request.weight_format,
        weights_on_host=weights_on_host,
    )
    return left if request.kv_budget_bytes is None else min(left, request.kv_budget_bytes)


def _attentions(request: Request) -> list[Attention]:
    """Dense, and each selector at the user's bound: keeping more tokens costs more of every resource."""
    sparse = [
        Attention(selector=selector, sparsity=request.max_sparsity)
        for selector in request.selectors
        if selector is not Selector.DENSE and request.max_sparsity
    ]
    return [Attention(selector=Selector.DENSE), *sparse]


def _formats(request: Request) -> tuple[KvFormat, ...]:
    return tuple(dict.fromkeys((KvFormat.NATIVE, *request.kv_formats)))

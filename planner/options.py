"""The discrete choices of a request: which settings there are to compare."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from planner.request import Request
from sim.attention import Attention, Selector
from sim.capture import gains_by_capture
from sim.footprint import kv_budget_bytes, layer_weight_bytes
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Mechanism, Placement, Preemption, Recompute, Setting

STREAMED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the weights, that may be fetched at every step


def concurrencies(request: Request) -> tuple[int, ...]:
    """Sequences at once, most first: one for each number of waves, as even as can be."""
    if request.concurrency is not None:
        return (request.concurrency,)
    batch = request.workload.batch
    return tuple(sorted({-(-batch // waves) for waves in range(1, batch + 1)}, reverse=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Settings that run as many sequences at once and stream the same share of their weights."""

    concurrency: int
    weights_on_host: float


def families(request: Request) -> Iterator[Family]:
    """Every concurrency with all weights in HBM, and with shares of them streamed."""
    for concurrency, share in product(concurrencies(request), STREAMED_SHARES):
        if kv_budget(request, concurrency, share) >= 0 and _host_holds(request, share):
            yield Family(concurrency=concurrency, weights_on_host=share)


def resident_settings(family: Family, request: Request) -> Iterator[Setting]:
    """One for each choice that matters while everything fits HBM: attention and the format of KV in HBM."""
    for attention, kv_format in product(_attentions(request), _formats(request)):
        dense = attention.is_dense
        if family.weights_on_host and attention.selector.recalls:
            continue  # its fetches wait for the query, behind the weights
        yield Setting(
            machine=request.machine,
            model=request.model,
            workload=request.workload,
            dtype=request.dtype,
            weight_format=request.weight_format,
            weights_on_host=family.weights_on_host,
            concurrency=family.concurrency,
            attention=attention,
            access=request.profile.access(attention.selector),
            kv_format=KvFormats(gpu=kv_format, host=kv_format),
            placement=Placement.RECENT if dense else Placement.RESIDENT,
            fetch_by=Mechanism.COPY_ENGINE if dense else Mechanism.GATHER_KERNEL,
            kv_budget_bytes=kv_budget(request, family.concurrency, family.weights_on_host),
        )


def paged_settings(setting: Setting) -> Iterator[Setting]:
    """The same, with sequences admitted as pages fall free instead of in waves."""
    if setting.weights_on_host:
        return
    for preemption in Preemption:
        yield replace(setting, admission=Admission.CONTINUOUS, preemption=preemption)


def assisted_settings(setting: Setting) -> Iterator[Setting]:
    """The same, with the CPU attending to what lies in host memory; it may pay even where all would fit HBM."""
    if setting.attention.is_dense:
        formats = KvFormats(gpu=setting.kv_format.gpu, host=KvFormat.NATIVE)
        yield replace(setting, kv_format=formats, host_attention=True)


def spilling_settings(setting: Setting, request: Request) -> Iterator[Setting]:
    """The choices that open up when ``setting`` does not fit HBM: placement, host format, recomputation.

    Recomputing nothing is what each recomputation source comes to when no token is homed there, but that the runtime
    captures fewer of those: it is a choice of its own where captured steps are quicker. Writing back at birth
    moves and holds more than at eviction, so the search looks at it only where a plan waits for its write-backs.
    """
    dense = setting.attention.is_dense
    placements = (Placement.RECENT,) if dense else (Placement.RESIDENT, Placement.RECENT)
    nothing = [Recompute.NONE] if gains_by_capture(request.profile) else []
    sources = [*nothing, Recompute.ACTIVATIONS_HOST, Recompute.ACTIVATIONS_HBM, *([Recompute.TOKENS] if dense else [])]
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


def _host_holds(request: Request, weights_on_host: float) -> bool:
    """The streamed share of the weights fits host memory."""
    layer_bytes = layer_weight_bytes(request.model, request.dtype, request.weight_format)
    return weights_on_host * request.model.layers * layer_bytes <= request.machine.host.usable_bytes


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

"""What runs between the products of a captured plan's prompts, a kernel each: norms, sums, activations, rotations."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as fn

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.graph.fused import TURNED_TOGETHER
from runtime.graph.products import Sum, Turning, add_norm, gate, place
from runtime.models.decoder import Affine
from sim.passes import OPERATIONS
from sim.recipe import model_of
from sim.spec import ModelSpec

_EPS, _ROWS = 1e-5, 8192  # as the longest pass of a prefill takes
Work = Callable[[Tensor], object]


def cases(scope: Scope) -> Iterator[Case]:
    """By width, each operation of each family once; on a GPU, since a CPU's caches hold what it passes over."""
    seen = set[str]()
    for model in map(model_of, scope.models if scope.on_gpu else ()):
        for name, work, width in _operations(model):
            case = _case(scope, name, work, width)
            if case.case not in seen:
                seen.add(case.case)
                yield case


def _operations(model: ModelSpec) -> Iterator[tuple[str, Work, int]]:
    """What is done to rows, and their width."""
    yield ("layer_norm", _layer_norm, model.hidden) if model.norm_bias else ("norm", _norm, model.hidden)
    yield "sum_norm", partial(_sum_norm, centred=model.norm_bias), model.hidden
    yield "residual", _residual, model.hidden
    yield ("gate", gate, model.intermediate) if model.gated_mlp else ("relu", _relu, model.intermediate)
    if not model.positions:
        yield "turn", partial(_turn, model.head_dim), model.query_dim


def _case(scope: Scope, name: str, work: Work, width: int) -> Case:
    size_bytes = _ROWS * width * scope.dtype.size_bytes
    both = {"gate": (_ROWS, 2 * width), "residual": (2, _ROWS, width), "sum_norm": (2, _ROWS, width)}
    shape = both.get(name, (_ROWS, width))

    def prepare() -> list[Call]:
        return each(work, [scope.normal(*shape) for _ in range(scope.copies(size_bytes))])

    words = f"op={name} rows={_ROWS} width={width} dtype={scope.dtype}"
    return timed(scope, "passes", words, prepare, size_bytes=sum(OPERATIONS[name]) * size_bytes)


def _layer_norm(rows: Tensor) -> Tensor:
    scale = rows[0]
    return fn.layer_norm(rows, rows.shape[-1:], scale, scale, _EPS)


def _norm(rows: Tensor) -> None:
    add_norm(rows, None, Affine(weight=rows[0]), _EPS, torch.empty_like(rows), centred=False, apart=True)


def _sum_norm(both: Tensor, *, centred: bool) -> None:
    rows, added = both
    scale = Affine(weight=rows[0], bias=rows[0] if centred else None)
    add_norm(rows, Sum(parts=added[None], bias=None), scale, _EPS, torch.empty_like(rows), centred=centred, apart=True)


def _residual(both: Tensor) -> Tensor:
    return both[0].add_(both[1])


def _relu(rows: Tensor) -> Tensor:
    return fn.relu(rows, inplace=True)


def _turn(channels: int, rows: Tensor) -> None:
    heads, turning = rows.view(rows.shape[0], -1, channels), _turning(channels, rows.device)
    place(heads, heads.shape[1], _positions(rows.shape[0], rows.device), turning, None, at_once=TURNED_TOGETHER)


@cache
def _turning(channels: int, device: torch.device) -> Turning:
    return Turning(frequencies=torch.ones(channels // 2, device=device), magnitude=1.0, eps=_EPS)


@cache
def _positions(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)

"""What runs between a prefill's products, in the decoder's own operations: norms, residual sums, activations, rotations."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional as fn

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.models.decoder import rms_norm
from runtime.models.rope import rotate
from sim.passes import OPERATIONS, activation_of, norm_of
from sim.recipe import model_of
from sim.spec import ModelSpec

_EPS, _ROWS = 1e-5, 8192  # as a pass of a prefill takes
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
    yield norm_of(model), _layer_norm if model.norm_bias else _rms_norm, model.hidden
    yield "residual", _residual, model.hidden
    yield activation_of(model), _gated if model.gated_mlp else _relu, model.intermediate
    if not model.positions:
        yield "rotation", lambda rows: _rotated(model, rows), model.query_dim


def _case(scope: Scope, name: str, work: Work, width: int) -> Case:
    size_bytes = _ROWS * width * scope.dtype.size_bytes
    shape = {"silu": (_ROWS, 2 * width), "residual": (2, _ROWS, width)}.get(name, (_ROWS, width))

    def prepare() -> list[Call]:
        return each(work, [scope.normal(*shape) for _ in range(scope.copies(size_bytes))])

    words = f"op={name} rows={_ROWS} width={width} dtype={scope.dtype}"
    return timed(scope, "passes", words, prepare, size_bytes=sum(OPERATIONS[name]) * size_bytes)


def _layer_norm(rows: Tensor) -> Tensor:
    scale = rows[0]
    return fn.layer_norm(rows, rows.shape[-1:], scale, scale, _EPS)


def _rms_norm(rows: Tensor) -> Tensor:
    return rms_norm(rows, rows[0], _EPS)


def _residual(both: Tensor) -> Tensor:
    return both[0].add_(both[1])


def _relu(rows: Tensor) -> Tensor:
    return fn.relu(rows, inplace=True)


def _gated(rows: Tensor) -> Tensor:
    gate, value = rows.chunk(2, dim=-1)
    return fn.silu(gate).mul_(value)


def _rotated(model: ModelSpec, rows: Tensor) -> Tensor:
    heads = rows.view(1, rows.shape[0], model.heads, model.head_dim)
    angles = heads[:, :, :1]
    return rotate(heads, angles, angles)

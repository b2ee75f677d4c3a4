"""What runs between a prefill's products, in the decoder's own operations: norms, residual sums, activations, rotations."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional as fn

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.models.decoder import rms_norm
from runtime.models.rope import rotate
from sim.layer import TURN_PASSES, activation_passes, norm_passes
from sim.recipe import model_of
from sim.spec import ModelSpec

_EPS, _ROWS = 1e-5, 8192  # as a pass of a prefill takes
Work = Callable[[Tensor], object]


def cases(scope: Scope) -> Iterator[Case]:
    """By width, each operation of each family once; on a GPU, since a CPU's caches hold what it passes over."""
    seen = set[str]()
    for model in map(model_of, scope.models if scope.on_gpu else ()):
        for name, work, width, entries in _operations(model):
            case = _case(scope, name, work, width, entries)
            if case.case not in seen:
                seen.add(case.case)
                yield case


def _operations(model: ModelSpec) -> Iterator[tuple[str, Work, int, int]]:
    """What is done to rows, their width, and how often each of their entries is read or written."""
    by_layer, gated, width = model.norm_bias, model.gated_mlp, model.hidden
    yield ("layer_norm" if by_layer else "rms_norm", _layer_norm if by_layer else _rms_norm, width, norm_passes(model))
    yield "residual", _residual, width, 3
    yield "silu" if gated else "relu", _gated if gated else _relu, model.intermediate, activation_passes(model)
    if not model.positions:
        yield "rotation", lambda rows: _rotated(model, rows), model.query_dim, TURN_PASSES


def _case(scope: Scope, name: str, work: Work, width: int, entries: int) -> Case:
    size_bytes = _ROWS * width * scope.dtype.size_bytes
    shape = {"silu": (_ROWS, 2 * width), "residual": (2, _ROWS, width)}.get(name, (_ROWS, width))

    def prepare() -> list[Call]:
        return each(work, [scope.normal(*shape) for _ in range(scope.copies(size_bytes))])

    words = f"op={name} rows={_ROWS} width={width} entries={entries} dtype={scope.dtype}"
    return timed(scope, "passes", words, prepare, size_bytes=entries * size_bytes)


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

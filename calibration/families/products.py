"""Matrix products as a layer makes them: the runtime's own for few rows, the library's for many."""

from collections.abc import Iterator

from calibration.families.base import Case, Scope, each, timed
from calibration.recipe import model_of
from calibration.timer import Call
from runtime.graph.products import linear
from runtime.graph.step import Tilings
from runtime.models.decoder import Affine
from sim.spec import ModelSpec

FEW = (1, 4, 16, 32, 64, 128)
MANY = (256, 1024, 4096)


def cases(scope: Scope) -> Iterator[Case]:
    """Every matrix of every model by rows; the largest once more by many rows, as a prefill has them."""
    seen = set[tuple[int, int]]()
    for model in map(model_of, scope.models):
        shapes = [shape for shape in _shapes(model) if shape not in seen]
        seen |= set(shapes)
        for number, (inputs, outputs) in enumerate(shapes):
            many = scope.some(MANY) if number == 0 else ()
            for rows in (*scope.some(FEW), *many):
                yield _case(scope, rows, inputs, outputs, biased=model.mlp_bias)


def _shapes(model: ModelSpec) -> list[tuple[int, int]]:
    up = (2 if model.gated_mlp else 1) * model.intermediate
    qkv = model.query_dim + 2 * model.kv_dim
    return [
        (model.hidden, qkv),
        (model.query_dim, model.hidden),
        (model.hidden, up),
        (model.intermediate, model.hidden),
    ]


def _case(scope: Scope, rows: int, inputs: int, outputs: int, *, biased: bool) -> Case:
    weight_bytes = inputs * outputs * scope.dtype.size_bytes

    def prepare() -> list[Call]:
        x, tiling = scope.normal(rows, inputs), Tilings().qkv
        bias = scope.normal(outputs) if biased else None
        weights = [Affine(weight=scope.normal(outputs, inputs), bias=bias) for _ in range(scope.copies(weight_bytes))]
        return each(lambda weight: linear(x, weight, tiling), weights)

    words = f"rows={rows} inputs={inputs} outputs={outputs} dtype={scope.dtype}"
    moved = weight_bytes + rows * (inputs + outputs) * scope.dtype.size_bytes
    return timed(scope, "product", words, prepare, size_bytes=moved, flops=2.0 * rows * inputs * outputs)

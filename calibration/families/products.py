"""Matrix products as a layer makes them: the runtime's own for few rows, the library's for many."""

from collections.abc import Iterator
from dataclasses import replace

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.graph.products import linear, partial_linear
from runtime.graph.step import Tilings
from runtime.models.decoder import Affine
from sim.gemms import layer_matrices
from sim.recipe import model_of

FEW = (1, 32, 16, 128, 64)
BETWEEN, FEWEST = 96, 4  # where cuBLAS takes other kernels than for 64 and 128 rows, and for 16 of wide matrices
MANY = (256, 512, 2048)
WIDEST = (256, 1024, 4096)
_SHORT_S = 0.01


def cases(scope: Scope) -> Iterator[Case]:
    """Every matrix of every model by rows of decode steps; by many rows, as prompts have them, on a GPU all of them if there is
    time, else each model's first one.
    """
    seen = set[tuple[int, int]]()
    for model in map(model_of, scope.models):
        for role, shape in layer_matrices(model).items():
            if shape in seen:
                continue
            seen.add(shape)
            every = scope.on_gpu and scope.thorough
            many = MANY if every else scope.some(WIDEST) if role == "qkv" else ()
            few = (*FEW[1:], BETWEEN, *([FEWEST] if role in ("up", "down") else [])) if every else scope.some(FEW)
            for rows in (*few, *many):
                yield _case(scope, rows, role, shape, biased=model.mlp_bias)


def _case(scope: Scope, rows: int, role: str, shape: tuple[int, int], *, biased: bool) -> Case:
    inputs, outputs = shape
    weight_bytes = inputs * outputs * scope.dtype.size_bytes

    def prepare() -> list[Call]:
        x, tiling = scope.normal(rows, inputs), getattr(Tilings(), role)
        bias = scope.normal(outputs) if biased else None
        weights = [Affine(weight=scope.normal(outputs, inputs), bias=bias) for _ in range(scope.copies(weight_bytes))]
        multiply = partial_linear if role in ("out", "down") else linear
        return each(lambda weight: multiply(x, weight, tiling), weights)

    words = f"rows={rows} inputs={inputs} outputs={outputs} dtype={scope.dtype} as={role}"
    if rows >= WIDEST[1]:  # before clocks fall: what a power limit leaves is told by whole prefills
        scope = replace(scope, budget_s=min(scope.budget_s, _SHORT_S))
    moved = weight_bytes + rows * (inputs + outputs) * scope.dtype.size_bytes
    return timed(scope, "product", words, prepare, size_bytes=moved, flops=2.0 * rows * inputs * outputs)

"""A layer's matrix products by rows: curves for recomputation and prefills, decode steps as they were measured."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, TypeVar, cast

import numpy as np

from sim.capture import FUSED_ROWS, is_captured
from sim.cost import Amount, CostModel, Pieces
from sim.counts import Column
from sim.footprint import PREFILL_CHUNK_TOKENS
from sim.plan import Setting
from sim.spec import DType, ModelSpec, WeightFormat, weight_bytes_per_parameter

Rows = TypeVar("Rows", int, Column)
_TOGETHER = {"mlp": ("up", "down")}  # priced as one
# Of a captured step's products, as ``runtime.graph.step.Tilings`` has them: columns of a program, and parts of its sums.
TILE_COLUMNS, TILE_PARTS = 64, {"qkv": 1, "out": 2, "up": 1, "down": 2}
_FEW_ROWS, _ROWS_TOGETHER = 256, 128  # of a prompt's products: few run as they are, more in multiples


def layer_matrices(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each; gate and up are one."""
    return {
        "qkv": (model.hidden, model.query_dim + 2 * model.kv_dim),
        "out": (model.query_dim, model.hidden),
        "up": (model.hidden, (2 if model.gated_mlp else 1) * model.intermediate),
        "down": (model.intermediate, model.hidden),
    }


def filled_share(cost: CostModel, setting: Setting, rows: int) -> float:
    """Multiprocessors for which a captured step's products have programs, in the mean over a layer's weights; all of them where
    the rows are so many that the products are cuBLAS's.
    """
    if rows > FUSED_ROWS:
        return 1.0
    shapes = layer_matrices(setting.model)
    programs = {name: ceil(outputs / TILE_COLUMNS) * TILE_PARTS[name] for name, (_, outputs) in shapes.items()}
    weights = {name: inputs * outputs for name, (inputs, outputs) in shapes.items()}
    filled = sum(min(1.0, programs[name] / cost.machine.gpu.sm_count) * weights[name] for name in shapes)
    return filled / sum(weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGemms:
    """Matrix products by rows: those of a layer, a whole ``layer`` together, and the ``head`` that ends a step."""

    qkv: Pieces
    kv: Pieces
    out: Pieces
    mlp: Pieces
    layer: Pieces
    head: Pieces

    @property
    def of_layer(self) -> dict[str, Pieces]:
        """Those that a layer's new rows pass through."""
        return {"qkv": self.qkv, "out": self.out, "mlp": self.mlp}

    @classmethod
    def of(cls, cost: CostModel, setting: Setting) -> "LayerGemms":
        return _gemms(cost, setting.model, setting.dtype, setting.weight_format, captured=is_captured(setting))

    @classmethod
    def wide(cls, cost: CostModel, setting: Setting) -> "LayerGemms":
        """Of weights as they are multiplied, however they are stored."""
        return _gemms(cost, setting.model, setting.dtype, WeightFormat.NATIVE, captured=is_captured(setting))


@lru_cache(maxsize=64)
def _gemms(cost: CostModel, model: ModelSpec, dtype: DType, stored: WeightFormat, *, captured: bool) -> LayerGemms:
    """Captured steps widen by a kernel of the runtime's, others by torch's."""
    shapes = layer_matrices(model)
    up_and_down = shapes["up"][1] + shapes["down"][0]  # columns of as many weights
    layer_columns = shapes["qkv"][1] + shapes["out"][0] + up_and_down

    def product(inputs: int, outputs: int, products: int = 1) -> Pieces:
        return cost.gemm(inputs, outputs, dtype, stored, products=products, one_pass=captured)

    return LayerGemms(
        qkv=product(*shapes["qkv"]),
        kv=_free_at_zero(product(model.hidden, 2 * model.kv_dim)),
        out=product(*shapes["out"]),
        mlp=product(model.hidden, up_and_down, 2),
        layer=_free_at_zero(product(model.hidden, layer_columns, 4)),
        head=cost.gemm(model.embedding_dim, model.vocab, dtype, type(stored).NATIVE),
    )


def _free_at_zero(pieces: Pieces) -> Pieces:
    """The same cost, none at all where there is nothing to do."""
    return Pieces(pieces=pieces.pieces, free_at_zero=True)


def decoded_products_s(cost: CostModel, setting: Setting, rows: int) -> dict[str, float]:
    """A layer's products of a decode step of ``rows``."""
    return _products_s(cost, setting, float(rows))


def prompt_products_s(cost: CostModel, setting: Setting, rows: Column) -> dict[str, Column]:
    """The same of prompts, by ``rows`` that pass through a layer; more than a chunk of them go one chunk after the other."""
    chunks, multiplied = np.maximum(rows / PREFILL_CHUNK_TOKENS, 1.0), np.minimum(rows, float(PREFILL_CHUNK_TOKENS))
    if is_captured(setting):
        multiplied = product_rows(multiplied)
    return {name: chunks * seconds for name, seconds in _products_s(cost, setting, multiplied).items()}


def _products_s(cost: CostModel, setting: Setting, rows: Amount) -> dict[str, Amount]:
    """A layer's products as measured; where weights are widened first, with what that takes by its curve."""
    wide = LayerGemms.wide(cost, setting).of_layer
    curved_s = {name: _at(curve, rows) for name, curve in wide.items()}
    found: dict[str, Amount] = {name: curved_s[name] * _as_measured(cost, setting, name, rows) for name in wide}
    if setting.weight_format is not WeightFormat.NATIVE:
        stored = LayerGemms.of(cost, setting).of_layer
        found = {name: seconds + (_at(stored[name], rows) - curved_s[name]) for name, seconds in found.items()}
    return found


def _at(curve: Pieces, rows: Amount) -> Amount:
    seconds: Any = curve.at(rows) if isinstance(rows, np.ndarray) else curve.at_one(rows)
    return cast(Amount, seconds)


def product_rows(rows: Rows) -> Rows:
    """Over how many rows a captured plan's prompts go through a product that has so many: a few as they are, more of them made
    up to a multiple, at which cuBLAS is quicker (on an H200 Llama-3-8B's gate and up take 271 us at 448 rows, 165 at 512).
    """
    made_up: Any = rows + (rows > _FEW_ROWS) * (-rows % _ROWS_TOGETHER)
    return cast(Rows, made_up)


def least_products_s(cost: CostModel, setting: Setting, rows: float) -> float:
    """What a layer's products of so many rows, or of as many in the mean, never fall below, all together: where weights are
    widened first, of that less all that may be found read, and of products that read everything.
    """
    least = least_as_measured(cost, setting.model, setting.dtype)
    stored, wide = LayerGemms.of(cost, setting).of_layer, LayerGemms.wide(cost, setting).of_layer
    return sum(least * wide[name].at_one(rows) + stored[name].pieces[0][0] - wide[name].pieces[0][0] for name in stored)


def least_read_s(cost: CostModel, model: ModelSpec, dtype: DType, stored: WeightFormat) -> float:
    """The same of their reading alone; of widening alone where weights are widened first, whose products may find them read."""
    entries = sum(inputs * outputs for inputs, outputs in layer_matrices(model).values())
    wide_bytes = entries * weight_bytes_per_parameter(dtype, WeightFormat.NATIVE)
    read_s = wide_bytes / (cost.hbm_bytes_per_s * cost.profile.gemm_hbm_efficiency)
    least = least_as_measured(cost, model, dtype)
    if stored is WeightFormat.NATIVE:
        return least * read_s
    moved_bytes = wide_bytes + entries * weight_bytes_per_parameter(dtype, stored)
    widened_s = min(cost.weight_widening_s(moved_bytes), cost.widening_s(moved_bytes))
    return max(0.0, widened_s - (1 - least) * read_s)


def least_as_measured(cost: CostModel, model: ModelSpec, dtype: DType) -> float:
    """What no product falls below, as a share of its curve: the least of any matrix."""
    rows = np.array([1.0, *(n for one in cost.profile.products for n in one.rows)])
    shapes = layer_matrices(model).values()
    return min(1.0, *(float(cost.as_measured(*shape, rows, dtype).min()) for shape in shapes))


def _as_measured(cost: CostModel, setting: Setting, name: str, rows: Amount) -> Amount:
    """Of one or two matrices together, how many times as long as their curves."""
    shapes, dtype = layer_matrices(setting.model), setting.dtype
    if name not in _TOGETHER or not cost.profile.products:
        return cost.as_measured(*shapes[_TOGETHER.get(name, (name,))[0]], rows, dtype)
    curved_s: Any = 0.0
    measured_s: Any = 0.0
    for inputs, outputs in (shapes[matrix] for matrix in _TOGETHER[name]):
        seconds = _at(cost.gemm(inputs, outputs, dtype, WeightFormat.NATIVE), rows)
        curved_s += seconds
        measured_s += seconds * cost.as_measured(inputs, outputs, rows, dtype)
    times: Amount = measured_s / curved_s
    return times

"""A layer's matrix products by rows: curves for recomputation and prefills, decode steps as they were measured."""

from dataclasses import dataclass
from functools import lru_cache

from sim.capture import is_captured
from sim.cost import CostModel, Pieces
from sim.plan import Setting
from sim.spec import DType, ModelSpec, WeightFormat

_TOGETHER = {"mlp": ("up", "down")}  # priced as one


def layer_matrices(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each; gate and up are one."""
    return {
        "qkv": (model.hidden, model.query_dim + 2 * model.kv_dim),
        "out": (model.query_dim, model.hidden),
        "up": (model.hidden, (2 if model.gated_mlp else 1) * model.intermediate),
        "down": (model.intermediate, model.hidden),
    }


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
    """A layer's products of a decode step of ``rows``: as measured, unless weights are widened first."""
    curved_s = {name: curve.at_one(rows) for name, curve in LayerGemms.of(cost, setting).of_layer.items()}
    if setting.weight_format is not WeightFormat.NATIVE:
        return curved_s
    model, dtype = setting.model, setting.dtype
    return {name: seconds * _as_measured(cost, model, dtype, name, rows) for name, seconds in curved_s.items()}


def least_as_measured(cost: CostModel, model: ModelSpec, dtype: DType, most_rows: int) -> float:
    """What no product of a decode step of up to ``most_rows`` falls below, as a share of its curve: the least of any matrix."""
    rows = {1, most_rows, *(n for one in cost.profile.products for n in one.rows if n <= most_rows)}
    shapes = layer_matrices(model).values()
    return min(1.0, *(cost.as_measured(*shape, n, dtype) for shape in shapes for n in rows))


def _as_measured(cost: CostModel, model: ModelSpec, dtype: DType, name: str, rows: int) -> float:
    """Of one or two matrices together, how many times as long as their curves."""
    if not cost.profile.products:
        return 1.0
    curved_s = measured_s = 0.0
    shapes = layer_matrices(model)
    for inputs, outputs in (shapes[matrix] for matrix in _TOGETHER.get(name, (name,))):
        seconds = cost.gemm(inputs, outputs, dtype, WeightFormat.NATIVE).at_one(rows)
        curved_s += seconds
        measured_s += seconds * cost.as_measured(inputs, outputs, rows, dtype)
    return measured_s / curved_s

"""What runs between matrix products that are not fused: how often each entry is read or written, and by what kind of kernel."""

from typing import NamedTuple

from sim.attention import PAGE_TOKENS
from sim.cost import CostModel
from sim.spec import DType, ModelSpec


class Passes(NamedTuple):
    """Reads and writes of entries: those that are all that their kernel does (sums, ReLU, copies), and those of kernels that
    are held up by other things as well (norms, rotations, gates: reductions, float32, strides).
    """

    plain: float = 0.0
    busy: float = 0.0

    def seconds(self, cost: CostModel, dtype: DType, entries: float = 1.0) -> float:
        """Of so many ``entries``."""
        size_bytes = entries * dtype.size_bytes
        return cost.elementwise_s(self.plain * size_bytes) + cost.norm_s(self.busy * size_bytes)


# Of an entry. A root mean square is of float32 (wide, normed, narrow, scaled); an unfused rotation exchanges halves, then two
# products and their sum; a gate's other half is multiplied after it. The last two are what kernels of an H100 and an H200
# take beside layer norms, rather than reads and writes alone, which are 9 and 5.
OPERATIONS = {
    "layer_norm": Passes(busy=2),
    "rms_norm": Passes(busy=12),
    "rotation": Passes(busy=14),
    "silu": Passes(busy=6.5),
    "relu": Passes(plain=2),
    "residual": Passes(plain=3),
    "copy": Passes(plain=2),
    "scatter": Passes(busy=6),  # to rows that a tensor lists, on an H200
    "digest": Passes(busy=21),  # a key's, of an H200's least and greatest by page, by torch
    # One kernel each, as a captured plan's prompts pass: what is read, and written; sines and cosines take an H200 a fifth more.
    "norm": Passes(plain=2),
    "sum_norm": Passes(plain=4),
    "turn": Passes(plain=2.4),
    "gate": Passes(plain=3),
    "digest_once": Passes(plain=1 + 2 / PAGE_TOKENS),  # one kernel: of a page's keys two are written
}


def norm_of(model: ModelSpec) -> str:
    """Which of the operations."""
    return "layer_norm" if model.norm_bias else "rms_norm"


def activation_of(model: ModelSpec) -> str:
    """Which of the operations."""
    return "silu" if model.gated_mlp else "relu"


def of_inputs(model: ModelSpec, *, fused: bool) -> Passes:
    """A row's, before its keys and values are there: norm and rotation; ``fused``: it was saved normed, and one kernel turns."""
    norm, turn = OPERATIONS[norm_of(model)], OPERATIONS["rotation"]
    if fused:
        norm, turn = Passes(), OPERATIONS["turn"]
    return _sum((norm, model.hidden), (turn, 0 if model.positions else model.kv_dim))


def of_layer(model: ModelSpec, *, fused: bool = False) -> Passes:
    """A row's of a whole layer: both norms, two residual sums, rotation, keys and values stored, the activation.

    ``fused``: as a captured plan's prompts pass, one kernel a norm, with the sum before it, a rotation and a gate; LayerNorm
    by itself is torch's.
    """
    norm, turn, gate = OPERATIONS[norm_of(model)], OPERATIONS["rotation"], OPERATIONS[activation_of(model)]
    summed = _sum((OPERATIONS["residual"], 1), (norm, 1))
    if fused:
        norm = norm if model.norm_bias else OPERATIONS["norm"]
        summed, turn = OPERATIONS["sum_norm"], OPERATIONS["turn"]
        gate = OPERATIONS["gate"] if model.gated_mlp else gate
    return _sum(
        (norm, model.hidden),
        (turn, 0 if model.positions else model.query_dim + model.kv_dim),
        (OPERATIONS["copy"], 2 * model.kv_dim),
        (summed, model.hidden),
        (gate, model.intermediate),
        (OPERATIONS["residual"], model.hidden),
    )


def of_step(model: ModelSpec) -> Passes:
    """A row's between the products of a captured decode step: two norms, each with the sum before it, rotation, a gate."""
    return _sum(
        (OPERATIONS["sum_norm"], 2 * model.hidden),
        (OPERATIONS["turn"], 0 if model.positions else model.query_dim + model.kv_dim),
        (OPERATIONS["gate"], model.intermediate if model.gated_mlp else 0),
    )


def _sum(*parts: tuple[Passes, int]) -> Passes:
    return Passes(
        plain=sum(passes.plain * entries for passes, entries in parts),
        busy=sum(passes.busy * entries for passes, entries in parts),
    )

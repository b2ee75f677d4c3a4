"""How many operations the host launches one by one: beside the GPU's work, or, where that is short, in its place.

The numbers are counts of the runtime's operations in fp16, views left out; a test counts them again.
"""

from typing import NamedTuple

from sim.attention import Selector
from sim.capture import captures_prefill, forwards, is_captured, streams
from sim.footprint import prefill_rows
from sim.gemms import product_rows
from sim.kv import GROUP_TOKENS
from sim.plan import Admission, Placement, Recompute, Setting
from sim.spec import ModelSpec, WeightFormat

_PLAIN_LAYER = 5  # besides products: LayerNorm, positions in the embedding, a plain feed-forward
_FUSED_LAYER = 3  # besides products and kernels of the runtime's: each norm, or room for it, and the last sum
_DECODED = 2  # a decode step's attention besides
_PRODUCTS = 5  # of a layer, attention among them
_MATRICES = 4  # of a layer: queries, keys and values; out; up, with its gate; down
_STREAMED = 6  # a piece that is replayed, what comes, what goes; marks in streams for three
_PROJECTING = 1  # a product, ordered as directly
_COMING = 5  # where weights stream in as well: another piece, the block, its marks, and, for two, torch's kernel for what it lacks
_BLOCKS = 2  # of a layer's streamed weights
# What operations take the host, where one that keeps books takes 1: a layer's others, products and attention, which are chosen
# among many kernels, kernels of the runtime's, whose launcher is Python, and what is queued between pieces, little but launches.
# Seen on an H200's host: short prompts take OPT 320 to 500 us a layer, Llama 680, at the same pace.
_LAYER_WORTH, _PRODUCT_WORTH, _KERNEL_WORTH, _QUEUED_WORTH = 0.55, 2.5, 3.6, 0.28
# Those of an eager decode step that keep books: more of them are indices and masks than of a prefill's. Four models take nine
# tenths of their prefills' time for it, whatever the pace, where there are two thirds as many.
_STEP_WORTH = 1.45
_SCATTER_WORTH = 3.0  # OPT-1.3B's new prompts under continuous admission take that host 360 to 380 us a layer
_ENDS, _EAGER_ENDS, _TURNED_ENDS = 13, {True: 33, False: 15}, 9  # of a step, before its first layer and after its last
# What a wave's begin takes the host besides, whatever the layers: 1.6 ms of an H200's, 0.3 where the prefill is a graph.
_BEGUN, _BEGUN_BY_GRAPH = 90, 16
# Of an eager step besides the layer itself, its own query's attention among them; then what a selector adds.
_DECODE_BOOKS, _PREFILL_BOOKS = 71, 103
_DECODE_CHOICE = {
    Selector.SWA: 61,
    Selector.H2O: 47,
    Selector.TOPK: 65,
    Selector.PAGES: 72,
    Selector.STRIDED: 57,
    Selector.LOCAL: 11,
}
_PREFILL_CHOICE = {Selector.SWA: 96, Selector.H2O: 84, Selector.STRIDED: 87, Selector.LOCAL: 36}


class Operations(NamedTuple):
    """Some numbers of them: products and attention, a layer's others, those that keep the runtime's books, launches of its own
    kernels, those that are queued between pieces of a captured step, those that keep books in a step launched eagerly, and
    what scatters rows to where a list of places says.
    """

    products: float = 0.0
    layer: float = 0.0
    books: float = 0.0
    kernels: float = 0.0
    queued: float = 0.0
    stepped: float = 0.0
    scattered: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def worth(self) -> float:
        """In operations that keep books."""
        layer = _PRODUCT_WORTH * self.products + _LAYER_WORTH * self.layer + _KERNEL_WORTH * self.kernels
        books = self.books + _STEP_WORTH * self.stepped + _SCATTER_WORTH * self.scattered
        return layer + books + _QUEUED_WORTH * self.queued

    def plus(self, others: "Operations") -> "Operations":
        """All of both."""
        return Operations(*map(sum, zip(self, others, strict=True)))

    def times(self, passes: float) -> "Operations":
        """All of them so often."""
        return Operations(*(passes * count for count in self))


_CAPTURED_CHOICE = Operations(books=7, kernels=5)  # of a prompt, under sparse window attention


def decode_operations(setting: Setting, *, away: bool, linked: bool = False) -> Operations:
    """Of one layer of a decode step; none where a captured step is replayed as a whole. ``away``: of a plan that keeps
    tokens outside HBM; ``linked``: with some among them that the host has and sends.
    """
    if is_captured(setting):
        if not streams(setting, away=away) or (forwards(setting) and not linked):
            return Operations()
        queued = _STREAMED + (_COMING if setting.weights_on_host else 0)
        if not away or setting.recompute is not Recompute.ACTIVATIONS_HOST:
            return Operations(queued=queued)
        kernels = (not setting.model.positions) + _widening_kernels(setting) / _MATRICES  # rotation in place
        return Operations(kernels=kernels, queued=queued + _PROJECTING)
    books = _DECODE_BOOKS + _DECODE_CHOICE.get(setting.attention.selector, 0) + _stored_weights(setting, 1)
    books += 63 * setting.kv_format.gpu.is_grouped
    passes, more = _away_operations(setting) if away else (1, 0)
    layer = _layer_operations(setting.model).times(passes)
    return layer._replace(layer=layer.layer + _DECODED, stepped=books + more)


def _away_operations(setting: Setting) -> tuple[int, int]:
    """How often a decode step passes through a layer, or into it, where tokens outside HBM are recomputed; and what it adds."""
    grouped, resident = setting.kv_format.gpu.is_grouped, 58 * (setting.placement is Placement.RESIDENT)
    if setting.recompute is Recompute.TOKENS:
        return 2, 55
    if setting.recompute.from_activations:
        return 2, 66 + resident
    return 1, (97 if setting.attention.selector.recalls else 111) + resident + 70 * grouped


def prefill_operations(setting: Setting, passes: float, *, away: bool) -> Operations:
    """Of one layer of a prefill in ``passes``; none of one that is captured. Captured steps take in each pass for itself; an
    eager prefill keeps its books once a layer, and puts several passes together.
    """
    layer, grouped = prompt_operations(setting).times(passes), setting.kv_format.gpu.is_grouped
    selector, groups = setting.attention.selector, setting.workload.prompt_tokens // GROUP_TOKENS
    if is_captured(setting):
        if captures_prefill(setting):
            return Operations()
        taken_in, coming = _taken_in(setting), _BLOCKS if setting.weights_on_host else 0
        kernels = layer.kernels + passes * (taken_in.kernels + _widening_kernels(setting))
        return layer._replace(books=passes * taken_in.books + coming, kernels=kernels)
    books = _PREFILL_BOOKS + _PREFILL_CHOICE.get(selector, 0) + _stored_weights(setting, passes)
    written = 72 if setting.recompute is not Recompute.NONE else 158 + 94 * grouped
    together = 4 + 4 * passes + _turned_anew(setting, passes) if passes > 1 else 0
    return layer._replace(books=together + books + (39 + 67 * groups) * grouped + written * away)


def _turned_anew(setting: Setting, passes: float) -> float:
    """Of a layer whose ``passes`` follow each other: each works out its cosines and sines."""
    return _TURNED_ENDS * passes if passes > 1 and not setting.model.positions else 0


def end_operations(setting: Setting, *, prefill: bool) -> Operations:
    """Of a step besides its layers."""
    if is_captured(setting):
        return Operations(products=1, layer=_ENDS).times(prefill and not captures_prefill(setting))
    turned = 0 if setting.model.positions else _TURNED_ENDS
    return Operations(products=1, layer=_EAGER_ENDS[prefill] + turned)


def begin_operations(setting: Setting) -> int:
    """Before a wave's first layer, those that keep books: memory for its prompts, and what its record needs. On a GPU."""
    if setting.admission is not Admission.WAVES or setting.machine.is_cpu:
        return 0
    return _BEGUN_BY_GRAPH if captures_prefill(setting) else _BEGUN


def choice_operations(setting: Setting) -> float:
    """Of a first choice from a prompt's attention, under a selector that chooses ahead."""
    selector = setting.attention.selector
    return _CAPTURED_CHOICE.total if is_captured(setting) else _PREFILL_CHOICE[selector]


def apart_operations(setting: Setting) -> Operations:
    """Of a layer for each further length of prompts in a captured plan's pass: each attends, and is taken in, for itself."""
    return Operations(products=1, layer=1).plus(_taken_in(setting))


def _taken_in(setting: Setting) -> Operations:
    """By a captured step's slots, of a layer's prompts: first choices, ranges; else a few copies."""
    if setting.attention.selector is Selector.SWA:
        rounding = Operations(kernels=3) if setting.kv_format.gpu.is_grouped else Operations()
        return _CAPTURED_CHOICE.plus(rounding)
    if setting.attention.selector is Selector.PAGES:
        return Operations(books=7, kernels=1)
    if not setting.kv_format.gpu.is_grouped:
        return Operations(books=4) if setting.admission is Admission.WAVES else Operations(books=2, scattered=2)
    return Operations(books=53) if setting.admission is Admission.CONTINUOUS else Operations(books=6, kernels=1)


def prompt_operations(setting: Setting) -> Operations:
    """Of one prefill pass through a layer; on a CPU attention is by the queries of a group in turn, put together at the end."""
    model = setting.model
    if is_captured(setting):
        return _fused_operations(setting)
    layer, group = _layer_operations(model), model.heads // model.kv_heads
    if group == 1 or not setting.machine.is_cpu:
        return layer
    return layer._replace(products=layer.products + group - 1, layer=layer.layer + group + 1)


def _fused_operations(setting: Setting) -> Operations:
    """One kernel for the sum and norm after attention, one for the norm before it, for rotation, for a gate. Where no rows are
    made up that norm is torch's if it is LayerNorm; where some are, what attention gave is copied.
    """
    model, waves = setting.model, setting.admission is Admission.WAVES
    rows = prefill_rows(setting.concurrency if waves else 1, setting.workload.prompt_tokens)
    made_up = product_rows(rows) > rows
    kernels = 1 + (made_up or not model.norm_bias) + (not model.positions) + model.gated_mlp
    others = _FUSED_LAYER + (not model.gated_mlp) + 2 * made_up
    return Operations(products=_PRODUCTS, layer=others, kernels=kernels)


def _layer_operations(model: ModelSpec) -> Operations:
    """Rotation and norms in float32 come on top of a plain one."""
    rotation = 0 if model.positions else 10
    norms = 0 if model.norm_bias else 6
    others = _PLAIN_LAYER + rotation + norms + 8 * model.qk_norm + model.gated_mlp
    return Operations(products=_PRODUCTS, layer=others)


def _widening_kernels(setting: Setting) -> int:
    """Where steps are captured, by one kernel a matrix in a prompt's pass too."""
    return 0 if setting.weight_format is WeightFormat.NATIVE else _MATRICES


def _stored_weights(setting: Setting, passes: float) -> float:
    """Of widening matrices in each of a layer's ``passes``, and of bringing them."""
    widened = {WeightFormat.NATIVE: 0, WeightFormat.INT8: 12, WeightFormat.INT4: 24}[setting.weight_format]
    return passes * widened + (_BLOCKS if setting.weights_on_host else 0)

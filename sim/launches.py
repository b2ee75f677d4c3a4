"""How many operations the host launches one by one: beside the GPU's work, or, where that is short, in its place.

The numbers are counts of the runtime's operations in fp16, views left out; a test counts them again.
"""

from typing import NamedTuple

from sim.attention import Selector
from sim.capture import is_captured, streams
from sim.kv import GROUP_TOKENS
from sim.plan import Admission, Placement, Recompute, Setting
from sim.spec import ModelSpec, WeightFormat

_PLAIN_LAYER = (
    12  # of a prompt: LayerNorm, one head for each key head, positions in the embedding, a plain feed-forward
)
_MATRICES = 4  # of a layer: queries, keys and values; out; up, with its gate; down
_STREAMED = 6  # a piece that is replayed, what comes, what goes; events for three, as an H100's steps say
# What a layer's own operation takes the host, and a kernel of the runtime's, where an operation that keeps books takes 1: seen
# on an H100's host. Products and attention are chosen among many kernels; Triton's launcher is Python.
# Between pieces little but launches is done: a layer took 90 to 170 us on three hosts (OPT), 260 to 310 (Llama, projecting inputs).
_LAYER_WORTH, _KERNEL_WORTH, _QUEUED_WORTH = 1.6, 3.2, 0.85
_ENDS, _EAGER_ENDS, _TURNED_ENDS = 14, {True: 34, False: 16}, 9  # of a step, before its first layer and after its last
_BEGUN = 40  # what a captured wave's begin takes the host besides: a millisecond of an H100's, whatever the layers
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
    """Some numbers of them: a layer's own, those that keep the runtime's books, launches of its own kernels, and those that are
    queued between pieces of a captured step.
    """

    layer: float = 0.0
    books: float = 0.0
    kernels: float = 0.0
    queued: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def worth(self) -> float:
        """In operations that keep books."""
        own = _LAYER_WORTH * self.layer + _KERNEL_WORTH * self.kernels
        return own + self.books + _QUEUED_WORTH * self.queued


def decode_operations(setting: Setting, *, away: bool) -> Operations:
    """Of one layer of a decode step; none where a captured step is replayed as a whole. ``away``: of a plan that keeps
    tokens outside HBM.
    """
    if is_captured(setting):
        if not streams(setting, away=away):
            return Operations()
        if not away or setting.recompute is not Recompute.ACTIVATIONS_HOST:
            return Operations(queued=_STREAMED)
        widening = _widening_kernels(setting) / _MATRICES
        return Operations(queued=_STREAMED + _projecting_operations(setting.model), kernels=widening)
    books = _DECODE_BOOKS + _DECODE_CHOICE.get(setting.attention.selector, 0) + _stored_weights(setting, 1)
    books += 63 * setting.kv_format.gpu.is_grouped
    again, more = _away_operations(setting) if away else (0, 0)
    return Operations(layer=_layer_operations(setting.model) + again, books=books + more)


def _away_operations(setting: Setting) -> tuple[int, int]:
    """What a decode step adds for tokens outside HBM: those recomputed pass through a layer, or into it, again."""
    layer, grouped = _layer_operations(setting.model), setting.kv_format.gpu.is_grouped
    if setting.recompute is Recompute.TOKENS:
        return layer, 55
    resident = 58 * (setting.placement is Placement.RESIDENT)
    if setting.recompute.from_activations:
        return layer, 66 + resident
    return 0, (97 if setting.attention.selector.recalls else 111) + resident + 70 * grouped


def prefill_operations(setting: Setting, passes: float, *, away: bool) -> Operations:
    """Of one layer of a prefill in ``passes``. Captured steps take in each pass for itself; an eager prefill keeps its
    books once a layer, and puts several passes together.
    """
    layer, grouped = prompt_operations(setting.model), setting.kv_format.gpu.is_grouped
    selector, groups = setting.attention.selector, setting.workload.prompt_tokens // GROUP_TOKENS
    if is_captured(setting):
        taken_in = _taken_in(setting)
        kernels = taken_in.kernels + _widening_kernels(setting)
        return Operations(layer=passes * layer, books=passes * taken_in.books, kernels=passes * kernels)
    books = _PREFILL_BOOKS + _PREFILL_CHOICE.get(selector, 0) + _stored_weights(setting, passes)
    written = 72 if setting.recompute is not Recompute.NONE else 158 + 94 * grouped
    turned = 0 if setting.model.positions else 9  # each pass works out its cosines and sines anew
    together = 4 + passes * (4 + turned) if passes > 1 else 0
    return Operations(layer=passes * layer, books=together + books + (39 + 67 * groups) * grouped + written * away)


def end_operations(setting: Setting, *, prefill: bool) -> Operations:
    """Of a step besides its layers."""
    turned = 0 if setting.model.positions else _TURNED_ENDS
    if is_captured(setting):
        begun = _BEGUN * (setting.admission is Admission.WAVES)
        return Operations(layer=(_ENDS + turned) * prefill, books=begun * prefill)
    return Operations(layer=_EAGER_ENDS[prefill] + turned)


def choice_operations(setting: Setting) -> float:
    """Of a first choice from a prompt's attention, under a selector that chooses ahead."""
    return _taken_in(setting).total if is_captured(setting) else _PREFILL_CHOICE[setting.attention.selector]


def _taken_in(setting: Setting) -> Operations:
    """By a captured step's slots, of a layer's prompts: first choices, ranges; else a few copies."""
    if setting.attention.selector is Selector.SWA:
        return Operations(books=7, kernels=5)
    if setting.attention.selector is Selector.PAGES:
        return Operations(books=26)
    return Operations(books=53 if setting.kv_format.gpu.is_grouped else 4)


def prompt_operations(model: ModelSpec) -> int:
    """Of one prefill pass through a layer, attention by the queries of a group in turn."""
    return _layer_operations(model) + 2 * (model.heads // model.kv_heads - 1)


def _layer_operations(model: ModelSpec) -> int:
    """Of a layer with one head for each key head: rotation and norms in float32 come on top of a plain one."""
    rotation = 0 if model.positions else 10
    norms = 0 if model.norm_bias else 6
    return _PLAIN_LAYER + rotation + norms + 8 * model.qk_norm + model.gated_mlp


def _projecting_operations(model: ModelSpec) -> int:
    """Of saved inputs: norm and product; rotation and the key's norm, whose result is put where the product's was."""
    return 2 + (0 if model.positions else 6) + (0 if model.norm_bias else 3) + 4 * model.qk_norm


def _widening_kernels(setting: Setting) -> int:
    """Where steps are captured, by one kernel a matrix in a prompt's pass too."""
    return 0 if setting.weight_format is WeightFormat.NATIVE else _MATRICES


def _stored_weights(setting: Setting, passes: float) -> float:
    """Of widening matrices in each of a layer's ``passes``, and of bringing them."""
    widened = {WeightFormat.NATIVE: 0, WeightFormat.INT8: 12, WeightFormat.INT4: 24}[setting.weight_format]
    return passes * widened + (10 if setting.weights_on_host else 0)

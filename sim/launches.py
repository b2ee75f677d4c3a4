"""How many operations the host launches one by one for a layer: beside the GPU's work, or, where that is short, in its place.

The numbers are counts of the runtime's operations, views left out; a test counts them again.
"""

from sim.attention import Selector
from sim.capture import is_captured, streams
from sim.kv import GROUP_TOKENS
from sim.plan import Recompute, Setting
from sim.spec import ModelSpec, WeightFormat

_PLAIN_LAYER = (
    13  # of a prompt: LayerNorm, one head for each key head, positions in the embedding, a plain feed-forward
)
CHOICE_OPERATIONS = 174  # of a window's first choice from a prompt's attention
_STREAMED_STEP, _STREAMED_INPUTS = 22, 12  # kernels, copies and the events between them, in plain operations


def decode_operations(setting: Setting, *, away: bool) -> float:
    """Of one layer of a decode step; none where a captured step is replayed. ``away``: of a plan that keeps tokens
    outside HBM.
    """
    if is_captured(setting):
        inputs = _STREAMED_INPUTS if setting.recompute is Recompute.ACTIVATIONS_HOST else 0
        return _STREAMED_STEP + inputs if streams(setting, away=away) else 0
    selector, grouped = setting.attention.selector, setting.kv_format.gpu.is_grouped
    recomputed = {Recompute.NONE: 0, Recompute.TOKENS: 32}.get(setting.recompute, 40)
    books = 110 + 45 * (not setting.attention.is_dense) + 70 * grouped + recomputed + _stored_weights(setting)
    fetched = (90 + 100 * grouped + 20 * selector.recalls) * (away and setting.recompute is not Recompute.TOKENS)
    return prompt_operations(setting.model) + books + fetched


def prefill_operations(setting: Setting, passes: float, *, away: bool) -> float:
    """Of one layer of a prefill in ``passes``. Captured steps take in each pass for itself; an eager prefill keeps its
    books once a layer.
    """
    layer, grouped = prompt_operations(setting.model), setting.kv_format.gpu.is_grouped
    if is_captured(setting):
        taken_in = {Selector.SWA: CHOICE_OPERATIONS, Selector.PAGES: 24}.get(setting.attention.selector, 65 if grouped else 4)
        return passes * (layer + taken_in)
    groups = setting.workload.prompt_tokens // GROUP_TOKENS
    books = 173 + 90 * (not setting.attention.is_dense) + (45 + 73 * groups) * grouped
    return passes * layer + books + 100 * away + _stored_weights(setting)


def prompt_operations(model: ModelSpec) -> int:
    """Of one prefill pass through a layer: rotation, norms in float32, queries of a group in turn come on top."""
    rotation = 0 if model.positions else 10
    norms = 0 if model.norm_bias else 8
    groups = 2 * (model.heads // model.kv_heads - 1)
    return _PLAIN_LAYER + rotation + norms + groups + 8 * model.qk_norm + model.gated_mlp


def _stored_weights(setting: Setting) -> int:
    """Of widening matrices, and of bringing them."""
    widened = 25 if setting.weight_format is not WeightFormat.NATIVE else 0
    return widened + (20 if setting.weights_on_host else 0)

"""Which settings the runtime replays as a captured graph; the others it launches kernel by kernel.

``runtime.graph.support`` decides, once it has a decoder; this says it beforehand, for prices. A test holds them together.
"""

from sim.attention import Selector
from sim.plan import Admission, Placement, Recompute, Setting


def is_captured(setting: Setting) -> bool:
    """Whether a decode step of ``setting`` is one graph on a CUDA device."""
    selector = setting.attention.selector
    known_ahead = setting.attention.is_dense or (selector is Selector.SWA and setting.placement is Placement.RESIDENT)
    return (
        known_ahead
        and setting.model.heads == setting.model.kv_heads
        and setting.kv_format.are_native
        and setting.recompute is Recompute.NONE
        and not setting.host_attention
        and setting.admission is Admission.WAVES
    )

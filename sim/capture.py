"""Which settings the runtime replays as a captured graph; the others it launches kernel by kernel.

``runtime.graph.support`` decides, once it has a decoder; this says it beforehand, for prices. A test holds them together.
"""

from sim.attention import PAGE_TOKENS, Selector
from sim.kv import GROUP_TOKENS, KvFormat
from sim.plan import Admission, Mechanism, Placement, Recompute, Setting, WriteBack
from sim.profile import Profile

FUSED_ROWS = 64  # of a captured step: up to those its products add biases, activations and sums of parts themselves
_PROGRAMS = 512  # that fill a large GPU, a few on each multiprocessor
_MOST_PARTS = 16
_SHARES = GROUP_TOKENS // PAGE_TOKENS  # pages over which a group's ranges, one for each channel, are spread


def attention_parts(sequences: int, kv_heads: int, heads: int) -> int:
    """In how many parts a captured step's attention goes over a sequence's tokens, side by side.

    One where each query head has a key head of its own; else a power of two, as many as fill the GPU, two at least.
    """
    if heads == kv_heads:
        return 1
    wanted = max(1, _PROGRAMS // (sequences * kv_heads))
    return min(_MOST_PARTS, max(2, 1 << (wanted - 1).bit_length()))


def gains_by_capture(profile: Profile) -> bool:
    """Whether a captured step is any quicker than the same one, launched kernel by kernel."""
    return profile.host_operation_s > 0 or profile.selection_exposed_share < 1


def is_captured(setting: Setting) -> bool:
    """Whether a decode step of ``setting`` takes the kernels of a captured one on a CUDA device.

    Where dense tokens stream in by the copy engine it is replayed in pieces, between which the host queues copies.
    """
    on_gpu = not (setting.machine.is_cpu or setting.host_attention or setting.weights_on_host)
    return on_gpu and _keeps(setting) and _attends(setting)


def evicts_least_wanted(setting: Setting) -> bool:
    """Whether tokens leave HBM by how little they are attended to, and are written to the host only then.

    The captured step under sparse window attention has them change places with what returns (``runtime.graph.window``);
    launched kernel by kernel, homes go by age, and where all is written at birth it is.
    """
    swa, at_birth = setting.attention.selector is Selector.SWA, setting.write_back is WriteBack.AT_BIRTH
    return swa and not at_birth and is_captured(setting)


def keeps_open_group(setting: Setting) -> bool:
    """Whether a captured step reads INT8 where the host holds it, and keys of the open group in HBM (``sim.open_group``)."""
    waves = setting.attention.is_dense and setting.admission is Admission.WAVES
    return waves and not setting.kv_format.are_native and is_captured(setting)


def keeps_key_ranges(setting: Setting) -> bool:
    """Whether ranges of all keys, the dead ones' too, stay in HBM: levels and the ranges of values alone change places."""
    return not setting.kv_format.are_native and evicts_least_wanted(setting)


def reads_in_place(setting: Setting) -> bool:
    """Whether a captured step's attention reads what the host holds where it lies: nothing comes before its query is there."""
    waves = setting.attention.is_dense and setting.admission is Admission.WAVES
    return waves and is_captured(setting) and not streams(setting, away=True)


def streams(setting: Setting, *, away: bool) -> bool:
    """Whether a captured step is replayed layer by layer, because dense tokens come by the copy engine.

    They do in plans that keep some ``away`` from HBM, and where all are written at birth.
    """
    plainly = setting.attention.is_dense and setting.kv_format.are_native and setting.admission is Admission.WAVES
    copied = setting.fetch_by is Mechanism.COPY_ENGINE or setting.recompute is Recompute.ACTIVATIONS_HOST
    at_birth = setting.write_back is WriteBack.AT_BIRTH
    return plainly and (at_birth or (copied and away))


def _keeps(setting: Setting) -> bool:
    """Formats and recomputation."""
    formats, dense = setting.kv_format, setting.attention.is_dense
    one_to_one = setting.model.heads == setting.model.kv_heads
    if setting.admission is Admission.CONTINUOUS:
        whole = not formats.gpu.is_grouped or setting.model.head_dim % _SHARES == 0
        return whole and formats.gpu in (KvFormat.NATIVE, KvFormat.INT8, KvFormat.FP8)
    if formats.are_native:
        return setting.recompute is Recompute.NONE or (dense and setting.recompute is Recompute.ACTIVATIONS_HOST)
    both = formats.gpu is KvFormat.INT8 and formats.host is KvFormat.INT8
    window = setting.attention.selector is Selector.SWA and setting.placement is Placement.RESIDENT
    known = (dense and one_to_one) or window
    return known and both and setting.recompute is Recompute.NONE


def _attends(setting: Setting) -> bool:
    selector = setting.attention.selector
    if setting.attention.is_dense:
        return True
    known = selector in (Selector.SWA, Selector.PAGES) and setting.admission is Admission.WAVES
    return known and setting.placement is Placement.RESIDENT

"""Which settings the runtime replays as a captured graph; the others it launches kernel by kernel.

``runtime.graph.support`` decides, once it has a decoder; this says it beforehand, for prices. A test holds them together.
"""

from typing import Any, TypeVar, cast

from sim.attention import PAGE_TOKENS, Selector
from sim.footprint import prefills_at_once
from sim.kv import GROUP_TOKENS, KvFormat
from sim.plan import Admission, Mechanism, Placement, Recompute, Setting, WriteBack
from sim.profile import Profile

Tokens = TypeVar("Tokens")  # a number of them, or a column
# Of a window's choice, warps of a program, and heads or past queries at once: 49 us of 96 sequences of 515 tokens on an H200, 63
# with 4 and 8.
CHOOSING_WARPS, WEIGHED_TOGETHER = 8, 16
FUSED_ROWS = 64  # of a captured step: up to those its products add biases, activations and sums of parts themselves
FORWARDED_TOGETHER = (
    8  # tokens of a dropped prefix: a captured step forwards a multiple of it, and has a graph for each
)
COMPUTED_AGAIN = (Recompute.ACTIVATIONS_HOST, Recompute.TOKENS)  # what a captured step computes tokens from again
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


def forwarded_tokens(dropped: Tokens, prompt_tokens: int) -> Tokens:
    """What a captured step forwards where so many ``dropped`` tokens count; a few of them as they are, more of them rounded up,
    never more than the prompt.
    """
    tokens: Any = dropped
    made_up = tokens + (tokens >= FORWARDED_TOGETHER) * (-tokens % FORWARDED_TOGETHER)
    return cast(Tokens, made_up - (made_up > prompt_tokens) * (made_up - prompt_tokens))


def gains_by_capture(profile: Profile) -> bool:
    """Whether a captured step is any quicker than the same one, launched kernel by kernel."""
    return profile.host_operation_s > 0 or profile.selection_exposed_share < 1


def is_captured(setting: Setting) -> bool:
    """Whether a decode step of ``setting`` takes the kernels of a captured one on a CUDA device.

    Where dense tokens stream in by the copy engine it is replayed in pieces, between which the host queues copies.
    """
    on_gpu = not (setting.machine.is_cpu or setting.host_attention)
    return on_gpu and _brings(setting) and _keeps(setting) and _attends(setting)


def captures_prefill(setting: Setting) -> bool:
    """Whether a wave takes its prompts in by a graph as well: in one pass over weights that are all there, a step to follow.

    Prompts without padding, that is, as all are that a plan is priced for.
    """
    work = setting.workload
    at_once = setting.admission is Admission.WAVES and prefills_at_once(setting.concurrency, work.prompt_tokens)
    return at_once and work.output_tokens > 1 and not setting.weights_on_host and is_captured(setting)


def evicts_least_wanted(setting: Setting) -> bool:
    """Whether tokens leave HBM by how little they are attended to, and are written to the host only then.

    The captured step under sparse window attention has them change places with what returns (``runtime.graph.window``);
    launched kernel by kernel, homes go by age, and where all is written at birth it is. So they do where HBM holds the newest.
    """
    swa, at_birth = setting.attention.selector is Selector.SWA, setting.write_back is WriteBack.AT_BIRTH
    return swa and not at_birth and setting.placement is Placement.RESIDENT and is_captured(setting)


def gathers_ahead(setting: Setting) -> bool:
    """Whether a captured step's kernels gather what it attends to of the host's tokens, layers ahead (``runtime.graph.recent``)."""
    recent = setting.attention.selector is Selector.SWA and setting.placement is Placement.RECENT
    return recent and is_captured(setting)


def keeps_open_group(setting: Setting) -> bool:
    """Whether a captured step reads INT8 where the host holds it, and keys of the open group in HBM (``sim.open_group``)."""
    return not setting.kv_format.are_native and reads_in_place(setting)


def keeps_key_ranges(setting: Setting) -> bool:
    """Whether ranges of all keys, the dead ones' too, stay in HBM: levels and the ranges of values alone come and go."""
    near = evicts_least_wanted(setting) or gathers_ahead(setting) or streams_levels(setting)
    return not setting.kv_format.are_native and near


def streams_levels(setting: Setting) -> bool:
    """Whether a captured step that keeps tokens outside HBM is one that streams INT8, beside what it computes again."""
    return not setting.kv_format.are_native and streams(setting, away=True) and is_captured(setting)


def reads_in_place(setting: Setting) -> bool:
    """Whether a captured step's attention reads what the host holds where it lies: nothing comes before its query is there."""
    waves = setting.attention.is_dense and setting.admission is Admission.WAVES
    return waves and is_captured(setting) and not streams(setting, away=True)


def streams(setting: Setting, *, away: bool) -> bool:
    """Whether a captured step attends to dense tokens that are staged, layer by layer: the copy engine brings them, or they
    are computed again.

    They are in plans that keep some ``away`` from HBM, and where all are written at birth. It is replayed in pieces then,
    unless it ``forwards``.
    """
    waves = setting.attention.is_dense and setting.admission is Admission.WAVES
    again = setting.recompute in COMPUTED_AGAIN
    if not setting.kv_format.are_native:  # else it is read where it lies
        return waves and again and away
    staged = setting.fetch_by is Mechanism.COPY_ENGINE or again
    at_birth = setting.write_back is WriteBack.AT_BIRTH
    return waves and (at_birth or (staged and away))


def forwards(setting: Setting) -> bool:
    """Whether a captured step that computes a dropped prefix again does so within one graph, where the host holds nothing."""
    at_eviction = setting.write_back is not WriteBack.AT_BIRTH
    return setting.recompute is Recompute.TOKENS and at_eviction and is_captured(setting)


def _brings(setting: Setting) -> bool:
    """Streamed weights: every layer has one buffer of the ring at all its turns, so that copies have fixed ends."""
    return not setting.weights_on_host or setting.model.layers % (setting.prefetch_layers + 1) == 0


def _keeps(setting: Setting) -> bool:
    """Formats and recomputation."""
    formats, dense = setting.kv_format, setting.attention.is_dense
    if setting.admission is Admission.CONTINUOUS:
        whole = not formats.gpu.is_grouped or setting.model.head_dim % _SHARES == 0
        return whole and formats.gpu in (KvFormat.NATIVE, KvFormat.INT8, KvFormat.FP8)
    again, never = dense and setting.recompute in COMPUTED_AGAIN, setting.recompute is Recompute.NONE
    if formats.are_native:
        return never or again
    both = formats.gpu is KvFormat.INT8 and formats.host is KvFormat.INT8
    known = dense or setting.attention.selector is Selector.SWA
    at_birth = setting.write_back is WriteBack.AT_BIRTH  # when levels of keys are not known
    return known and both and (never or (again and not at_birth))


def _attends(setting: Setting) -> bool:
    selector = setting.attention.selector
    if setting.attention.is_dense:
        return True
    resident = setting.placement is Placement.RESIDENT
    if setting.admission is not Admission.WAVES:
        return False
    if selector is Selector.SWA:
        return resident or setting.write_back is WriteBack.AT_EVICTION
    return selector is Selector.PAGES and resident

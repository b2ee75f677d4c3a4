"""What attending to kept tokens takes a decode step, as the kernels that do it run: by bytes, by programs and by their rounds."""

from math import ceil, hypot

from sim.capture import attention_parts, forwards, gathers_ahead, is_captured, streams
from sim.cost import CostModel
from sim.kv import KvFormat, kv_layer_bytes
from sim.plan import Admission, Recompute, Setting
from sim.spec import ModelSpec

# Of captured attention, as an H200's kernels say. Over grouped heads: what it takes besides its setup, and another round of
# programs, in launches; those that a multiprocessor has at once; a token's turn beside that of a warp by itself. Over INT8: the
# programs at once, each with rows that it widens.
_GROUPED_LAUNCHES, _ROUND_LAUNCHES, _GROUPED_PROGRAMS, _GROUPED_TURN, _ROUNDING_PROGRAMS = 1.2, 1.2, 4, 0.6, 12
_GROUPED_ROUNDING_LAUNCHES, _GROUPED_ROUNDING_TURN = 1.2, 1.0
# Over INT8 in a list's order ranges come with each token, and take registers: of 128 channels three programs for each four.
_LISTED_ROUNDING_TURN, _LISTED_REGISTERS = 2, 2 / 3
_LISTED_ROUNDING_LAUNCHES = (
    2.5  # of 128 channels, over grouped heads as well: for one, the open group's are looked up one by one
)
_AHEAD_LAUNCHES = 0.5  # what it waits for is gathered ahead, by another stream: 1 to 2 us on an H200
_RANGE_CHANNELS = 45  # that a head's ranges count as: heads of 64 take an H200 0.63 of what those of 128 do, not half
PIECE_LAUNCHES = 3  # of a step in pieces: what comes between one and the next, 8 to 12 us on an H200


def attention_flops(model: ModelSpec, sequences: int) -> float:
    """Of one token that each of ``sequences`` attends to in one layer."""
    return 4.0 * model.query_dim * sequences


def attention_s_per_token(cost: CostModel, setting: Setting) -> float:
    """A token that one of many sequences attends to, one layer: what it takes where enough others keep the GPU busy."""
    kv_format = setting.kv_format.gpu
    kv_bytes = float(kv_layer_bytes(setting.model, setting.dtype, kv_format))
    if setting.admission is Admission.CONTINUOUS and is_captured(setting):  # each query head has a program of its own
        kv_bytes *= 1 + cost.profile.paged_again_share * (setting.model.heads // setting.model.kv_heads - 1)
    return cost.attention_s(kv_bytes, attention_flops(setting.model, 1), setting.dtype, kv_format)


def rounding_s(cost: CostModel, setting: Setting, tokens: int) -> float:
    """Of so many tokens' keys and values, one layer, to what HBM holds them in: at the rate of heads of 128 channels."""
    slower = (1 + _RANGE_CHANNELS / setting.model.head_dim) / (1 + _RANGE_CHANNELS / 128)
    return slower * cost.conversion_s(3 * tokens * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu))


def attention_s_per_kept(cost: CostModel, setting: Setting, sequences: int, *, away: bool = False) -> float:
    """A token of each of ``sequences``: what HBM takes for all, and what a head's program takes for one after the other.

    Few sequences wait for the programs, many for HBM; in between both are felt, less than one after the other.
    """
    return hypot(
        sequences * attention_s_per_token(cost, setting), attention_turn_s(cost, setting, sequences, away=away)
    )


def attention_setup_s(cost: CostModel, setting: Setting, sequences: int, *, away: bool = False) -> float:
    """Before its first token: a kernel's; of a step in pieces their begins too, another a layer where its weights stream in or a
    prefix is forwarded. What streams in INT8, beside tokens computed again, has a kernel ahead, and is priced as if all were in
    INT8.

    Where grouped heads are gone over in parts: of more threads, one round after the other, and with another kernel that
    merges; over INT8 with one ahead that stores the newborn token.
    """
    model, kv_format = setting.model, setting.kv_format.gpu
    if is_captured(setting) and streams(setting, away=away):
        pieces = 0 if forwards(setting) else pieces_begun(setting)
        ahead = _GROUPED_ROUNDING_LAUNCHES * (kv_format is not KvFormat.NATIVE)  # stores the newborn token
        return cost.profile.attention_setup_s + cost.launch_s(pieces * PIECE_LAUNCHES + ahead)
    listed = is_captured(setting) and not setting.attention.is_dense and kv_format is not KvFormat.NATIVE
    before = _LISTED_ROUNDING_LAUNCHES * model.head_dim / 128 * listed + _AHEAD_LAUNCHES * (
        away and gathers_ahead(setting)
    )
    if model.heads == model.kv_heads or not is_captured(setting) or not _in_parts(setting, away=away):
        return cost.profile.attention_setup_s + cost.launch_s(before)
    launches = _GROUPED_LAUNCHES + _ROUND_LAUNCHES * (_grouped_rounds(cost, model, sequences) - 1)
    launches += _GROUPED_ROUNDING_LAUNCHES * (kv_format is not KvFormat.NATIVE)
    return cost.profile.attention_setup_s + cost.launch_s(before + launches)


def pieces_begun(setting: Setting) -> int:
    """What a layer of a step in pieces waits for, in begins of one: one that forwards a prefix begins later, 22 us on an H200."""
    return 1 + bool(setting.weights_on_host) + (setting.recompute is Recompute.TOKENS)


def attention_turn_s(cost: CostModel, setting: Setting, sequences: int, *, away: bool = False) -> float:
    """A token of the programs that go over it: in parts side by side, but for those over pages and of steps in pieces.

    Programs that widen what they read keep their multiprocessor busy: those of the next round add to them.
    """
    model, kv_format, captured = setting.model, setting.kv_format.gpu, is_captured(setting)
    if not captured:
        return cost.attention_turn_s(model.head_dim, kv_format)
    if not _in_parts(setting, away=away):
        paged = setting.admission is Admission.CONTINUOUS
        return cost.attention_turn_s(model.head_dim, kv_format, paged=paged, streamed=not paged)
    turn_s, native = cost.attention_turn_s(model.head_dim, kv_format), kv_format is KvFormat.NATIVE
    programs, listed = float(_ROUNDING_PROGRAMS), not native and not setting.attention.is_dense
    if listed:
        turn_s, programs = _LISTED_ROUNDING_TURN * turn_s, programs * 64 / max(64, _LISTED_REGISTERS * model.head_dim)
    if model.heads > model.kv_heads:
        turn_s /= attention_parts(sequences, model.kv_heads, model.heads)
        return turn_s * (_GROUPED_TURN if native else _GROUPED_ROUNDING_TURN * _grouped_rounds(cost, model, sequences))
    return turn_s if native else turn_s * ceil(sequences * model.heads / (programs * cost.machine.gpu.sm_count))


def _grouped_rounds(cost: CostModel, model: ModelSpec, sequences: int) -> float:
    """Of programs over grouped heads, one for each key head and part, as many at once as multiprocessors have."""
    programs = sequences * model.kv_heads * attention_parts(sequences, model.kv_heads, model.heads)
    return max(1.0, programs / (_GROUPED_PROGRAMS * cost.machine.gpu.sm_count))


def _in_parts(setting: Setting, *, away: bool) -> bool:
    """Of a captured step: neither over pages nor streamed."""
    return setting.admission is not Admission.CONTINUOUS and not streams(setting, away=away)

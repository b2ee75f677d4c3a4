"""What attending to kept tokens takes a decode step, as the kernels that do it run: by bytes, by programs and by their rounds."""

from math import floor, hypot
from typing import Any, NamedTuple, cast

import numpy as np

from sim.capture import attention_parts, forwards, gathers_ahead, is_captured, streams
from sim.cost import Amount, CostModel
from sim.kv import KvFormat, kv_layer_bytes
from sim.plan import Admission, Recompute, Setting
from sim.spec import ModelSpec

_LISTED_READ = 1.25  # of what levels of a token and ranges of its value take, as an H200's kernels do
_GROUPED_PROGRAMS = 4  # over grouped heads, that a multiprocessor has at once
_STORED_LAUNCHES = 1.2  # of a kernel ahead of attention over INT8
_AHEAD_LAUNCHES = 0.5  # what it waits for is gathered ahead, by another stream: 1 to 2 us on an H200
_RANGE_CHANNELS = 45  # that a head's ranges count as: heads of 64 take an H200 0.63 of what those of 128 do, not half


def attention_flops(model: ModelSpec, sequences: int) -> float:
    """Of one token that each of ``sequences`` attends to in one layer."""
    return 4.0 * model.query_dim * sequences


def attention_s_per_token(cost: CostModel, setting: Setting) -> float:
    """A token that one of many sequences attends to, one layer: what it takes where enough others keep the GPU busy.

    Over INT8 in a list's order ranges come with each token, captured or not.
    """
    kv_format = setting.kv_format.gpu
    kv_bytes = float(kv_layer_bytes(setting.model, setting.dtype, kv_format))
    if kv_format.is_grouped and not (setting.attention.is_dense or setting.machine.is_cpu):
        kv_bytes *= _LISTED_READ
    if setting.admission is Admission.CONTINUOUS and is_captured(setting):  # each query head has a program of its own
        kv_bytes *= 1 + cost.profile.paged_again_share * (setting.model.heads // setting.model.kv_heads - 1)
    return cost.attention_s(kv_bytes, attention_flops(setting.model, 1), setting.dtype, kv_format)


def rounding_s(cost: CostModel, setting: Setting, tokens: int) -> float:
    """Of so many tokens' keys and values, one layer, to what HBM holds them in: at the rate of heads of 128 channels."""
    slower = (1 + _RANGE_CHANNELS / setting.model.head_dim) / (1 + _RANGE_CHANNELS / 128)
    return slower * cost.conversion_s(3 * tokens * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu))


class _Programs(NamedTuple):
    """Captured attention of one query head and sequence each, as an H200's kernels do it: those that a multiprocessor has at
    once, a token's turn beside that of a warp by itself, as many turns as all that run at once take before their first, and
    launches before any.
    """

    at_once: float
    turn: float
    begun: float
    launches: float = 0.0

    @classmethod
    def of(cls, setting: Setting) -> "_Programs":
        """Over INT8 rows are widened, in a list's order ranges come with each token: both take registers, as a list does by
        itself, which is read before what it names.
        """
        channels = setting.model.head_dim
        if not setting.kv_format.gpu.is_grouped:
            if setting.attention.is_dense:
                return cls(at_once=24 if channels <= 64 else 16, turn=1.0, begun=0)
            if _weighs(setting):
                return cls(at_once=24 if channels <= 64 else 16, turn=1.15, begun=10)
            if channels <= 64:
                return cls(at_once=24, turn=1.1, begun=20)
            return cls(at_once=12, turn=1.1, begun=20, launches=0.5)
        if setting.attention.is_dense:
            return cls(at_once=12, turn=1.0, begun=100)
        return cls(at_once=12 * min(1.0, 96 / channels), turn=1.1, begun=125)


def _weighs(setting: Setting) -> bool:
    """Whether attention writes what it weighs tokens by, to choose from."""
    return setting.attention.selector.chooses_ahead


class _GroupedPrograms(NamedTuple):
    """The same of all query heads that share keys, over a part of their tokens, with another kernel that merges: launches before
    the first token, besides those for each round of programs, a token's turn, and how many times as long as from one row
    after the other its bytes take.
    """

    launches: float
    each_round: float
    turn: float
    read: float = 1.0

    @classmethod
    def of(cls, setting: Setting) -> "_GroupedPrograms":
        """Over INT8 a kernel ahead stores the newborn token."""
        if setting.kv_format.gpu is KvFormat.NATIVE:
            if setting.attention.is_dense:
                return cls(launches=0.0, each_round=2.0, turn=0.18, read=1.05)
            return cls(launches=0.3 + 0.3 * _weighs(setting), each_round=2.0, turn=0.18, read=1.28)
        if setting.attention.is_dense:
            return cls(launches=0.5, each_round=1.4, turn=1.0)
        return cls(launches=0.8, each_round=2.2, turn=2.15)


def attention_prices(cost: CostModel, setting: Setting, sequences: int, *, away: bool = False) -> tuple[float, float]:
    """Before the first token, and for each that each of ``sequences`` attends to. What streams in is gone over by other programs,
    and takes no less.
    """
    waves = is_captured(setting) and setting.admission is not Admission.CONTINUOUS
    if not (waves and setting.kv_format.gpu is KvFormat.NATIVE and setting.model.heads > setting.model.kv_heads):
        return _setup_s(cost, setting, sequences, away=away), _s_per_kept(cost, setting, sequences, away=away)
    if _in_parts(setting, away=away):
        return _grouped_prices(cost, setting, sequences, away=away)
    setup_s, kept_s = _setup_s(cost, setting, sequences, away=away), _s_per_kept(cost, setting, sequences, away=away)
    near_setup_s, near_kept_s = _grouped_prices(cost, setting, sequences, away=False)
    lacking_s = (near_setup_s - setup_s + (near_kept_s - kept_s) * tokens for tokens in _kept_range(setting))
    return setup_s + max(0.0, *lacking_s), kept_s


def _kept_range(setting: Setting) -> tuple[int, int]:
    """The fewest and the most tokens that a decode step attends to."""
    work = setting.workload
    few, most = (setting.attention.kept_tokens(cached) for cached in (work.prompt_tokens + 1, work.cached_tokens))
    return few, most


def _grouped_prices(cost: CostModel, setting: Setting, sequences: int, *, away: bool) -> tuple[float, float]:
    """Programs of a next round begin while others read: both are felt, less than one after the other. A line through what the
    fewest and the most tokens take that a step attends to, which is above what those between them do.
    """
    model, kind, (few, most) = setting.model, _GroupedPrograms.of(setting), _kept_range(setting)
    begun_s = cost.launch_s(kind.each_round * _grouped_rounds(cost, model, sequences))
    read_s = kind.read * sequences * attention_s_per_token(cost, setting)
    at_few_s = hypot(begun_s, read_s * few)
    slope_s = (hypot(begun_s, read_s * most) - at_few_s) / (most - few) if most > few else read_s**2 * few / at_few_s
    setup_s = _ahead_s(cost, setting, away=away) + cost.launch_s(kind.launches)
    return setup_s + at_few_s - slope_s * few, slope_s + _part_turn_s(cost, setting, sequences)


def _s_per_kept(cost: CostModel, setting: Setting, sequences: int, *, away: bool) -> float:
    """A token of each of ``sequences``: what HBM takes for all, and what a head's program takes for one after the other.

    Few sequences wait for the programs, many for HBM; in between both are felt, less than one after the other. Where there are
    more programs than the GPU has room for, the others follow once those have ended.
    """
    turn_s = attention_turn_s(cost, setting, sequences, away=away)
    grouped = setting.model.heads > setting.model.kv_heads and _in_parts(setting, away=away)
    if not is_captured(setting) or grouped:
        return hypot(sequences * attention_s_per_token(cost, setting), turn_s)
    return float(attended_s(cost, setting, float(sequences), 1.0, turn_s))


def attended_s(cost: CostModel, setting: Setting, sequences: Amount, tokens: Amount, in_turn_s: Amount) -> Amount:
    """What a captured step's programs take, one for each head of ``sequences``, which have so many ``tokens`` in the mean, where
    the longest goes over its own in ``in_turn_s``: round by round.
    """
    heads, room = setting.model.heads, _programs_at_once(cost, setting)
    each_s = attention_s_per_token(cost, setting) / heads * tokens
    rounds, rest = np.divmod(sequences * heads, room)

    def together_s(programs: Any) -> Any:
        return np.hypot(programs * each_s, in_turn_s)

    seconds: Any = rounds * together_s(room) + (rest > 0) * together_s(rest)
    return cast(Amount, seconds)


def _programs_at_once(cost: CostModel, setting: Setting) -> int:
    return floor(_Programs.of(setting).at_once * cost.machine.gpu.sm_count)


def _setup_s(cost: CostModel, setting: Setting, sequences: int, *, away: bool) -> float:
    """Before its first token: a kernel's; of a step in pieces their begins too, another a layer where its weights stream in or a
    prefix is forwarded. What streams in INT8, beside tokens computed again, has a kernel ahead, and is priced as if all were in
    INT8. Elsewhere what programs do before they read, or begins of more kernels where grouped heads are gone over in parts.
    """
    model, kv_format = setting.model, setting.kv_format.gpu
    setup_s, captured = cost.profile.attention_setup_s, is_captured(setting)
    if captured and streams(setting, away=away):
        pieces = 0 if forwards(setting) else pieces_begun(setting)
        ahead = _STORED_LAUNCHES * (kv_format is not KvFormat.NATIVE)  # stores the newborn token
        return setup_s + pieces * cost.profile.piece_setup_s + cost.launch_s(ahead)
    if not captured:
        return setup_s
    setup_s = _ahead_s(cost, setting, away=away)
    if _in_parts(setting, away=away) and model.heads > model.kv_heads:
        kind = _GroupedPrograms.of(setting)
        return setup_s + cost.launch_s(kind.launches + kind.each_round * _grouped_rounds(cost, model, sequences))
    return setup_s + cost.launch_s(_Programs.of(setting).launches) + sequences * attention_begun_s(cost, setting)


def _ahead_s(cost: CostModel, setting: Setting, *, away: bool) -> float:
    """Of a kernel over what is in HBM by then."""
    return cost.profile.attention_setup_s + cost.launch_s(_AHEAD_LAUNCHES * (away and gathers_ahead(setting)))


def least_attention_s(cost: CostModel, setting: Setting, sequences: int) -> tuple[float, float]:
    """Before the first token, and for each of ``sequences``' tokens: what no kernels fall below, whatever they stage, forward or
    go over in parts.
    """
    return cost.profile.attention_setup_s, sequences * attention_s_per_token(cost, setting)


def attention_begun_s(cost: CostModel, setting: Setting) -> float:
    """Of each sequence, what a captured step's programs keep multiprocessors from before their first token."""
    kind = _Programs.of(setting)
    turn_s = kind.turn * cost.attention_turn_s(setting.model.head_dim, setting.kv_format.gpu)
    return kind.begun * turn_s * setting.model.heads / _programs_at_once(cost, setting)


def pieces_begun(setting: Setting) -> int:
    """What a layer of a step in pieces waits for, in begins of one: one that forwards a prefix begins later, 22 us on an H200."""
    return 1 + bool(setting.weights_on_host) + (setting.recompute is Recompute.TOKENS)


def attention_turn_s(cost: CostModel, setting: Setting, sequences: int, *, away: bool = False) -> float:
    """A token of the programs that go over it: in parts side by side, but for those over pages and of steps in pieces.

    Programs over grouped heads that widen what they read keep their multiprocessor busy: those of the next round add to them.
    """
    model, kv_format, captured = setting.model, setting.kv_format.gpu, is_captured(setting)
    if captured and not _in_parts(setting, away=away):
        paged = setting.admission is Admission.CONTINUOUS
        return cost.attention_turn_s(model.head_dim, kv_format, paged=paged, streamed=not paged)
    if captured and model.heads > model.kv_heads:
        return _part_turn_s(cost, setting, sequences) * _grouped_rounds(cost, model, sequences)
    return (_Programs.of(setting).turn if captured else 1.0) * cost.attention_turn_s(model.head_dim, kv_format)


def _part_turn_s(cost: CostModel, setting: Setting, sequences: int) -> float:
    """A token's over grouped heads, one of whose parts goes over it."""
    model, kind = setting.model, _GroupedPrograms.of(setting)
    share = kind.turn / attention_parts(sequences, model.kv_heads, model.heads)
    return share * cost.attention_turn_s(model.head_dim, setting.kv_format.gpu)


def _grouped_rounds(cost: CostModel, model: ModelSpec, sequences: int) -> float:
    """Of programs over grouped heads, one for each key head and part, as many at once as multiprocessors have."""
    programs = sequences * model.kv_heads * attention_parts(sequences, model.kv_heads, model.heads)
    return max(1.0, programs / (_GROUPED_PROGRAMS * cost.machine.gpu.sm_count))


def _in_parts(setting: Setting, *, away: bool) -> bool:
    """Of a captured step: neither over pages nor streamed."""
    return setting.admission is not Admission.CONTINUOUS and not streams(setting, away=away)

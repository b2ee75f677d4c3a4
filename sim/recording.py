"""Selections that a run recorded, and the traffic that follows from them exactly where an access profile only expects it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sim.access import AGES
from sim.attention import Selector
from sim.checks import require_whole
from sim.flows import Flows, flows_of, home_columns, homed_on_host
from sim.plan import Placement, Plan, Recompute, WriteBack

Picks: TypeAlias = tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]  # [decode step, layer, sequence, pick]
_Whole: TypeAlias = NDArray[np.signedinteger[Any]]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSelection:
    """The older tokens that a selector picked: ``picks[0]`` are the first decode step's, which is row 1 of a plan's homes.

    A token is named by its place in its sequence, the prompt's first one being 0. The newest tokens, which every step
    attends to, are not listed.
    """

    selector: Selector
    picks: Picks

    def __post_init__(self) -> None:
        for step, layer, sequence, picks in _every(self.picks):
            where = _place(step, layer, sequence)
            if len(set(picks)) < len(picks):
                raise ValueError(f"{where}: {len(picks)} picks, must name each token once")
            for token in picks:
                require_whole(f"{where}: pick", token, at_least=0)


def replayed_flows(plan: Plan, recording: RecordedSelection) -> Flows:
    """Traffic of ``plan`` when its selector picks what ``recording`` says: the mean over layers and sequences.

    A picked token is fetched where its home is off HBM; with ``resident`` placement only if the step before did not
    attend to it, for what it attends to has a copy until it is left out. After the prefill nothing but the newest
    tokens has one. Dropped tokens are those attended to the longest ago, the oldest first among equals; the rest lie
    oldest first as the plan says, and a boundary between two homes never moves back.

    It says what was picked, not which tokens were wanted least: homes go by age here, as when kernel after kernel is
    launched, also where a captured step goes by that.

    Raises ValueError where the recording is not one of this plan.
    """
    _require_same_shape(plan, recording)
    expected = flows_of(plan, home_columns(plan.homes))
    replay = _Replay(plan, recording)
    fetched, reprojected = replay.fetched()
    from_host = plan.setting.recompute is Recompute.ACTIVATIONS_HOST
    at_birth = plan.setting.write_back is WriteBack.AT_BIRTH
    return replace(
        expected,
        fetched_kv=(fetched - reprojected) / replay.lanes,
        fetched_inputs=(reprojected if from_host else np.zeros_like(reprojected)) / replay.lanes,
        reprojected=reprojected / replay.lanes,
        written_kv=expected.written_kv if at_birth else replay.written() / replay.lanes,
        on_host=homed_on_host(plan.setting, home_columns(plan.homes)),
    )


def picked_ages(plan: Plan, recording: RecordedSelection) -> list[tuple[float, ...]]:
    """Of each decode step's picks the shares on the oldest eighth, two eighths and so on of its living older tokens.

    Each pick counts for the whole of its own share of them, evenly, however few there are.
    """
    _require_same_shape(plan, recording)
    replay = _Replay(plan, recording)
    return [replay.ages(step) for step in range(1, replay.steps)]


def picked_flags(layers: Sequence[Sequence[Sequence[int]]], tokens: int) -> Flags:
    """Whether a lane, layer by layer of all sequences, picks a token, [lane, token]; of one step's picks."""
    lanes = [picks for layer in layers for picks in layer]
    picked = np.zeros((len(lanes), tokens), dtype=bool)
    rows = np.repeat(np.arange(len(lanes)), [len(picks) for picks in lanes])
    picked[rows, np.fromiter(chain.from_iterable(lanes), np.int64)] = True
    return picked


class _Replay:
    """All layers of all sequences side by side, each a lane; arrays are [lane, token]."""

    def __init__(self, plan: Plan, recording: RecordedSelection) -> None:
        setting, counts = plan.setting, plan.setting.token_counts
        self.homes, self.steps = plan.homes, plan.homes.steps
        self.resident = setting.placement is Placement.RESIDENT
        self.lanes = setting.model.layers * setting.workload.batch
        self.cached = counts.cached
        self.window_start = tuple(n - near for n, near in zip(counts.cached, counts.local, strict=True))
        self.tokens = np.arange(counts.cached[-1])
        self._picks = recording.picks
        self._require_older(counts.selected)
        self.dropped_at = self._dropped_at()
        self.off_hbm = self._boundaries(
            [near + far for near, far in zip(plan.homes.host_kv, plan.homes.activations, strict=True)]
        )
        self.inputs = self._boundaries(plan.homes.activations)

    def fetched(self) -> tuple[_Whole, _Whole]:
        """Tokens of all lanes that each step brings to the GPU, and those of them that are projected from their inputs."""
        fetched, reprojected = np.zeros((2, self.steps), dtype=np.int64)
        attended = self._newest(0)
        for step in range(1, self.steps):
            picked = self._picked(step)
            moved = picked & (self.tokens < self.off_hbm[step][:, None])
            if self.resident:
                moved &= ~attended
                attended = picked | self._newest(step)
            fetched[step] = moved.sum()
            reprojected[step] = (moved & (self.tokens < self.inputs[step][:, None])).sum()
        return fetched, reprojected

    def written(self) -> _Whole:
        """Tokens of all lanes whose KV leaves HBM for the host during each step."""
        written = np.zeros(self.steps, dtype=np.int64)
        written[0] = self.lanes * self.homes.host_kv[0]
        for step in range(self.steps - 1):
            leaves = self._living(step + 1) & (self.tokens >= self.off_hbm[step][:, None])
            leaves &= self.tokens < self.off_hbm[step + 1][:, None]
            written[step] += (leaves & (self.tokens >= self.inputs[step + 1][:, None])).sum()
        return written

    def ages(self, step: int) -> tuple[float, ...]:
        """See ``picked_ages``."""
        older = self._living(step) & (self.tokens < self.window_start[step])
        picked, turn, number = self._picked(step), np.cumsum(older, axis=1), older.sum(axis=1, keepdims=True)
        if not picked.any():
            return tuple(share / AGES for share in range(1, AGES))
        return tuple(
            float(np.clip(number * share / AGES - turn + 1, 0.0, 1.0)[picked].mean()) for share in range(1, AGES)
        )

    def _newest(self, step: int) -> Flags:
        newest = (self.tokens >= self.window_start[step]) & (self.tokens < self.cached[step])
        return np.broadcast_to(newest, (self.lanes, len(self.tokens)))

    def _picked(self, step: int) -> Flags:
        return picked_flags(self._picks[step - 1], len(self.tokens))

    def _living(self, step: int) -> Flags:
        living: Flags = (self.dropped_at > step) & (self.tokens < self.cached[step])
        return living

    def _dropped_at(self) -> _Whole:
        """The step from which on a token has no home, beyond the last one if it always has."""
        newest_until = np.searchsorted(self.window_start, self.tokens, side="right") - 1
        last = np.tile(newest_until, (self.lanes, 1))  # -1: attended to before the prefill's last step, if at all
        for step in range(1, self.steps):
            last[self._picked(step)] = step
        order = np.argsort(last, axis=1, kind="stable")
        turn = np.empty_like(order)
        np.put_along_axis(turn, order, np.broadcast_to(self.tokens, order.shape), axis=1)
        dropped_at = np.searchsorted(self.homes.dropped, turn, side="right")
        self._require_kept(last, dropped_at)
        return dropped_at

    def _boundaries(self, beyond: Sequence[int]) -> _Whole:
        """The token before which lie the oldest ``beyond`` living ones, [step, lane]."""
        bounds = np.zeros((self.steps, self.lanes), dtype=np.int64)
        for step, tokens in enumerate(beyond):
            if tokens:
                bounds[step] = (np.cumsum(self._living(step), axis=1) < tokens).sum(axis=1) + 1
        return np.maximum.accumulate(bounds)

    def _require_older(self, selected: tuple[int, ...]) -> None:
        for step, layer, sequence, picks in _every(self._picks):
            where, older = _place(step, layer, sequence), self.window_start[step]
            if len(picks) > selected[step]:
                raise ValueError(f"{where}: {len(picks)} picks, must be at most the plan's {selected[step]}")
            if picks and max(picks) >= older:
                raise ValueError(f"{where}: pick={max(picks)}, must be one of the {older} older tokens")

    def _require_kept(self, last: _Whole, dropped_at: _Whole) -> None:
        wrong = np.argwhere(dropped_at <= last)
        if len(wrong):
            lane, token = (int(number) for number in wrong[0])
            layer, sequence = divmod(lane, self.lanes // len(self._picks[0]))
            step = int(last[lane, token])
            raise ValueError(
                f"{_place(step, layer, sequence)}: attends to token {token}, the plan has "
                f"{self.homes.dropped[step]} dropped by then and too few others to drop"
            )


def _require_same_shape(plan: Plan, recording: RecordedSelection) -> None:
    setting = plan.setting
    if recording.selector is not setting.attention.selector:
        raise ValueError(f"recording.selector={recording.selector}, must be the plan's {setting.attention.selector}")
    if recording.selector is Selector.DENSE:
        raise ValueError("recording.selector=dense, selects every token: simulate the plan without a recording")
    _require_count("decode steps", len(recording.picks), setting.workload.decode_steps)
    for layers in recording.picks:
        _require_count("layers", len(layers), setting.model.layers)
        for sequences in layers:
            _require_count("sequences", len(sequences), setting.workload.batch)


def _require_count(what: str, got: int, needed: int) -> None:
    if got != needed:
        raise ValueError(f"recording of {got} {what}, must have the plan's {needed}")


def _every(picks: Picks) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    for step, layers in enumerate(picks, start=1):
        for layer, sequences in enumerate(layers):
            for sequence, lane in enumerate(sequences):
                yield step, layer, sequence, lane


def _place(step: int, layer: int, sequence: int) -> str:
    return f"recording at step {step}, layer {layer}, sequence {sequence}"

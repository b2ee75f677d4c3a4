"""Slots that waves lay out once and for all, in tokens of one sequence: most of them follow from what a plan's steps need."""

from itertools import accumulate
from math import ceil, sqrt
from typing import NamedTuple

from sim.flows import flows_of, home_columns
from sim.kv import GROUP_TOKENS, SCALE_BYTES, KvFormat, kv_layer_bytes
from sim.occupancy import held_state_bytes
from sim.plan import Placement, Plan, Setting, WriteBack


def slots_by(plan: Plan) -> tuple[int, ...]:
    """Slots of a lane in HBM that any row up to each has needed: free slots are taken from the first on."""
    return tuple(accumulate((hbm + copies for hbm, copies in zip(plan.homes.hbm, plan.homes.copies, strict=True)), max))


def hbm_slots(plan: Plan) -> int:
    """Slots of a lane in HBM: the most that any row needs."""
    return slots_by(plan)[-1]


def host_slots_by(plan: Plan) -> tuple[int, ...]:
    """Slots of a lane on the host up to each row. Where tokens die it is not known where: room for all that live."""
    homes, counts = plan.homes, plan.setting.token_counts
    at_birth = plan.setting.write_back is WriteBack.AT_BIRTH
    if not at_birth and not any(homes.host_kv):
        return (0,) * homes.steps
    rows = zip(counts.cached, homes.hbm, homes.activations, homes.dropped, strict=True)
    anywhere = at_birth or counts.dead[-1]
    return tuple(
        accumulate((cached - kept - gone - (0 if anywhere else near) for cached, near, kept, gone in rows), max)
    )


class WindowSize(NamedTuple):
    """Of a lane under captured sparse window attention: entries, one more than ever live, queries whose weights over them
    are remembered, and the most that a step attends to.
    """

    entries: int
    queries: int
    width: int

    @classmethod
    def of(cls, setting: Setting) -> "WindowSize":
        counts = setting.token_counts
        return cls(
            entries=1 + max(cached - gone for cached, gone in zip(counts.cached, counts.dead, strict=True)),
            queries=max(1, *map(setting.attention.history_steps, counts.cached)),
            width=most_attended(setting),
        )


def keeps_newest(plan: Plan) -> bool:
    """Whether captured sparse window attention has the newest tokens in HBM, and gathers what it attends to of the others."""
    return plan.setting.placement is Placement.RECENT and any(plan.homes.host_kv)


class Room(NamedTuple):
    """Of a lane where HBM holds the newest tokens: slots of it in each layer, and rows in each buffer of the stage."""

    slots: int
    rows: int

    @classmethod
    def of(cls, plan: Plan) -> "Room":
        """A row for each token of the host's that any step may select, as far as the budget has room beside the slots.

        The plan's steps with most tokens in HBM have nothing staged, but slots and stage are laid out once and for all: some
        slots give way to the rows that lanes will hardly ever want more of.
        """
        setting, model, homes = plan.setting, plan.setting.model, home_columns(plan.homes)
        free = _free_layer_tokens(setting)
        most = min(host_slots_by(plan)[-1], max(setting.token_counts.selected))
        likely = most_likely(float(flows_of(plan, homes).fetched_kv.max()))
        beside = int((free - buffers(plan) * min(most, likely)) // model.layers)
        slots = min(hbm_slots(plan), max(beside, *setting.slots_needed))
        return cls(slots=slots, rows=max(0, min(most, int((free - model.layers * slots) // buffers(plan)))))


def _free_layer_tokens(setting: Setting) -> float:
    """How many tokens of one layer, and one sequence, the budget has room for beside selection state; over INT8 counted as it
    lies in HBM, with the ranges and keys there.
    """
    model = setting.model
    if not setting.kv_format.are_native:
        return model.layers * _rounded_layer_bytes(setting) / slot_layer_bytes(setting)
    state_bytes = model.layers * float(held_state_bytes(setting).max())
    return (setting.kv_budget_bytes / setting.concurrency - state_bytes) / slot_layer_bytes(setting)


def most_likely(expected: float) -> int:
    """Of so many tokens that are ``expected`` to be fetched, picked one by one: three standard deviations more."""
    return ceil(expected + 3 * sqrt(expected))


def buffers(plan: Plan) -> int:
    """Of the stage. A model of one layer has nothing to fetch ahead of."""
    ahead, layers = plan.setting.prefetch_layers, plan.setting.model.layers
    return 1 if layers <= ahead else ahead + 1


def most_attended(setting: Setting) -> int:
    """Tokens that any step attends to."""
    counts = setting.token_counts
    return max(near + far for near, far in zip(counts.local, counts.selected, strict=True))


def window_slots(plan: Plan) -> int:
    """In HBM, under captured sparse window attention that keeps there what is wanted most."""
    rounded = not plan.setting.kv_format.are_native
    most = min(WindowSize.of(plan.setting).entries, hbm_slots(plan))
    return min(most, rounded_window_slots(plan.setting)) if rounded else most


def rounded_window_slots(setting: Setting) -> int:
    """That the budget has room for beside INT8's ranges, the open group's keys and past queries' weights."""
    return max(0, _rounded_layer_bytes(setting) // slot_layer_bytes(setting))


def _rounded_layer_bytes(setting: Setting) -> int:
    """Of the budget, for one sequence's levels and ranges of values in one layer; below 0 where there is none."""
    model, size, window = setting.model, setting.dtype.size_bytes, WindowSize.of(setting)
    keys = (key_groups(setting) * SCALE_BYTES + GROUP_TOKENS * size) * model.kv_dim
    lane_bytes = setting.kv_budget_bytes // (model.layers * setting.concurrency) - keys
    return lane_bytes - window.queries * window.entries * size


def dense_slots(plan: Plan) -> int:
    """In HBM, under captured dense attention that reads the others where they lie."""
    most = min(plan.setting.workload.cached_tokens, hbm_slots(plan))
    return most if plan.setting.kv_format.are_native else min(most, rounded_dense_slots(plan.setting))


def rounded_dense_slots(setting: Setting) -> int:
    """That the budget has room for beside INT8's ranges of keys and the open group's keys."""
    model = setting.model
    ranges, keys = key_groups(setting) * SCALE_BYTES, GROUP_TOKENS * setting.dtype.size_bytes  # of a channel
    bytes_per_head = setting.kv_budget_bytes // (model.layers * setting.concurrency * model.kv_heads)
    return max(0, bytes_per_head - (ranges + keys) * model.head_dim) // head_bytes(model.head_dim)


def slot_layer_bytes(setting: Setting) -> int:
    """Of a slot in one layer: a token's keys and values; in INT8 ranges of keys are not among them."""
    model = setting.model
    if setting.kv_format.are_native:
        return kv_layer_bytes(model, setting.dtype, KvFormat.NATIVE)
    return model.kv_heads * head_bytes(model.head_dim)


def head_bytes(channels: int) -> int:
    """Of one token and head in INT8: its levels, and the range of its values."""
    return 2 * channels + SCALE_BYTES


def key_groups(setting: Setting) -> int:
    """Whose ranges stay in HBM."""
    return max(1, setting.workload.cached_tokens // GROUP_TOKENS)

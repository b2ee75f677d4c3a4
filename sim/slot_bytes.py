"""Bytes of HBM that a captured wave's slots take, of one sequence: keys and values, and all that choices are made from.

Every array is there from the start, at its largest. Left out is what does not grow with sequences, or with neither tokens
nor layers. Plans are judged by ``sim.occupancy.occupancy_of``, which knows less: selection state as the selector needs it.
"""

from math import ceil

from sim.attention import PAGE_TOKENS, Selector
from sim.capture import is_captured, streams
from sim.flows import flows_of, home_columns, keeps_away
from sim.kv import GROUP_TOKENS, SCALE_BYTES, open_group_bytes
from sim.plan import Admission, Plan, Setting
from sim.slots import (
    Room,
    WindowSize,
    buffers,
    dense_slots,
    hbm_slots,
    keeps_newest,
    key_groups,
    most_attended,
    slot_layer_bytes,
    window_slots,
)

_NUMBER = 4  # bytes: int32, or float32
_MOVE = 4 * _NUMBER  # of an entry: from where to where, near and far


def slots_bytes(plan: Plan) -> int | None:
    """Of all layers; None where slots are laid out otherwise: for pages, for what streams in, and where nothing is captured."""
    setting, selector = plan.setting, plan.setting.attention.selector
    if not is_captured(setting) or setting.admission is not Admission.WAVES or plan.homes.steps == 1:
        return None
    if selector is Selector.SWA:
        return _recent_bytes(plan) if keeps_newest(plan) else _window_bytes(plan, window_slots(plan))
    if selector is Selector.PAGES:
        return _recall_bytes(plan)
    if streams(setting, away=keeps_away(flows_of(plan, home_columns(plan.homes)))):
        return None
    return setting.model.layers * _held_layer_bytes(setting, dense_slots(plan))


def _held_layer_bytes(setting: Setting, slots: int) -> int:
    """Keys and values of so many tokens; in INT8 also ranges of all keys, and those of the open group."""
    model, formats, held = setting.model, setting.kv_format, slots * slot_layer_bytes(setting)
    if formats.are_native:
        return held
    ranges = key_groups(setting) * model.kv_dim * SCALE_BYTES
    return held + ranges + open_group_bytes(model, setting.dtype, formats.gpu)


def _window_bytes(plan: Plan, slots: int) -> int:
    """Under sparse window attention, with so many ``slots``."""
    setting = plan.setting
    named = 0 if setting.kv_format.are_native else _named_layer_bytes(setting)
    return setting.model.layers * (_held_layer_bytes(setting, slots) + _choice_layer_bytes(setting) + named)


def _choice_layer_bytes(setting: Setting) -> int:
    """What past queries paid each entry; its rank, position, last use, place and move; the step's list, and what its heads
    score there, each with its peak and sum; how many are listed, and moved.
    """
    entries, queries, width = WindowSize.of(setting)
    remembered = queries * entries * setting.dtype.size_bytes
    scored = setting.model.heads * (width + 2) * _NUMBER
    return remembered + entries * (4 * _NUMBER + _MOVE) + width * _NUMBER + scored + 2 * _NUMBER


def _named_layer_bytes(setting: Setting) -> int:
    """In INT8: the list's positions, where those of the open group come and lie, and how many followed to the host."""
    return (most_attended(setting) + 2 * GROUP_TOKENS + 1) * _NUMBER


def _recent_bytes(plan: Plan) -> int:
    """The stage, and which tokens come to it."""
    setting, room = plan.setting, Room.of(plan)
    stage = buffers(plan) * room.rows * slot_layer_bytes(setting)
    return _window_bytes(plan, room.slots) + stage + setting.model.layers * (room.rows + 2) * _NUMBER


def _recall_bytes(plan: Plan) -> int:
    """Under page digests: of a layer slots, a digest of each page and whether it is taken, where each token lies and which
    each slot holds, and fetched tokens of each step; besides, shared by all layers, a step's scores, lists and fetches.
    """
    setting, model, slots = plan.setting, plan.setting.model, hbm_slots(plan)
    cached, width = setting.workload.cached_tokens, most_attended(setting)
    pages = ceil(cached / PAGE_TOKENS)
    digests = pages * 2 * model.kv_dim * setting.dtype.size_bytes
    noted = (pages + cached + slots + plan.homes.steps) * _NUMBER
    shared = (model.heads * (pages + 2) + slots + 3 * width + 1) * _NUMBER
    return model.layers * (_held_layer_bytes(setting, slots) + digests + noted) + shared

"""What an allocator will have given out at most, for comparison with a device's own count: plans reckon more carefully."""

from math import ceil

import numpy as np

from sim.capture import is_captured
from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.footprint import activation_bytes, largest_matrix_entries, prefill_rows
from sim.forecast import static_hbm_bytes
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan, Setting
from sim.scheduled import admit
from sim.slot_bytes import slots_bytes
from sim.spec import DType, WeightFormat


def peak_allocated_bytes(plan: Plan, cost: CostModel) -> int:
    """Weights, workspace, what libraries keep, and the KV pools, which are laid out once and for all.

    A prefill pass holds its keys and values among its activations: the room that the plan sets aside for a prefill that
    overflows is not taken besides.
    """
    setting = plan.setting
    libraries = multiplying_streams(setting) * round(cost.profile.library_bytes)
    passed = _passed_rows(plan)
    unused = _never_passed_bytes(setting, passed) + _turned_in_place_bytes(setting, passed)
    static = static_hbm_bytes(setting) - unused + libraries
    return static + ceil(_pool_bytes(plan)) + _whole_wave_bytes(setting) + _widening_bytes(setting)


def multiplying_streams(setting: Setting) -> int:
    """What is captured ran once in a stream beside the main one."""
    return 1 + is_captured(setting)


def _pool_bytes(plan: Plan) -> float:
    setting, homes = plan.setting, home_columns(plan.homes)
    if setting.admission is Admission.CONTINUOUS:
        return setting.kv_budget_bytes
    laid_out = slots_bytes(plan)
    if laid_out is not None:
        return setting.concurrency * laid_out
    held = occupancy_of(plan, homes, flows_of(plan, homes)).hbm
    return setting.concurrency * float(held[1:].max(initial=0.0) or held[0])


def _passed_rows(plan: Plan) -> int:
    """Of the largest prefill pass: under continuous admission pages may do for fewer prompts than may run at once, and one that
    returns may have more tokens than a pass has room for.

    Passes of one step that is launched, of other lengths each, are taken alike; the first step, with most newcomers, has one.
    """
    setting = plan.setting
    room = prefill_rows(setting.concurrency, setting.workload.prompt_tokens)
    if setting.admission is not Admission.CONTINUOUS:
        return room
    homes = home_columns(plan.homes)
    planned = admit(setting, occupancy_of(plan, homes, flows_of(plan, homes)))
    if is_captured(setting):
        return int(planned.prefilled_tokens.max())
    return min(room, int((planned.prefilled_tokens / np.maximum(planned.prefill_lengths, 1)).max()))


def _never_passed_bytes(setting: Setting, passed: int) -> int:
    """Of the workspace, what rows take that no pass has."""
    room = prefill_rows(setting.concurrency, setting.workload.prompt_tokens)
    most, rows = (
        activation_bytes(setting.model, setting.dtype, max(setting.concurrency, one)) for one in (room, passed)
    )
    return most - rows


def _turned_in_place_bytes(setting: Setting, passed: int) -> int:
    """Rotated queries and keys, which the workspace has room for: where steps are captured prompts' are turned where they lie."""
    model = setting.model
    if model.positions or not is_captured(setting):
        return 0
    return passed * (model.query_dim + model.kv_dim) * setting.dtype.size_bytes


def _whole_wave_bytes(setting: Setting) -> int:
    """Where nothing is captured, all passes go through a layer before any goes on to the next: rows of all of them."""
    model, prompt = setting.model, setting.workload.prompt_tokens
    rows = setting.concurrency * prompt
    if is_captured(setting) or rows == prefill_rows(setting.concurrency, prompt):
        return 0
    row = 2 * model.hidden + model.query_dim + 2 * model.kv_dim
    return rows * row * setting.dtype.size_bytes


def _widening_bytes(setting: Setting) -> int:
    """Where nothing is captured torch widens a matrix in steps: levels, by ones where they are stored in pairs, become float32
    and then, with them still there, what adds them up: fp16, or float32. Of that the weights have room for the result.
    """
    if is_captured(setting) or setting.weight_format is WeightFormat.NATIVE:
        return 0
    added_up = 2 if setting.dtype is DType.FP16 else 4
    entry = (setting.weight_format is WeightFormat.INT4) + 4 + added_up - setting.dtype.size_bytes
    return entry * largest_matrix_entries(setting.model)

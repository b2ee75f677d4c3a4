"""Bytes that a plan's KV pools hold at each step, of one sequence."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sim.attention import Attention
from sim.capture import is_captured, keeps_key_ranges, keeps_open_group, streams_levels
from sim.counts import Column, counts_of
from sim.flows import Flows, Homes
from sim.kv import GROUP_TOKENS, KvFormat, inputs_layer_bytes, key_range_bytes, kv_layer_bytes, open_group_bytes
from sim.plan import Plan, Recompute, Setting, WriteBack
from sim.spec import DType, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Bytes that the KV pools of one sequence hold during each step, all layers."""

    hbm: Column
    host: Column


def offloaded_token_bytes(setting: Setting) -> float:
    """What stays in HBM of a living token whose KV does not, in one layer."""
    state = setting.attention.offloaded_state_bytes_per_token(setting.model, setting.dtype)
    return state + key_range_bytes(setting.model) * keeps_key_ranges(setting)


def occupancy_of(plan: Plan, homes: Homes, flows: Flows) -> Occupancy:
    """What the KV pools hold, scales, selection state, staging and saved inputs included. Capacity is judged by this alone."""
    setting, counts = plan.setting, counts_of(plan.setting)
    model, dtype, formats = setting.model, setting.dtype, setting.kv_format
    gpu_kv, host_kv = (kv_layer_bytes(model, dtype, tier) for tier in (formats.gpu, formats.host))
    slots = homes.hbm + homes.copies
    hbm = slots * gpu_kv + held_state_bytes(setting)
    if offloaded_bytes := offloaded_token_bytes(setting):
        hbm += (counts.cached - counts.dead - slots) * offloaded_bytes
    host = _host_tokens(setting, flows) * host_kv
    if setting.recompute.from_activations:
        holder = hbm if setting.recompute is Recompute.ACTIVATIONS_HBM else host
        saved_tokens = np.minimum(counts.cached, plan.saved_inputs_tokens) - homes.dropped
        holder += np.maximum(0.0, saved_tokens) * inputs_layer_bytes(model, dtype)
    return Occupancy(hbm=model.layers * hbm + _staging_bytes(setting, homes, flows), host=model.layers * host)


def held_state_bytes(setting: Setting) -> Column:
    """HBM of one sequence and layer that no choice of homes changes: selection state, keys of an open group, and ranges of
    the dead ones' where they stay; where levels stream, of keys to come too: there is room for all ranges from the start.
    """
    work, dtype = setting.workload, setting.dtype
    state = _state_bytes(setting.attention, setting.model, dtype, work.prompt_tokens, work.output_tokens)
    if keeps_key_ranges(setting):
        state = state + counts_of(setting).dead * key_range_bytes(setting.model)
    if streams_levels(setting):
        cached = counts_of(setting).cached
        state = state + (max(cached[-1], GROUP_TOKENS) - cached) * key_range_bytes(setting.model)
    return state + open_group_bytes(setting.model, dtype, setting.kv_format.gpu)


def _host_tokens(setting: Setting, flows: Flows) -> Column:
    """Tokens whose KV takes host memory: those that it holds, or that are on their way there."""
    if setting.write_back is WriteBack.AT_BIRTH:
        return flows.on_host
    on_their_way = flows.written_kv.copy()
    on_their_way[0] -= flows.on_host[0]
    return flows.on_host + on_their_way


def reprojected_layer_bytes(setting: Setting) -> int:
    """Of a token that is projected again, staged: as it is computed in a captured step; launched by the host, as HBM has others."""
    kept = KvFormat.NATIVE if is_captured(setting) else setting.kv_format.gpu
    return kv_layer_bytes(setting.model, setting.dtype, kept)


def _staging_bytes(setting: Setting, homes: Homes, flows: Flows) -> Column:
    """Transient HBM: the ring of fetched layers, a layer's recomputed prefix, and two layers spilled in the prefill.

    Of a prefix that is forwarded, a layer's keys and values and, twice, its inputs: those of all sequences that go in, and
    what has come out. It goes through a layer in passes of no more rows than a prefill's, so that all else that a pass holds
    is ``footprint.workspace_bytes``. The keys and values of a few tokens that make the number up take the place of inputs.
    """
    model, dtype = setting.model, setting.dtype
    gpu_kv = kv_layer_bytes(model, dtype, setting.kv_format.gpu)
    native_kv = kv_layer_bytes(model, dtype, KvFormat.NATIVE)
    inputs = inputs_layer_bytes(model, dtype)
    buffers = setting.prefetch_layers + 1
    fetched = flows.fetched_kv
    if keeps_open_group(setting):  # read in place: the room is for ranges of the host's keys, which stay in HBM
        fetched = homes.host_kv * counts_of(setting).decoding
    staged = fetched * (buffers * gpu_kv)
    if setting.recompute is not Recompute.NONE:
        staged += flows.fetched_inputs * (buffers * inputs) + flows.reprojected * reprojected_layer_bytes(setting)
        staged += flows.forwarded * (native_kv + 2 * inputs)
    staged[0] += 2 * (setting.workload.prompt_tokens - homes.hbm[0]) * native_kv
    return staged


@lru_cache(maxsize=256)
def _state_bytes(attention: Attention, model: ModelSpec, dtype: DType, prompt_tokens: int, steps: int) -> Column:
    per_token = attention.state_bytes_per_token(model, dtype)
    cached = range(prompt_tokens, prompt_tokens + steps)
    return np.array([attention.state_bytes(n, dtype) + per_token * n for n in cached])

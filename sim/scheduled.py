"""Times of machine steps in which many ages decode and newcomers are prefilled (continuous admission).

Both pass through the layers, one after the other; a captured step decodes in all its lanes, idle ones too. Beside it newcomers
of any lengths pass together; launched kernel by kernel, those of one length.
"""

from dataclasses import replace

import numpy as np

from sim.admission import Rules, Schedule, schedule
from sim.attention import PAGE_TOKENS
from sim.attention_prices import (
    attended_s,
    attention_begun_s,
    attention_s_per_token,
    attention_turn_s,
    rounding_s,
)
from sim.capture import is_captured
from sim.cost import CostModel
from sim.counts import Column
from sim.flows import Flows
from sim.footprint import prefill_rows
from sim.gemms import LayerGemms, decoded_products_s, prompt_products_s
from sim.kv import KvFormat, kv_layer_bytes
from sim.launches import apart_operations
from sim.layer import ATTEND_OPS, QUERY_OPS, REST_OPS, LayerTimes
from sim.layer_prices import decode_launch_s, layer_prices
from sim.occupancy import Occupancy, held_state_bytes
from sim.passes import OPERATIONS
from sim.plan import Mechanism, Setting
from sim.prompt_prices import first_choice_s, prompt_launch_s, prompt_row_passes_s


def admit(setting: Setting, occupancy: Occupancy) -> Schedule:
    """Who runs when: ``occupancy`` is what one sequence holds at each of its steps."""
    return schedule(page_rules(setting, occupancy))


def page_rules(setting: Setting, occupancy: Occupancy) -> Rules:
    """The admission rule of ``setting``, for sequences that hold ``occupancy``; a step prefills what the workspace is for."""
    work = setting.workload
    return Rules(
        batch=work.batch,
        prompt_tokens=work.prompt_tokens,
        held_bytes=tuple(paged_bytes(setting, occupancy.hbm).tolist()),
        budget_bytes=setting.kv_budget_bytes,
        host_bytes=setting.machine.host.usable_bytes,
        most_sequences=setting.concurrency,
        prefill_tokens=max(prefill_rows(setting.concurrency, work.prompt_tokens), work.prompt_tokens),
        preemption=setting.preemption,
    )


def paged_bytes(setting: Setting, held_bytes: Column) -> Column:
    """In whole pages: what cached tokens take, and apart from them selection state and the open group's keys."""
    page_bytes = (
        PAGE_TOKENS * setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu)
    )
    state_bytes = setting.model.layers * held_state_bytes(setting)
    pages: Column = np.ceil((held_bytes - state_bytes) / page_bytes) + np.ceil(state_bytes / page_bytes)
    return pages * page_bytes


def scheduled_times(cost: CostModel, setting: Setting, flows: Flows, planned: Schedule) -> LayerTimes:
    """Seconds of one layer in each machine step; ``flows`` are those of one sequence, by its own steps."""
    one = layer_prices(cost, setting, 1)
    gemms = LayerGemms.of(cost, setting)
    decoding = planned.decoding(np.ones_like(flows.kept))
    lanes = np.where(decoding > 0, setting.concurrency, 0) if is_captured(setting) else decoding
    kept, cached = planned.decoding(flows.kept), planned.decoding(flows.cached)
    some, none = decoding > 0, np.zeros_like(decoding)
    tokens, lengths = planned.prefilled_tokens, planned.prefill_lengths
    passes = np.minimum(lengths, 1) if is_captured(setting) else lengths
    model, entered = setting.model, np.maximum(planned.prefilled, 1)
    prompt_attention_s = cost.prompt_attention_s(
        model.heads, model.head_dim, planned.prefilled, tokens / entered, setting.dtype
    )
    passed_s = (prompt_row_passes_s(cost, setting) + _taken_in_s(cost, setting)) * tokens
    apart, further = apart_operations(setting), lengths - passes
    launched_s = one.launched_s * some + one.prefill_launched_s * passes
    launched_s += cost.profile.host_operation_s * apart.worth * further
    felt_s, unfelt_s = (launched_s, none) if one.launches_felt else (none, launched_s)
    rounds, rounded = setting.kv_format.gpu is not KvFormat.NATIVE, tokens
    if not is_captured(setting):  # whose attention rounds newborn tokens itself
        rounded = rounded + decoding
    in_turn_s = attention_turn_s(cost, setting, 1) * planned.largest(flows.kept)
    if is_captured(setting):
        begun_s, mean = attention_begun_s(cost, setting), kept / np.maximum(decoding, 1)
        attention_s = (one.attention_s - begun_s) * some + begun_s * decoding
        attention_s += attended_s(cost, setting, decoding, mean, in_turn_s)
    else:
        attention_s = one.attention_s * some + np.hypot(attention_s_per_token(cost, setting) * kept, in_turn_s)

    by_name = prompt_products_s(cost, setting, tokens / np.maximum(passes, 1))
    prefilled_s = {name: passes * seconds for name, seconds in by_name.items()}
    slower = cost.settling(model.layers * (sum(prefilled_s.values()) + prompt_attention_s + passed_s))

    rows = lanes.astype(np.intp)
    decoded = {n: decoded_products_s(cost, setting, n) for n in np.unique(rows[rows > 0]).tolist()}

    def product_s(name: str) -> Column:
        by_rows = np.array([decoded[n][name] if n in decoded else 0.0 for n in range(setting.concurrency + 1)])
        seconds: Column = by_rows[rows] + slower * prefilled_s[name]
        return seconds

    ops: dict[str, Column] = {
        "qkv": product_s("qkv"),
        "score": one.score_s * some + one.score_s_per_cached * cached,
        "gather": none,
        "convert": rounds * (cost.launch_s(1) * (rounded > 0) + rounding_s(cost, setting, 1) * rounded),
        "reproject": none,
        "forward": none,
        "attention": attention_s + prompt_attention_s,
        "select": one.select_s * some
        + one.select_s_per_kept * kept
        + first_choice_s(cost, setting, 1, 1) * planned.prefilled,
        "out": product_s("out"),
        "mlp": product_s("mlp"),
        "norms": passed_s + one.completed_s * some,
        "gather_sms": none,
        "launch": decode_launch_s(cost, setting, setting.concurrency) * some
        + prompt_launch_s(cost, setting, prompt_row_passes_s(cost, setting) * tokens / np.maximum(passes, 1)) * passes
        + cost.launch_s(apart.total) * further
        + felt_s,
    }
    query_s, attend_s, rest_s = (
        np.sum([ops[name] for name in names], axis=0) for names in (QUERY_OPS, ATTEND_OPS, REST_OPS)
    )
    head = replace(gemms.head, free_at_zero=True)
    head_s = head.at(lanes) + head.at(planned.prefilled)
    swapped_in, swapped_out = (moved / setting.model.layers for moved in (planned.swapped_in, planned.swapped_out))
    delay_s = cost.duplex_delay_s(swapped_in, swapped_out)
    link = cost.transfer(Mechanism.COPY_ENGINE)
    return LayerTimes(
        decode_ops=dict(ops),
        prefill_ops={name: float(seconds[0]) for name, seconds in ops.items()},
        query_s=query_s,
        attend_s=attend_s,
        rest_s=rest_s,
        layer_s=query_s + attend_s + rest_s,
        host_attention_s=none,
        prefetch_s=link.at(swapped_in) + delay_s,
        correct_s=none,
        in_line_s=none,
        write_s=link.at(swapped_out) + delay_s,
        head_s=head_s + cost.profile.step_overhead_s,
        launched_s=unfelt_s,
        prefetch_bytes=swapped_in,
        correct_bytes=none,
        write_bytes=swapped_out,
        recalls=False,
    )


def _taken_in_s(cost: CostModel, setting: Setting) -> float:
    """Of a prompt's token: its keys and values scattered to pages, where they are not rounded on the way."""
    scattered = is_captured(setting) and setting.kv_format.are_native
    return OPERATIONS["scatter"].seconds(cost, setting.dtype, 2 * setting.model.kv_dim) if scattered else 0.0

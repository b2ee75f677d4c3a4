"""The rival: every step takes the longest of its bytes and FLOPs at datasheet rates, times one constant."""

from collections.abc import Iterator
from math import exp, log
from statistics import median
from typing import NamedTuple

import numpy as np

from sim.attention_prices import attention_flops
from sim.cost import CostModel
from sim.counts import Column
from sim.flows import flows_of, home_columns
from sim.footprint import layer_weight_bytes
from sim.kv import kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan
from sim.scheduled import admit


def roofline_s(plan: Plan, cost: CostModel) -> float:
    """Seconds of the whole plan with a constant of one; knows bytes and FLOPs as the simulator does, but no overhead."""
    setting, model, machine = plan.setting, plan.setting.model, plan.setting.machine
    kv = kv_layer_bytes(model, setting.dtype, setting.kv_format.gpu)
    weights = model.layers * layer_weight_bytes(model, setting.dtype, setting.weight_format)
    head = model.vocab * model.embedding_dim
    seconds = 0.0
    for work in _machine_work(plan):
        flops = 2 * work.rows * model.layers * model.layer_parameters + 2 * work.sequences * head
        flops = flops + model.layers * attention_flops(model, 1) * work.kept
        read = weights + head * setting.dtype.size_bytes + model.layers * kv * work.kept
        link = model.layers * kv * work.moved + setting.weights_on_host * weights
        step_s = np.maximum(read / cost.hbm_bytes_per_s, flops / machine.gpu.flop_per_s(setting.dtype))
        seconds += float(np.maximum(step_s, link / machine.gpu.link.bytes_per_s).sum())
    return seconds


class _Work(NamedTuple):
    """Of all sequences that run together, [machine step]: rows of matrix products, tokens attended to and moved."""

    sequences: Column | int
    rows: Column
    kept: Column
    moved: Column


def _machine_work(plan: Plan) -> Iterator[_Work]:
    setting, homes = plan.setting, home_columns(plan.homes)
    flows = flows_of(plan, homes)
    if setting.admission is Admission.CONTINUOUS:
        planned = admit(setting, occupancy_of(plan, homes, flows))
        decoding = planned.decoding(np.ones_like(flows.kept))
        swapped = (planned.swapped_in + planned.swapped_out) / (
            setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu)
        )
        kept = planned.decoding(flows.kept)
        yield _Work(decoding + planned.prefilled, decoding + planned.prefilled_tokens, kept, swapped)
        return
    again = flows.forwarded + flows.reprojected * 2 * setting.model.kv_dim / (12 * setting.model.hidden)
    for sequences in setting.wave_sizes:
        rows = np.full(len(flows.kept), float(sequences))
        rows[0] *= setting.workload.prompt_tokens
        moved = sequences * (flows.fetched_kv + flows.written_kv)
        yield _Work(sequences, rows + sequences * again, sequences * flows.kept, moved)


def with_hindsight(predicted_s: list[float], measured_s: list[float]) -> list[float]:
    """Errors of the rival when its constant is chosen with the very runs in view: their median ratio."""
    constant = exp(median(log(took / said) for said, took in zip(predicted_s, measured_s, strict=True)))
    return [constant * said / took - 1 for said, took in zip(predicted_s, measured_s, strict=True)]

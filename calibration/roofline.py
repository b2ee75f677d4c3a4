"""The rival: every step takes the longest of its bytes and FLOPs at datasheet rates, times one constant."""

from math import exp, log
from statistics import median

import numpy as np

from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.footprint import layer_weight_bytes
from sim.kv import kv_layer_bytes
from sim.layer import attention_flops
from sim.plan import Plan


def roofline_s(plan: Plan, cost: CostModel) -> float:
    """Seconds of the whole plan with a constant of one; knows bytes and FLOPs as the simulator does, but no overhead."""
    setting, model, machine = plan.setting, plan.setting.model, plan.setting.machine
    flows, work = flows_of(plan, home_columns(plan.homes)), setting.workload
    kv = kv_layer_bytes(model, setting.dtype, setting.kv_format.gpu)
    weights = model.layers * layer_weight_bytes(model, setting.dtype, setting.weight_format)
    head = model.vocab * model.embedding_dim
    seconds = 0.0
    for sequences in setting.wave_sizes:
        rows = np.full(len(flows.kept), float(sequences))
        rows[0] *= work.prompt_tokens
        rows = rows + sequences * (flows.forwarded + flows.reprojected * 2 * model.kv_dim / (12 * model.hidden))
        flops = 2 * rows * model.layers * model.layer_parameters + 2 * sequences * head
        flops = flops + model.layers * attention_flops(model, sequences) * flows.kept
        read = weights + head * setting.dtype.size_bytes + model.layers * sequences * kv * flows.kept
        link = model.layers * sequences * kv * (flows.fetched_kv + flows.written_kv)
        step_s = np.maximum(read / cost.hbm_bytes_per_s, flops / machine.gpu.flop_per_s(setting.dtype))
        seconds += float(np.maximum(step_s, link / machine.gpu.link.bytes_per_s).sum())
    return seconds


def with_hindsight(predicted_s: list[float], measured_s: list[float]) -> list[float]:
    """Errors of the rival when its constant is chosen with the very runs in view: their median ratio."""
    constant = exp(median(log(took / said) for said, took in zip(predicted_s, measured_s, strict=True)))
    return [constant * said / took - 1 for said, took in zip(predicted_s, measured_s, strict=True)]

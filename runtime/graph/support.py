"""Which plans a captured decode step can run."""

import os

import torch

from runtime.graph.paged import PageSize
from runtime.graph.quantised_window import has_room_for_ranges
from runtime.graph.recall import has_room_for_copies
from runtime.models import Decoder
from sim.attention import Selector
from sim.capture import COMPUTED_AGAIN
from sim.kv import KvFormat
from sim.plan import Admission, Mechanism, Placement, Plan, Recompute, WriteBack
from sim.slots import keeps_newest


def require_graphable(plan: Plan, decoder: Decoder, admission: Admission = Admission.WAVES) -> None:
    """Raise ValueError for a plan, or a decoder, that needs more than the kinds of slots that there are."""
    setting = plan.setting
    selector, continuous = setting.attention.selector, setting.admission is Admission.CONTINUOUS
    if decoder.device.type != "cuda" and not interpreted():
        raise ValueError(f"device={decoder.device}, a decode step is captured on a CUDA device only")
    if selector not in (Selector.DENSE, Selector.SWA, Selector.PAGES):
        raise ValueError(f"attention.selector={selector}, a captured step runs dense, swa or pages")
    if setting.host_attention:
        raise ValueError("host_attention=True, a captured step attends on the GPU")
    buffers = setting.prefetch_layers + 1
    if setting.weights_on_host and setting.model.layers % buffers:
        raise ValueError(
            f"layers={setting.model.layers}, a captured step with weights_on_host needs a multiple of the "
            f"{buffers} buffers that they come in"
        )
    if setting.admission is not admission:
        raise ValueError(f"admission={setting.admission}, this captured step runs {admission}")
    if continuous and selector is not Selector.DENSE:
        raise ValueError(f"attention.selector={selector}, a captured step under continuous admission needs dense")
    again = setting.recompute in COMPUTED_AGAIN and selector is Selector.DENSE
    if _recomputes(plan) and not again:
        raise ValueError(
            f"recompute={setting.recompute}, a captured step recomputes from activations_host or tokens, under dense"
        )
    _require_format(plan)
    _require_placement(plan)
    if selector is Selector.PAGES and not has_room_for_copies(plan):
        raise ValueError("homes, a captured step under pages needs slots for the local window and all that is selected")
    if decoder.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={decoder.dtype}, must be fp16, bf16 or fp32")


def _recomputes(plan: Plan) -> bool:
    return any(plan.homes.activations) or plan.homes.dropped != plan.setting.token_counts.dead


def forwards(plan: Plan) -> bool:
    """Whether all that is away from HBM is a prefix to be forwarded, for which ``runtime.graph.forwarded`` has graphs."""
    kept = any(plan.homes.host_kv) or plan.setting.write_back is WriteBack.AT_BIRTH
    return plan.setting.recompute is Recompute.TOKENS and any(plan.homes.dropped) and not kept


def streams(plan: Plan) -> bool:
    """Whether dense attention needs ``runtime.graph.streamed``: for what the copy engine brings, at every step the same
    tokens and a few more, for what is computed again, and for writing back at birth.
    """
    setting, away = plan.setting, any(plan.homes.host_kv)
    if not setting.kv_format.are_native:  # else it is read where it lies: ``runtime.graph.quantised_dense``
        again = setting.recompute in COMPUTED_AGAIN and (away or _recomputes(plan))
        return setting.attention.is_dense and again
    copies = setting.fetch_by is Mechanism.COPY_ENGINE and away
    at_birth = setting.write_back is WriteBack.AT_BIRTH
    return setting.attention.is_dense and (copies or _recomputes(plan) or at_birth)


def _require_format(plan: Plan) -> None:
    setting = plan.setting
    if setting.kv_format.are_native:
        return
    stored, dense = setting.kv_format.gpu, setting.attention.is_dense
    if setting.admission is Admission.CONTINUOUS:
        allowed = dense and stored in (KvFormat.NATIVE, KvFormat.FP8, KvFormat.INT8)
        PageSize.of(setting)  # raises where ranges do not fit the pages of a group
    else:
        known = dense or setting.attention.selector is Selector.SWA
        allowed = known and stored is KvFormat.INT8 and setting.kv_format.host is KvFormat.INT8
        again, at_birth = setting.recompute in COMPUTED_AGAIN, setting.write_back is WriteBack.AT_BIRTH
        if again and at_birth:  # levels of keys are not known then
            raise ValueError("write_back=at_birth, a captured step that recomputes in int8 writes at eviction")
    if not allowed:
        raise ValueError(
            f"kv_format={stored} in HBM and {setting.kv_format.host} on the host, a captured step runs native, waves "
            "under dense or swa in int8 on both sides, and dense continuous admission in int8 or fp8"
        )
    if not dense and not has_room_for_ranges(plan):
        kept = "its local window" if keeps_newest(plan) else "all that it attends to"
        raise ValueError(f"kv_budget_bytes, a captured step under swa in int8 needs slots for {kept}")


def _require_placement(plan: Plan) -> None:
    """Under a sparse selector: what HBM holds of the tokens whose home is the host."""
    setting, selector = plan.setting, plan.setting.attention.selector
    if setting.attention.is_dense or setting.placement is Placement.RESIDENT:
        return
    if selector is not Selector.SWA and any(plan.homes.host_kv):
        raise ValueError(f"placement={setting.placement}, a captured step under {selector} needs resident")
    if selector is Selector.SWA and setting.write_back is WriteBack.AT_BIRTH:
        raise ValueError("write_back=at_birth, a captured step under swa that keeps recent tokens writes at eviction")


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, slowly and without a GPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""Which plans a captured decode step can run."""

import os

import torch

from runtime.models import Decoder
from sim.attention import Selector
from sim.kv import KvFormat
from sim.plan import Admission, Placement, Plan, Recompute


def require_graphable(plan: Plan, decoder: Decoder, admission: Admission = Admission.WAVES) -> None:
    """Raise ValueError for a plan, or a decoder, that needs more than slots or pages and a selection known a step ahead."""
    setting, spec = plan.setting, decoder.spec
    selector = setting.attention.selector
    if decoder.device.type != "cuda" and not interpreted():
        raise ValueError(f"device={decoder.device}, a decode step is captured on a CUDA device only")
    if selector not in (Selector.DENSE, Selector.SWA):
        raise ValueError(f"attention.selector={selector}, a captured step runs dense or swa")
    if spec.kv_heads != spec.heads:
        raise ValueError(f"kv_heads={spec.kv_heads}, a captured step needs as many as heads, {spec.heads}")
    if setting.recompute is not Recompute.NONE or setting.host_attention:
        raise ValueError("a captured step needs recompute=none and host_attention=False")
    if setting.admission is not admission:
        raise ValueError(f"admission={setting.admission}, this captured step runs {admission}")
    _require_format(plan)
    if setting.admission is Admission.CONTINUOUS and selector is not Selector.DENSE:
        raise ValueError(f"attention.selector={selector}, a captured step under continuous admission needs dense")
    if selector is Selector.SWA and any(plan.homes.host_kv) and setting.placement is not Placement.RESIDENT:
        raise ValueError(f"placement={setting.placement}, a captured step under swa needs resident")
    if decoder.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={decoder.dtype}, must be fp16, bf16 or fp32")


def _require_format(plan: Plan) -> None:
    setting = plan.setting
    if setting.kv_format.are_native:
        return
    stored, dense = setting.kv_format.gpu, setting.attention.is_dense
    if setting.admission is Admission.CONTINUOUS:
        allowed = dense and stored in (KvFormat.NATIVE, KvFormat.FP8, KvFormat.INT8)
    else:
        allowed = dense and stored is KvFormat.INT8 and setting.kv_format.host is KvFormat.INT8
    if not allowed:
        raise ValueError(
            f"kv_format={stored} in HBM and {setting.kv_format.host} on the host, a captured step runs native, dense "
            "waves in int8 on both sides, and dense continuous admission in int8 or fp8"
        )


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, slowly and without a GPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""Which plans a captured decode step can run."""

import os

import torch

from runtime.models import Decoder
from sim.attention import Selector
from sim.plan import Admission, Placement, Plan, Recompute
from sim.spec import WeightFormat


def require_graphable(plan: Plan, decoder: Decoder) -> None:
    """Raise ValueError for a plan, or a decoder, that needs more than slots and a selection known a step ahead."""
    setting, spec = plan.setting, decoder.spec
    selector = setting.attention.selector
    if decoder.device.type != "cuda" and not interpreted():
        raise ValueError(f"device={decoder.device}, a decode step is captured on a CUDA device only")
    if selector not in (Selector.DENSE, Selector.SWA):
        raise ValueError(f"attention.selector={selector}, a captured step runs dense or swa")
    if spec.kv_heads != spec.heads:
        raise ValueError(f"kv_heads={spec.kv_heads}, a captured step needs as many as heads, {spec.heads}")
    if not setting.kv_format.are_native or setting.recompute is not Recompute.NONE or setting.host_attention:
        raise ValueError("a captured step needs native KV formats, recompute=none and host_attention=False")
    if setting.weights_on_host or setting.weight_format is not WeightFormat.NATIVE:
        raise ValueError("a captured step needs all weights in HBM in the compute type")
    if setting.admission is not Admission.WAVES:
        raise ValueError(f"admission={setting.admission}, a captured step runs waves")
    if selector is Selector.SWA and any(plan.homes.host_kv) and setting.placement is not Placement.RESIDENT:
        raise ValueError(f"placement={setting.placement}, a captured step under swa needs resident")
    if decoder.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={decoder.dtype}, must be fp16, bf16 or fp32")


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, slowly and without a GPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

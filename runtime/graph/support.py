"""Which plans a captured decode step can run."""

import os

import torch

from runtime.graph.recall import has_room_for_copies
from runtime.models import Decoder
from sim.attention import Selector
from sim.plan import Admission, Mechanism, Placement, Plan, Recompute


def require_graphable(plan: Plan, decoder: Decoder) -> None:
    """Raise ValueError for a plan, or a decoder, that needs more than slots and a selection known a step ahead."""
    setting = plan.setting
    selector = setting.attention.selector
    if decoder.device.type != "cuda" and not interpreted():
        raise ValueError(f"device={decoder.device}, a decode step is captured on a CUDA device only")
    if selector not in (Selector.DENSE, Selector.SWA, Selector.PAGES):
        raise ValueError(f"attention.selector={selector}, a captured step runs dense, swa or pages")
    if not setting.kv_format.are_native or setting.host_attention:
        raise ValueError("a captured step needs native KV formats and host_attention=False")
    recomputes = (Recompute.NONE, Recompute.ACTIVATIONS_HOST) if selector is Selector.DENSE else (Recompute.NONE,)
    if setting.recompute not in recomputes:
        raise ValueError(f"recompute={setting.recompute}, under {selector} must be {' or '.join(recomputes)}")
    if setting.admission is not Admission.WAVES:
        raise ValueError(f"admission={setting.admission}, a captured step runs waves")
    if not setting.attention.is_dense and any(plan.homes.host_kv) and setting.placement is not Placement.RESIDENT:
        raise ValueError(f"placement={setting.placement}, a captured step under {selector} needs resident")
    if selector is Selector.PAGES and not has_room_for_copies(plan):
        raise ValueError("homes, a captured step under pages needs slots for the local window and all that is selected")
    if decoder.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={decoder.dtype}, must be fp16, bf16 or fp32")


def streams(plan: Plan) -> bool:
    """Whether tokens are brought to HBM by the copy engine, at every step the same ones and a few more."""
    setting, homes = plan.setting, plan.homes
    fetches = setting.fetch_by is Mechanism.COPY_ENGINE and any(homes.host_kv)
    return setting.attention.is_dense and (fetches or any(homes.activations))


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, slowly and without a GPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""The host: its memory, attention on its cores, pinning, and what a launch costs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call, CpuTimer
from runtime.attention import Part, attend
from runtime.graph.pinned import registered
from sim.kv import KvFormat, kv_layer_bytes
from sim.profile import Measurement
from sim.recipe import model_of
from sim.spec import DType
from sim.units import MIB

_PINNED_BYTES = 256 * MIB
_LAUNCHES = 200


def cases(scope: Scope) -> Iterator[Case]:
    """DRAM and CPU attention everywhere, pinning and launches on a GPU."""
    host = replace(scope, device=torch.device("cpu"), timer=CpuTimer(), dtype=DType.FP32)
    size = min(256 * MIB, scope.most_bytes // 4)
    yield timed(host, "dram", f"bytes={size}", lambda: _sums(size), size_bytes=size)
    model = model_of(scope.models[0])
    for kept in (256, 2048):
        words = f"model={scope.models[0]} sequences=4 kept={kept} dtype={host.dtype}"
        kv_bytes = 4 * kept * kv_layer_bytes(model, host.dtype, KvFormat.NATIVE)
        if kv_bytes <= scope.most_bytes / 4:
            yield timed(host, "host_attention", words, partial(_attended, host, kept), size_bytes=kv_bytes)
    yield timed(scope, "launch", "how=captured", lambda: _tiny(scope), captured=True)
    if scope.on_gpu:
        yield timed(scope, "launch", "how=queued", lambda: _tiny(scope), captured=False)
        yield timed(replace(scope, timer=CpuTimer()), "launch", "how=host", lambda: _tiny(scope))
        yield Case(family="pin", case=f"bytes={_PINNED_BYTES}", measure=lambda: _pinned(scope))


def _sums(size: int) -> list[Call]:
    return each(torch.sum, [torch.ones(size // 8, dtype=torch.int64) for _ in range(2)])


def _attended(scope: Scope, kept: int) -> list[Call]:
    model, lanes = model_of(scope.models[0]), 4
    q = scope.normal(lanes, model.kv_heads, model.heads // model.kv_heads, model.head_dim)
    positions = torch.arange(kept).expand(lanes, -1)
    shape = (lanes, kept, model.kv_heads, model.head_dim)
    parts = [Part.of(scope.normal(*shape), scope.normal(*shape), positions, positions >= 0) for _ in range(4)]
    return each(lambda part: attend(q, [part], model.head_dim**-0.5), parts)


def _tiny(scope: Scope) -> list[Call]:
    """Kernels of a single element: all that is left is what a launch takes."""
    one = torch.zeros(1, device=scope.device)
    return [lambda: one.add_(1.0)] * _LAUNCHES


def _pinned(scope: Scope) -> tuple[Measurement, ...]:
    took = list[float]()
    for _ in range(3):
        start_s = time.perf_counter()
        memory = registered(scope.device, (_PINNED_BYTES,), torch.uint8)
        took.append(time.perf_counter() - start_s)
        del memory
    took.sort()
    words = f"bytes={_PINNED_BYTES}"
    return (
        Measurement(
            family="pin",
            case=words,
            seconds=took[1],
            low_s=took[0],
            high_s=took[2],
            samples=3,
            size_bytes=_PINNED_BYTES,
        ),
    )

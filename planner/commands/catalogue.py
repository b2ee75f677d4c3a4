"""``planner gpus``, ``planner hosts`` and ``planner models``: what is known by name, in the units that makers use."""

from collections.abc import Iterable, Sequence

from planner.commands import options
from planner.terminal import show, show_json
from sim import catalogue
from sim.codec import to_plain
from sim.kv import KvFormat, kv_layer_bytes
from sim.spec import DType, GpuSpec, HostSpec, ModelSpec
from sim.units import GB, GIB, KIB, TERA


def gpus(as_json: options.Json = False) -> None:
    """List the GPUs that --gpu knows: datasheet values, dense rates. A .toml file with the JSON's keys adds your own."""
    if as_json:
        show_json([to_plain(gpu) for gpu in catalogue.gpus()])
        return
    headings = (
        "GPU",
        "HBM\nGiB",
        "HBM\nGB/s",
        "FP16\nTFLOP/s",
        "FP8\nTFLOP/s",
        "INT8\nTOP/s",
        "BF16",
        "link",
        "link\nGB/s",
    )
    _show_table(headings, map(_gpu_row, catalogue.gpus()), left=(0, 7))


def hosts(as_json: options.Json = False) -> None:
    """List the hosts that --host knows."""
    if as_json:
        show_json([to_plain(host) for host in catalogue.hosts()])
        return
    headings = ("host", "DRAM\nGiB", "usable\nGiB", "DRAM\nGB/s", "cores", "FP32\nTFLOP/s")
    _show_table(headings, map(_host_row, catalogue.hosts()))


def models(as_json: options.Json = False) -> None:
    """List the models that --model knows. Any other: give its Hugging Face config.json, or the folder that holds it."""
    if as_json:
        show_json([_model_json(model) for model in catalogue.models()])
        return
    headings = (
        "model",
        "parameters\n10^9",
        "layers",
        "hidden",
        "heads",
        "KV\nheads",
        "head\ndim",
        "context\ntokens",
        "16-bit\nGiB",
        "KV, 16-bit\nKiB/token",
    )
    _show_table(headings, map(_model_row, catalogue.models()))


def _gpu_row(gpu: GpuSpec) -> tuple[str, ...]:
    return (
        gpu.name,
        f"{gpu.hbm_bytes / GIB:.1f}",
        f"{gpu.hbm_bytes_per_s / GB:,.0f}",
        f"{gpu.fp16_flop_per_s / TERA:,.0f}",
        "-" if gpu.fp8_flop_per_s is None else f"{gpu.fp8_flop_per_s / TERA:,.0f}",
        "-" if gpu.int8_op_per_s is None else f"{gpu.int8_op_per_s / TERA:,.0f}",
        "yes" if gpu.has_bf16 else "-",
        gpu.link.name,
        f"{gpu.link.bytes_per_s / GB:.1f}",
    )


def _host_row(host: HostSpec) -> tuple[str, ...]:
    return (
        host.name,
        f"{host.dram_bytes / GIB:,.0f}",
        f"{host.usable_bytes / GIB:,.0f}",
        f"{host.dram_bytes_per_s / GB:,.0f}",
        str(host.cores),
        f"{host.flop_per_s / TERA:.2f}",
    )


def _model_row(model: ModelSpec) -> tuple[str, ...]:
    return (
        model.name,
        f"{model.parameters / GB:.3g}",
        str(model.layers),
        str(model.hidden),
        str(model.heads),
        str(model.kv_heads),
        str(model.head_dim),
        f"{model.context_tokens:,}",
        f"{model.weight_bytes(DType.FP16) / GIB:.3g}",
        f"{_kv_bytes(model) / KIB:,.0f}",
    )


def _model_json(model: ModelSpec) -> dict[str, object]:
    return {
        **to_plain(model),
        "parameters": model.parameters,
        "weight_bytes_fp16": model.weight_bytes(DType.FP16),
        "kv_bytes_per_token_fp16": _kv_bytes(model),
    }


def _kv_bytes(model: ModelSpec) -> int:
    """Keys and values of one token in all layers."""
    return model.layers * kv_layer_bytes(model, DType.FP16, KvFormat.NATIVE)


def _show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    from planner.layout import table

    show(table(headings, rows, left=left))

"""What a decoder computes beyond its shape: from config.json, or the family's defaults where only the shape is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.models.rope import Rope
from sim.model_config import model_from_config
from sim.spec import ModelSpec

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = ("opt", *_LLAMA_LIKE, "gpt_neox")
_OPT_POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """``rope`` is None with learned positions. ``parallel`` feeds attention and feed-forward from the same input.

    ``window`` is the checkpoint's own attention window, which plans do not model; ``stop_tokens`` end a text.
    """

    spec: ModelSpec
    activation: str
    norm_eps: float
    pre_norm: bool
    parallel: bool
    rope: Rope | None
    position_offset: int
    window: int | None
    stop_tokens: tuple[int, ...]


def config_from_json(keys: Mapping[str, Any], *, name: str, source: str) -> DecoderConfig:
    """Read a config.json.

    Raises ValueError, naming ``source``, for a model that the runtime cannot run.
    """
    spec = model_from_config(keys, name=name, source=source)
    if spec.family not in FAMILIES:
        raise ValueError(f"{source}: model_type={spec.family}, the runtime runs {', '.join(FAMILIES)}")
    try:
        return _config(spec, keys)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: rope parameters, incomplete: {error}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def config_from_spec(spec: ModelSpec) -> DecoderConfig:
    """The family's defaults for ``spec``: enough for random weights.

    Raises ValueError for a family that the runtime cannot run.
    """
    if spec.family not in FAMILIES:
        raise ValueError(f"model={spec.name}, of family {spec.family}, the runtime runs {', '.join(FAMILIES)}")
    return _config(spec, {})


def _config(spec: ModelSpec, keys: Mapping[str, Any]) -> DecoderConfig:
    opt, neox = spec.family == "opt", spec.family == "gpt_neox"
    activation = keys.get("activation_function" if opt else "hidden_act") or _default_activation(spec.family)
    if activation not in ("relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        raise ValueError(f"activation={activation!r}, must be relu, gelu, gelu_new or silu")
    eps = keys.get("rms_norm_eps" if spec.family in _LLAMA_LIKE else "layer_norm_eps")
    return DecoderConfig(
        spec=spec,
        activation=activation,
        norm_eps=float(eps or (1e-6 if spec.family in _LLAMA_LIKE else 1e-5)),
        pre_norm=not opt or bool(keys.get("do_layer_norm_before", spec.final_norm)),
        parallel=neox and bool(keys.get("use_parallel_residual", True)),
        rope=None if opt else _rope(spec, keys),
        position_offset=_OPT_POSITION_OFFSET if opt else 0,
        window=_window(spec.family, keys),
        stop_tokens=_stop_tokens(keys.get("eos_token_id")),
    )


def _default_activation(family: str) -> str:
    return {"opt": "relu", "gpt_neox": "gelu"}.get(family, "silu")


def _rope(spec: ModelSpec, keys: Mapping[str, Any]) -> Rope:
    """Parameters stand in ``rope_parameters`` (transformers 5) or beside each other and in ``rope_scaling`` (before)."""
    scaling = dict(keys.get("rope_parameters") or keys.get("rope_scaling") or {})
    older_theta = keys.get("rotary_emb_base") if spec.family == "gpt_neox" else keys.get("rope_theta")
    theta = float(scaling.get("rope_theta") or older_theta or 10000.0)
    share = 1.0
    if spec.family == "gpt_neox":
        share = float(scaling.get("partial_rotary_factor") or keys.get("rotary_pct") or 0.25)
    scaling.setdefault("original_max_position_embeddings", spec.context_tokens)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    return Rope(theta=theta, dims=int(spec.head_dim * share), kind=kind, scaling=scaling)


def _window(family: str, keys: Mapping[str, Any]) -> int | None:
    window = keys.get("sliding_window")
    if window is None or (family != "mistral" and not keys.get("use_sliding_window", False)):
        return None
    return int(window)


def _stop_tokens(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return tuple(int(token) for token in tokens) if isinstance(tokens, list) else (int(tokens),)

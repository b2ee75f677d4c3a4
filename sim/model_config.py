"""Hugging Face config.json to ModelSpec: one parser for the catalogue's entries and for a user's own file.

Only decoders with one dense feed-forward block a layer are understood. Attention windows (Mistral 7B v0.1, Phi-3) are
not modelled: every cached token counts as attended to, and it is the plan that decides otherwise.
"""

import json
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sim.spec import ModelSpec

# OPT's position table begins with two rows that no token uses (OPTLearnedPositionalEmbedding.offset).
_OPT_POSITION_OFFSET = 2
# A config.json has a few kilobytes. Whoever names a file of weights by mistake should not wait for it to be read.
_MAX_TEXT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """The keys of one config.json, each read with a check."""

    keys: Mapping[str, object]
    source: str

    def whole(self, key: str) -> int:
        """A whole number above zero that must be there."""
        value = self._present(key, "a whole number of at least 1")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "must be a whole number of at least 1")
        return value

    def whole_or(self, key: str, default: int) -> int:
        """As ``whole``, but absent or null (as Hugging Face writes "the default") gives ``default``."""
        return default if self.keys.get(key) is None else self.whole(key)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.keys.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "must be true or false")
        return default if value is None else value

    def text(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self._present(key, f"one of {', '.join(allowed)}")
        if value not in allowed:
            raise self._wrong(key, f"must be one of {', '.join(allowed)}")
        return str(value)

    def refuse_quantised(self) -> None:
        """Weights that are stored in fewer bits would be planned as if they were not."""
        if self.keys.get("quantization_config") is not None:
            raise self._wrong(
                "quantization_config",
                "must be absent: give the model it was made from, and how its weights are stored by --weight-format int8 or int4",
            )

    def head_dim(self) -> int:
        """Stated, or the hidden size shared out among the heads."""
        hidden, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if self.keys.get("head_dim") is None and hidden % heads:
            raise self._wrong(
                "hidden_size", f"must be a multiple of num_attention_heads={heads} where head_dim is absent"
            )
        return self.whole_or("head_dim", hidden // heads)

    def _present(self, key: str, allowed: str) -> object:
        if key not in self.keys:
            raise ValueError(f"key {key} is missing, must be {allowed}")
        return self.keys[key]

    def _wrong(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"{key}={reprlib.repr(self.keys.get(key))}, {allowed}")


def supported_model_types() -> tuple[str, ...]:
    """Values of ``model_type`` that ``model_from_config`` understands."""
    return tuple(_parsers())


def model_from_config(config: Mapping[str, object], *, name: str, source: str) -> ModelSpec:
    """The shape that a config.json's ``config`` describes.

    Keys that the shape does not depend on are ignored, whatever they hold. Raises ValueError, naming ``source`` and the
    key, where one is missing or has a value that no model can have, and for weights that are stored in fewer bits.
    """
    keys = _Config(keys=config, source=source)
    try:
        keys.refuse_quantised()
        model_type = keys.text("model_type", supported_model_types())
        return _parsers()[model_type](keys, name, model_type)
    except ValueError as error:
        raise ValueError(f"{source}: {one_line(error)}") from None


def load_model_config(path: str | Path) -> ModelSpec:
    """The shape in the config.json at ``path``, or in the folder ``path``; the folder names the model."""
    given = user_path(path)
    # For a name that the system refuses, os.path.isdir says no where Path.is_dir raises; read_text_file reports it.
    file = given / "config.json" if os.path.isdir(given) else given
    remedy = "give a model folder or its config.json"
    text = read_text_file(file, what="model", remedy=remedy)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model={str(file)!r}, not JSON ({one_line(error)}): {remedy}") from None
    if not isinstance(config, dict):
        raise ValueError(f"model={str(file)!r}, holds a JSON {type(config).__name__}, must be an object: {remedy}")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return model_from_config(config, name=name, source=str(file))


def user_path(path: str | Path) -> Path:
    """``path`` with a home folder for a leading ``~``; unlike Path.expanduser, unchanged where there is none."""
    return Path(os.path.expanduser(path))


def read_text_file(path: Path, *, what: str, remedy: str) -> str:
    """The text of a file that a user named; a ValueError of one line says what is wrong with it and what to do."""
    given = f"{what}={str(path)!r}"
    try:
        if not path.exists():
            raise ValueError(f"{given}, no such file: {remedy}")
        if not path.is_file():
            raise ValueError(f"{given}, not a file: {remedy}")
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise ValueError(f"{given}, {path.stat().st_size} bytes, must be at most {_MAX_TEXT_BYTES}: {remedy}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{given}, not a text file (UTF-8): {remedy}") from None
    except OSError as error:
        raise ValueError(f"{given}, cannot be read ({error.strerror}): {remedy}") from None


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, as the command line prints it."""
    return " ".join(str(error).split())


def _parsers() -> dict[str, Callable[[_Config, str, str], ModelSpec]]:
    return {
        "opt": _opt,
        "llama": _llama,
        "mistral": _llama,
        "qwen2": _llama,
        "qwen3": _llama,
        "phi3": _llama,
        "gpt_neox": _gpt_neox,
        "phi": _phi,
    }


def _opt(keys: _Config, name: str, model_type: str) -> ModelSpec:
    """OPT: learned positions, LayerNorm, biases everywhere but in the head, which is the embedding."""
    bias = keys.flag("enable_bias", default=True)
    pre_norm = keys.flag("do_layer_norm_before", default=True)
    return ModelSpec(
        name=name,
        family=model_type,
        layers=keys.whole("num_hidden_layers"),
        hidden=keys.whole("hidden_size"),
        intermediate=keys.whole("ffn_dim"),
        heads=keys.whole("num_attention_heads"),
        kv_heads=keys.whole("num_attention_heads"),
        head_dim=keys.head_dim(),
        vocab=keys.whole("vocab_size"),
        positions=keys.whole("max_position_embeddings") + _OPT_POSITION_OFFSET,
        embedding_dim=keys.whole_or("word_embed_proj_dim", keys.whole("hidden_size")),
        context_tokens=keys.whole("max_position_embeddings"),
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        head_bias=False,
        norm_bias=True,
        norms_per_layer=2,
        # Norms after each block (OPT-350M) leave none for the end.
        final_norm=pre_norm and not keys.flag("_remove_final_layer_norm", default=False),
        qk_norm=False,
        tied_embeddings=keys.flag("tie_word_embeddings", default=True),
        source=keys.source,
    )


def _llama(keys: _Config, name: str, model_type: str) -> ModelSpec:
    """LLaMA and those built like it: rotary positions, RMSNorm, a gated feed-forward block, grouped heads."""
    # Qwen2 has its biases built in, and on the inputs alone; LLaMA and Qwen3 may have them on all four projections.
    stated_bias = model_type in ("llama", "qwen3") and keys.flag("attention_bias", default=False)
    return ModelSpec(
        name=name,
        family=model_type,
        layers=keys.whole("num_hidden_layers"),
        hidden=keys.whole("hidden_size"),
        intermediate=keys.whole("intermediate_size"),
        heads=keys.whole("num_attention_heads"),
        kv_heads=_llama_kv_heads(keys, model_type),
        # Hugging Face's default for Qwen3 is 128, whatever the hidden size; better to ask than to guess.
        head_dim=keys.whole("head_dim") if model_type == "qwen3" else keys.head_dim(),
        vocab=keys.whole("vocab_size"),
        positions=0,
        embedding_dim=keys.whole("hidden_size"),
        context_tokens=keys.whole("max_position_embeddings"),
        gated_mlp=True,
        qkv_bias=stated_bias or model_type == "qwen2",
        out_bias=stated_bias,
        mlp_bias=model_type == "llama" and keys.flag("mlp_bias", default=False),
        head_bias=False,
        norm_bias=False,
        norms_per_layer=2,
        final_norm=True,
        qk_norm=model_type == "qwen3",
        tied_embeddings=keys.flag("tie_word_embeddings", default=False),
        source=keys.source,
    )


def _llama_kv_heads(keys: _Config, model_type: str) -> int:
    """LLaMA and Phi-3 files may leave it out where every head has its own; the others' defaults differ by release."""
    if model_type in ("llama", "phi3"):
        return keys.whole_or("num_key_value_heads", keys.whole("num_attention_heads"))
    return keys.whole("num_key_value_heads")


def _gpt_neox(keys: _Config, name: str, model_type: str) -> ModelSpec:
    """GPT-NeoX and Pythia: rotary positions, LayerNorm, biases everywhere but in the head."""
    return ModelSpec(
        name=name,
        family=model_type,
        layers=keys.whole("num_hidden_layers"),
        hidden=keys.whole("hidden_size"),
        intermediate=keys.whole("intermediate_size"),
        heads=keys.whole("num_attention_heads"),
        kv_heads=keys.whole("num_attention_heads"),
        head_dim=keys.head_dim(),
        vocab=keys.whole("vocab_size"),
        positions=0,
        embedding_dim=keys.whole("hidden_size"),
        context_tokens=keys.whole("max_position_embeddings"),
        gated_mlp=False,
        qkv_bias=keys.flag("attention_bias", default=True),
        out_bias=keys.flag("attention_bias", default=True),
        mlp_bias=True,
        head_bias=False,
        norm_bias=True,
        norms_per_layer=2,
        final_norm=True,
        qk_norm=False,
        tied_embeddings=keys.flag("tie_word_embeddings", default=False),
        source=keys.source,
    )


def _phi(keys: _Config, name: str, model_type: str) -> ModelSpec:
    """Phi-1, 1.5 and 2: attention and feed-forward share one LayerNorm, and even the head has a bias."""
    if keys.flag("qk_layernorm", default=False):
        raise ValueError("qk_layernorm=True, must be false: norms with a bias on queries and keys are not modelled")
    return ModelSpec(
        name=name,
        family=model_type,
        layers=keys.whole("num_hidden_layers"),
        hidden=keys.whole("hidden_size"),
        intermediate=keys.whole("intermediate_size"),
        heads=keys.whole("num_attention_heads"),
        kv_heads=keys.whole_or("num_key_value_heads", keys.whole("num_attention_heads")),
        head_dim=keys.head_dim(),
        vocab=keys.whole("vocab_size"),
        positions=0,
        embedding_dim=keys.whole("hidden_size"),
        context_tokens=keys.whole("max_position_embeddings"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm_bias=True,
        norms_per_layer=1,
        final_norm=True,
        qk_norm=False,
        tied_embeddings=keys.flag("tie_word_embeddings", default=False),
        source=keys.source,
    )

"""Tiny random checkpoints of every family, saved by transformers, whose logits are the truth."""

from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA = _SMALL | {"intermediate_size": 48}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}

# name: model type, keys of its configuration
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": ("opt", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", _LLAMA | {"num_key_value_heads": 4}),
    "llama_grouped": (
        "llama",
        _LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama3_rope": ("llama", _LLAMA | {"num_key_value_heads": 1, "rope_parameters": _LLAMA3_ROPE}),
    "linear_rope": (
        "llama",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "mlp_bias": True},
    ),
    "yarn_rope": ("llama", _LLAMA | {"rope_parameters": _YARN_ROPE}),
    "mistral": ("mistral", _LLAMA | {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", _LLAMA | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _LLAMA | {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "gpt_neox_serial": ("gpt_neox", _LLAMA | {"use_parallel_residual": False, "attention_bias": False}),
}


def save_checkpoint(name: str, folder: Path, *, shard: str = "1GB") -> Any:
    """Save the checkpoint ``name`` in ``folder`` and give transformers' model, reloaded from there."""
    model_type, keys = CHECKPOINTS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.AutoConfig.for_model(model_type, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # large enough to attend unevenly, and norms and biases that are not neutral
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

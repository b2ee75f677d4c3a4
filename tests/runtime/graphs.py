"""Small decoders and prompts for tests of the captured step. Without a GPU its kernels are interpreted, which is slow."""

import random
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch

from runtime.execute import DTYPES, _padded
from runtime.models.config import config_from_json
from runtime.models.decoder import Decoder
from runtime.models.random_weights import random_decoder
from runtime.wave import Prompts
from sim.plan import Plan
from sim.spec import DType

kernels = pytest.mark.skipif(find_spec("triton") is None, reason="runs Triton's kernels")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES_TRIED = [DType.FP32, DType.FP16] if ON_GPU else [DType.FP32]
TOLERANCE = {DType.FP32: 1e-3, DType.FP16: 6e-2}  # of logits around 10

_SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SHAPE | {"num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 160}
_FAMILIES = {
    "opt": _SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 160},
    "wide opt": _SHAPE
    | {"hidden_size": 1024, "ffn_dim": 2048, "word_embed_proj_dim": 1024, "max_position_embeddings": 160},
    "llama": _LLAMA,
    "grouped llama": _LLAMA | {"num_key_value_heads": 2},
    "grouped qwen3": _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
}


def decoder(family: str, dtype: DType, seed: int) -> Decoder:
    """Random weights, large enough to attend unevenly."""
    config = config_from_json({"model_type": family.split()[-1]} | _FAMILIES[family], name="small", source="test")
    made = random_decoder(config, device=DEVICE, dtype=DTYPES[dtype], seed=seed)
    made.weights.embedding.mul_(30 if config.spec.hidden < 512 else 8)
    for layer in made.weights.layers:
        layer.qkv.weight.mul_(12 if config.spec.hidden < 512 else 3)
        layer.out.weight.mul_(4)
    return made


def draw_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(length)] for length in lengths]


def padded(plan: Plan, made: Decoder, prompts: list[list[int]]) -> Prompts:
    return _padded(prompts, plan.setting.workload.prompt_tokens, made.device)

"""A decoder for prompts gives what the plain one gives, and leaves its arguments as they are.

Its kernels are interpreted where there is no GPU, which is slow: models are tiny, and few rows count as many.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.attention import attend_prompt
from runtime.graph.fused import FusedDecoder
from runtime.models.config import config_from_json
from runtime.models.decoder import Decoder
from runtime.models.random_weights import random_decoder
from runtime.models.streamed import mapped
from runtime.prefill import prompt_layer
from sim.gemms import product_rows
from tests.runtime.graphs import DEVICE, kernels

_SHAPE = {"vocab_size": 31, "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1}
_SHAPE |= {"max_position_embeddings": 400}
_LLAMA = _SHAPE | {"intermediate_size": 40, "num_key_value_heads": 2}
_OPT = _SHAPE | {"ffn_dim": 40, "word_embed_proj_dim": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt"} | _OPT,
    "opt, norms after": {"model_type": "opt", "do_layer_norm_before": False} | _OPT,
    "llama": {"model_type": "llama"} | _LLAMA,
    "llama, gelu": {"model_type": "llama", "hidden_act": "gelu"} | _LLAMA,
    "qwen2": {"model_type": "qwen2"} | _LLAMA,  # with biases
    "qwen3": {"model_type": "qwen3", "head_dim": 10} | _LLAMA,  # not as wide as hidden, no power of two
    "pythia": {"model_type": "gpt_neox", "rotary_pct": 0.5, "intermediate_size": 40} | _SHAPE,
    "pythia, in turn": {"model_type": "gpt_neox", "use_parallel_residual": False, "intermediate_size": 40} | _SHAPE,
}
ROUNDINGS = 12  # of a layer's largest numbers


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """What nobody wrote must not be looked at."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 9 rows on products run over multiples of 8."""
    monkeypatch.setattr("sim.gemms._FEW_ROWS", 8)
    monkeypatch.setattr("sim.gemms._ROWS_TOGETHER", 8)


def decoder(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Norms other than ones and zeros."""
    made = random_decoder(config_from_json(FAMILIES[family], name="small", source="test"), device=DEVICE, dtype=dtype)
    drawn = torch.Generator(DEVICE).manual_seed(1)
    mapped(made.weights.layers[0], lambda x: x.add_(torch.randn(x.shape, generator=drawn, device=DEVICE) * 0.2))
    return made


def inputs(made: Decoder, sequences: int, tokens: int, padding: list[int] | None = None) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator(DEVICE).manual_seed(2)
    x = torch.randn((sequences, tokens, made.spec.hidden), generator=drawn, device=DEVICE).to(made.dtype)
    first = torch.tensor(padding or [0] * sequences, device=DEVICE)
    return x, (torch.arange(tokens, device=DEVICE) - first[:, None]).clamp(min=0)


@torch.inference_mode()
def compare(made: Decoder, sequences: int, tokens: int, padding: list[int] | None = None) -> None:
    x, positions = inputs(made, sequences, tokens, padding)
    before, hidden = x.clone(), None if padding is None else torch.tensor(padding, device=DEVICE)

    plain = prompt_layer(made, 0, x, positions, hidden)
    fused = prompt_layer(FusedDecoder(made), 0, x, positions, hidden)

    for got, want in zip(fused, plain, strict=True):
        assert got.shape == want.shape
        off = ROUNDINGS * torch.finfo(made.dtype).eps * float(want.abs().max())
        torch.testing.assert_close(got, want, atol=off, rtol=0)
    torch.testing.assert_close(x, before, atol=0, rtol=0)


@kernels
@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 5), (3, 7)])
def test_a_prompts_layer_by_few_kernels_is_the_decoders(
    family: str, dtype: torch.dtype, sequences: int, tokens: int
) -> None:
    compare(decoder(family, dtype), sequences, tokens)


@kernels
@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_so_are_padded_prompts(family: str) -> None:
    compare(decoder(family), 2, 8, padding=[0, 3])


@kernels
@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("family", FAMILIES)
def test_so_are_long_prompts_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 tokens, whose inputs do not lie side by side."""
    for module in ("sim.footprint", "runtime.prefill"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK_TOKENS", 9)
    compare(decoder(family), 2, 13)


@kernels
@pytest.mark.usefixtures("few_are_many")
def test_so_are_prompts_that_pass_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sim.footprint", "runtime.prefill"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK_TOKENS", 9)
    compare(decoder("llama"), 3, 9)


@kernels
def test_more_rows_than_256_are_made_up() -> None:
    compare(decoder("opt"), 1, 257)


@kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_warming_up_needs_no_prompt(family: str) -> None:
    with torch.inference_mode():
        FusedDecoder(decoder(family)).warm_up()


@pytest.mark.parametrize(
    ("rows", "passed"), [(0, 0), (1, 1), (255, 255), (256, 256), (257, 384), (384, 384), (385, 512), (8191, 8192)]
)
def test_many_rows_pass_in_multiples(rows: int, passed: int) -> None:
    assert product_rows(rows) == passed


@pytest.mark.parametrize("queries", [9, 4])
def test_a_groups_queries_attend_alike_together_or_in_turn(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a prompt's, or its last ones."""
    q, k, v = (torch.randn(2, tokens, heads, 8) for tokens, heads in ((queries, 6), (9, 2), (9, 2)))
    in_turn = attend_prompt(q, k, v, None, 0.3)
    monkeypatch.setattr("runtime.attention._takes_groups", lambda *_: True)

    torch.testing.assert_close(attend_prompt(q, k, v, None, 0.3), in_turn, atol=1e-6, rtol=0)


def test_queries_with_a_key_head_each_attend_as_a_groups_would() -> None:
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))
    whole = attend_prompt(q, k, v, torch.zeros(2, dtype=torch.int64), 0.3)

    torch.testing.assert_close(attend_prompt(q, k, v, None, 0.3), whole, atol=1e-6, rtol=0)

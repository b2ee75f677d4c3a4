import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.models import Decoder, load_decoder, random_decoder
from runtime.models.config import config_from_json, config_from_spec
from sim import catalogue
from tests.runtime.checkpoints import CHECKPOINTS, save_checkpoint

CPU = torch.device("cpu")


def plain_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Dense causal attention over whole rows, by hand."""
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    group = decoder.spec.heads // decoder.spec.kv_heads
    x = decoder.embed(tokens, positions)
    for layer in range(decoder.spec.layers):
        q, k, v = decoder.project(layer, x, positions)
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * decoder.spec.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        x = decoder.finish(layer, x, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v))
    return decoder.logits(x)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    truth = save_checkpoint(name, tmp_path)
    tokens = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    ours = plain_logits(load_decoder(tmp_path, device=CPU, dtype=torch.float32), tokens)
    with torch.no_grad():
        torch.testing.assert_close(ours, truth(tokens).logits, atol=1e-4, rtol=0)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    save_checkpoint("qwen3", tmp_path / "one")
    save_checkpoint("qwen3", tmp_path / "many", shard="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    tokens = torch.arange(20)[None]
    one, many = (load_decoder(tmp_path / name, device=CPU, dtype=torch.float32) for name in ("one", "many"))
    torch.testing.assert_close(plain_logits(one, tokens), plain_logits(many, tokens), atol=0, rtol=0)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    ],
)
def test_old_and_new_spellings_of_rope_agree(keys: dict[str, object]) -> None:
    shape = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "max_position_embeddings": 64,
    }
    rope = config_from_json(shape | keys, name="x", source="config.json").rope
    assert rope is not None
    assert (rope.theta, rope.kind, rope.scaling["factor"]) == (5e5, "linear", 2.0)


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "pythia-70m"])
def test_random_weights_have_the_catalogue_models_shape(name: str) -> None:
    spec = catalogue.model(name)
    decoder = random_decoder(config_from_spec(spec), device=CPU, dtype=torch.bfloat16)
    seen: dict[int, int] = {}
    for tensor in _tensors(decoder.weights):
        seen[id(tensor)] = tensor.numel()
    assert sum(seen.values()) == spec.parameters


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    names = getattr(value, "__dataclass_fields__", {})
    return [tensor for name in names for tensor in _tensors(getattr(value, name))]


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _foreign(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))


def _narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed_tokens.weight": "model-1-of-2.safetensors"}})
    )


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _unknown_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))


def _integers(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].int()}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "truncated or no safetensors file"),
        (_pickle_only, "pickle files only"),
        (_foreign, "tensor gpt_neox.embed_in.weight is missing"),
        (_narrow, "config.json asks for (64, 32)"),
        (_no_weights, "holds no model.safetensors"),
        (_lost_shard, "model-1-of-2.safetensors, a part of the checkpoint, does not exist"),
        (_no_config, "config.json, does not exist"),
        (_integers, "tensor model.norm.weight is torch.int32, must be float16, bfloat16 or float32"),
        (_unknown_rope, "rope_type='longrope', must be one of default, linear, llama3, yarn"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: object, says: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        load_decoder(tmp_path, device=CPU, dtype=torch.float32)
    assert "\n" not in str(caught.value)

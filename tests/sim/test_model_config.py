"""config.json to ModelSpec: what each family adds, and one clear line for everything that is wrong with a file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sim.model_config import load_model_config, model_from_config, supported_model_types
from sim.spec import ModelSpec

LLAMA: Mapping[str, object] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
LLAMA_SPEC = ModelSpec(
    name="tiny",
    family="llama",
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=100,
    positions=0,
    embedding_dim=64,
    context_tokens=128,
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    head_bias=False,
    norm_bias=False,
    norms_per_layer=2,
    final_norm=True,
    qk_norm=False,
    tied_embeddings=False,
    source="test",
)
OPT: Mapping[str, object] = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
OPT_SPEC = replace(
    LLAMA_SPEC,
    family="opt",
    intermediate=256,
    kv_heads=4,
    positions=130,
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    norm_bias=True,
    tied_embeddings=True,
)


def parse(config: Mapping[str, object]) -> ModelSpec:
    return model_from_config(config, name="tiny", source="test")


def refusal(act: Callable[..., object], *args: object) -> str:
    """The message with which ``act(*args)`` refuses."""
    with pytest.raises(ValueError, match=r".") as error:
        act(*args)
    return str(error.value)


def without(config: Mapping[str, object], key: str) -> dict[str, object]:
    return {k: v for k, v in config.items() if k != key}


def test_weights_that_are_stored_in_fewer_bits_are_not_taken_for_whole_ones() -> None:
    """They would be planned at four times their bytes."""
    with pytest.raises(ValueError, match=r"^test: quantization_config=\{'bits': 4.*must be absent: .*--weight-format"):
        model_from_config(
            LLAMA | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}, name="small", source="test"
        )


@pytest.mark.parametrize(
    ("extra", "changes"),
    [
        ({}, {}),
        ({"rope_theta": 1e4, "torch_dtype": "float16", "quantization_config": None}, {}),
        ({"num_key_value_heads": None}, {"kv_heads": 4}),
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None}, {}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
        ({"mlp_bias": True}, {"mlp_bias": True}),
        ({"model_type": "mistral", "sliding_window": 16}, {"family": "mistral"}),
        ({"model_type": "phi3"}, {"family": "phi3"}),
        ({"model_type": "qwen2", "attention_bias": False}, {"family": "qwen2", "qkv_bias": True}),
        ({"model_type": "qwen3", "head_dim": 32}, {"family": "qwen3", "head_dim": 32, "qk_norm": True}),
        (
            {"model_type": "gpt_neox", "num_key_value_heads": 1},
            {
                "family": "gpt_neox",
                "kv_heads": 4,
                "gated_mlp": False,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "norm_bias": True,
            },
        ),
        (
            {"model_type": "phi"},
            {
                "family": "phi",
                "gated_mlp": False,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "head_bias": True,
                "norm_bias": True,
                "norms_per_layer": 1,
            },
        ),
    ],
)
def test_a_llama_and_how_the_others_differ_from_it(extra: dict[str, object], changes: dict[str, object]) -> None:
    assert parse({**LLAMA, **extra}) == replace(LLAMA_SPEC, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "changes"),
    [
        ({}, {}),
        ({"word_embed_proj_dim": 64}, {}),
        ({"word_embed_proj_dim": 32, "do_layer_norm_before": False}, {"embedding_dim": 32, "final_norm": False}),
        ({"_remove_final_layer_norm": True}, {"final_norm": False}),
        ({"enable_bias": False}, {"qkv_bias": False, "out_bias": False, "mlp_bias": False}),
    ],
)
def test_an_opt_and_its_exceptions(extra: dict[str, object], changes: dict[str, object]) -> None:
    assert parse({**OPT, **extra}) == replace(OPT_SPEC, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type", "num_key_value_heads"}))
def test_a_missing_key_is_named_with_what_it_may_be(key: str) -> None:
    message = refusal(parse, without(LLAMA, key))
    assert message == f"test: key {key} is missing, must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ],
)
def test_a_default_that_differs_between_releases_is_asked_for(model_type: str, key: str) -> None:
    config = without({**LLAMA, "head_dim": 32, "model_type": model_type}, key)
    with pytest.raises(ValueError, match=f"^test: key {key} is missing"):
        parse(config)


@pytest.mark.parametrize("value", ["64", -64, 0, True, 64.0, float("nan"), None, [64], {}])
def test_a_size_that_is_no_size_is_refused(value: object) -> None:
    message = refusal(parse, {**LLAMA, "hidden_size": value})
    assert message == f"test: hidden_size={value!r}, must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tie_word_embeddings": "false"}, "test: tie_word_embeddings='false', must be true or false"),
        ({"attention_bias": 1}, "test: attention_bias=1, must be true or false"),
        ({"head_dim": 0}, "test: head_dim=0, must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "test: model.kv_heads=3, must divide heads=4"),
        (
            {"hidden_size": 65},
            "test: hidden_size=65, must be a multiple of num_attention_heads=4 where head_dim is absent",
        ),
        (
            {"model_type": "phi", "qk_layernorm": True},
            "test: qk_layernorm=True, must be false: norms with a bias on queries and keys are not modelled",
        ),
    ],
)
def test_values_that_no_model_has(extra: dict[str, object], message: str) -> None:
    assert refusal(parse, {**LLAMA, **extra}) == message


@pytest.mark.parametrize("model_type", ["mixtral", "", None, 7, ["llama"]])
def test_an_unsupported_model_type_lists_the_supported(model_type: object) -> None:
    message = refusal(parse, {**LLAMA, "model_type": model_type})
    supported = "opt, llama, mistral, qwen2, qwen3, phi3, gpt_neox, phi"
    assert message == f"test: model_type={model_type!r}, must be one of {supported}"
    assert ", ".join(supported_model_types()) == supported


def test_a_missing_model_type_lists_the_supported() -> None:
    with pytest.raises(ValueError, match=r"^test: key model_type is missing, must be one of opt, llama, "):
        parse(without(LLAMA, "model_type"))


class TestLoad:
    def test_from_a_folder_or_its_file_named_after_the_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "my-model"
        folder.mkdir()
        file = folder / "config.json"
        file.write_text(json.dumps(LLAMA))

        expected = replace(LLAMA_SPEC, name="my-model", source=str(file))
        assert load_model_config(folder) == load_model_config(str(file)) == expected

    def test_from_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        monkeypatch.chdir(folder)
        assert load_model_config(".").name == "here"

    def test_a_file_of_another_name_names_the_model_itself(self, tmp_path: Path) -> None:
        file = tmp_path / "other.json"
        file.write_text("\ufeff" + json.dumps(LLAMA), encoding="utf-8")
        assert load_model_config(file) == replace(LLAMA_SPEC, name="other", source=str(file))

    def test_an_error_names_the_file_and_the_key(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(without(LLAMA, "vocab_size")))
        message = refusal(load_model_config, tmp_path)
        assert message == f"{file}: key vocab_size is missing, must be a whole number of at least 1"

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            (b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
            (b"{'model_type': 1}", "not JSON (Expecting property name enclosed in double quotes:"),
            (b"[" * 100_000, "not JSON ("),
            (b'{"a": ' + b"9" * 5000 + b"}", "not JSON ("),
            (b"\x93NUMPY\xff\x00", "not a text file (UTF-8)"),
            (b"[1, 2]", "holds a JSON list, must be an object"),
            (b"null", "holds a JSON NoneType, must be an object"),
            (b" " * (4 * 2**20 + 1), "4194305 bytes, must be at most 4194304"),
        ],
        ids=["empty", "quotes", "deep", "digits", "binary", "list", "null", "huge"],
    )
    def test_a_file_that_is_no_config(self, tmp_path: Path, content: bytes, fault: str) -> None:
        file = tmp_path / "config.json"
        file.write_bytes(content)
        message = refusal(load_model_config, file)
        assert message.startswith(f"model={str(file)!r}, {fault}")
        assert message.endswith(": give a model folder or its config.json")
        assert len(message.splitlines()) == 1

    def test_a_missing_file_and_a_folder_without_one(self, tmp_path: Path) -> None:
        for path, looked_for in ((tmp_path / "gone", tmp_path / "gone"), (tmp_path, tmp_path / "config.json")):
            message = refusal(load_model_config, path)
            remedy = "give a model folder or its config.json"
            assert message == f"model={str(looked_for)!r}, no such file: {remedy}"

    @pytest.mark.parametrize(
        ("path", "fault"),
        [
            ("x" * 5000, "cannot be read (File name too long)"),
            ("a\0b", "no such file"),
            ("~nobody-here/m", "no such file"),
        ],
        ids=["long", "nul", "home"],
    )
    def test_a_name_that_no_file_can_have(self, path: str, fault: str) -> None:
        message = refusal(load_model_config, path)
        assert message == f"model={path!r}, {fault}: give a model folder or its config.json"

"""Options to nouns: what each one means, and what each refuses in which words."""

from pathlib import Path

import pytest

from planner.inputs import Question, request_of
from planner.request import Objective
from sim import catalogue
from sim.attention import Selector
from sim.kv import KvFormat
from sim.profile import Profile
from sim.spec import DType, MachineSpec, WeightFormat
from sim.units import GIB
from sim.workload import Workload

GPU_TOML = """
hbm_bytes = 24e9
hbm_bytes_per_s = 1e12
fp16_flop_per_s = 100e12
fp32_flop_per_s = 50e12
has_bf16 = false
sm_count = 50
launch_s = 3e-6
link = { name = "PCIe 4.0 x16", bytes_per_s = 31.5e9 }
"""
NOT_POSITIVE = ("0", "-1", "nan", "inf", "-inf", "1e999", "", " ", "many", "1,5")
NOT_WHOLE = (*NOT_POSITIVE, "1.5", "64.0", "1e3", "9" * 5000)


def test_no_option_asks_for_opt_13b_on_an_a100_with_a_cache_that_does_not_fit() -> None:
    request = request_of(Question())

    machine = MachineSpec(name="a100-40g", gpu=catalogue.gpu("a100-40g"), host=catalogue.host("default"))
    assert request.machine == machine
    assert request.profile == Profile.nominal(machine)
    assert request.model == catalogue.model("opt-13b")
    assert request.workload == Workload(batch=64, prompt_tokens=128, output_tokens=512)
    assert (request.dtype, request.weight_format) == (DType.FP16, WeightFormat.NATIVE)
    assert (request.max_sparsity, request.selectors, request.kv_formats) == (0.8, (Selector.SWA,), (KvFormat.INT8,))
    assert (request.concurrency, request.objective) == (None, Objective.THROUGHPUT)
    assert (request.max_tpot_s, request.kv_budget_bytes) == (None, None)


def test_every_option_reaches_the_request() -> None:
    request = request_of(
        Question(
            gpu="L40S",
            host="desktop",
            model="meta-llama/Llama-3-8B",
            batch="8",
            prompt="100",
            output="50",
            dtype="bf16",
            weight_format="int8",
            sparsity="0.9",
            selector=("swa, h2o", "pages"),
            kv_formats=("native", "fp8,int4"),
            concurrency="3",
            objective="tpot",
            max_tpot_ms="20",
            kv_budget_gib="1.5",
        )
    )

    assert (request.machine.name, request.machine.host.name, request.model.name) == ("l40s", "desktop", "llama-3-8b")
    assert request.workload == Workload(batch=8, prompt_tokens=100, output_tokens=50)
    assert (request.dtype, request.weight_format, request.max_sparsity) == (DType.BF16, WeightFormat.INT8, 0.9)
    assert request.selectors == (Selector.SWA, Selector.H2O, Selector.PAGES)
    assert request.kv_formats == (KvFormat.FP8, KvFormat.INT4)
    assert (request.concurrency, request.objective) == (3, Objective.TPOT)
    assert (request.max_tpot_s, request.kv_budget_bytes) == (pytest.approx(0.020), 3 * GIB // 2)


def test_overrides_change_the_machine_keep_its_name_and_are_listed() -> None:
    machine = request_of(Question(hbm_gib="24", link_gb_s="12.5", host_gib="0")).machine

    assert machine.name == "a100-40g"
    assert machine.gpu.hbm_bytes == 24 * GIB
    assert machine.gpu.link.bytes_per_s == 12.5e9
    assert machine.host.dram_bytes == 0
    assert machine.overrides == ("hbm_gib=24", "link_gb_s=12.5", "host_gib=0")


def test_concurrency_is_all_some_or_the_planners_choice() -> None:
    chosen = [request_of(Question(concurrency=text)).concurrency for text in ("auto", "all", "1", "64")]

    assert chosen == [None, 64, 1, 64]


def test_lossless_leaves_nothing_that_changes_the_output() -> None:
    request = request_of(Question(lossless=True))

    assert (request.max_sparsity, request.selectors, request.kv_formats) == (0.0, (), ())


@pytest.mark.parametrize(
    "changes",
    [{"sparsity": "0.5"}, {"selector": ("swa",)}, {"kv_formats": ("int8",)}, {"weight_format": "int4"}],
    ids=lambda changes: next(iter(changes)),
)
def test_lossless_and_its_contrary_are_refused_together(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--lossless forbids that"):
        request_of(Question(lossless=True, **changes))


def test_lossless_agrees_with_options_that_say_the_same() -> None:
    same = Question(lossless=True, sparsity="0.0", selector=("dense",), kv_formats=("native",))

    assert request_of(same) == request_of(Question(lossless=True))


@pytest.mark.parametrize("option", ["batch", "prompt", "output", "concurrency"])
@pytest.mark.parametrize("text", NOT_WHOLE, ids=lambda text: text[:8] or "empty")
def test_counts_are_whole_and_above_zero(option: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{option}=.*must be .*a whole number from 1 to"):
        request_of(Question(**{option: text}))


@pytest.mark.parametrize("option", ["hbm_gib", "link_gb_s", "kv_budget_gib", "max_tpot_ms"])
@pytest.mark.parametrize("text", NOT_POSITIVE, ids=lambda text: text or "empty")
def test_amounts_are_finite_and_above_zero(option: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')}=.*must be a number above 0"):
        request_of(Question(**{option: text}))


@pytest.mark.parametrize("text", ["1", "1.2", "-0.1", "nan", "inf", "", "80 %"])
def test_sparsity_is_a_share_below_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--sparsity=.*must lie in \[0, 1\)"):
        request_of(Question(sparsity=text))


@pytest.mark.parametrize("option", ["dtype", "weight_format", "objective"])
def test_a_choice_lists_what_may_be_chosen(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')}=fp12, must be one of \w+, \w+, \w+$"):
        request_of(Question(**{option: "fp12"}))


@pytest.mark.parametrize("text", ["fp12", "swa,", "", "native,,int8"])
@pytest.mark.parametrize("option", ["selector", "kv_formats"])
def test_each_of_several_choices_is_checked(option: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')}=.*must be one of"):
        request_of(Question(**{option: (text,)}))


@pytest.mark.parametrize(
    "question, message",
    [
        (Question(gpu="h100"), "could be any of h100-80g-pcie, h100-80g-sxm"),
        (Question(gpu="a100-41g"), "near it: a100-40g"),
        (Question(gpu=""), "--gpu='', must be a name"),
        (Question(host="laptop"), "host='laptop', not in the catalogue"),
        (Question(model="opt-14b"), "near it: opt-13b"),
        (Question(batch="4", concurrency="5"), "from 1 to the batch, 4"),
        (Question(prompt="2000"), "prompt \\+ output - 1 = 2511 tokens, must fit opt-13b's context of 2048"),
        (Question(gpu="v100-16g", dtype="bf16"), "dtype=bf16, v100-16g has no bf16 arithmetic: use fp16"),
        (Question(kv_formats=("fp8",)), "kv_format=fp8, a100-40g has no fp8 arithmetic"),
    ],
)
def test_what_does_not_exist_or_fit_is_said(question: Question, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_of(question)


def test_gpu_and_model_come_from_files_too(tmp_path: Path) -> None:
    card = tmp_path / "my-card.toml"
    card.write_text(GPU_TOML)
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "opt", "num_hidden_layers": 2, "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, '
        '"vocab_size": 100, "max_position_embeddings": 1024}'
    )

    requests = [request_of(Question(gpu=str(card), model=str(model))) for model in (folder, folder / "config.json")]

    assert [request.machine.name for request in requests] == ["my-card", "my-card"]
    assert [request.model.name for request in requests] == ["my-model", "my-model"]


def test_a_name_of_the_catalogue_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l4").write_text("not a GPU")
    (tmp_path / "mine").write_text(GPU_TOML)

    assert request_of(Question(gpu="l4")).machine.gpu == catalogue.gpu("l4")
    assert request_of(Question(gpu="mine")).machine.name == "mine"


def test_a_path_that_leads_nowhere_is_reported_as_a_path() -> None:
    for question in (Question(gpu="./none.toml"), Question(model="./none"), Question(gpu="none.toml")):
        with pytest.raises(ValueError, match="no such file"):
            request_of(question)


def test_the_command_line_writes_out_every_default_and_asks_the_same() -> None:
    question = Question(gpu="l4", batch="2", selector=("swa", "h2o"), max_tpot_ms="30", host_gib="64")

    assert question.command_line == (
        "planner solve --gpu l4 --host default --model opt-13b --batch 2 --prompt 128 --output 512 --dtype fp16 "
        "--weight-format native --sparsity 0.8 --selector swa,h2o --kv-formats native,int8 --concurrency auto "
        "--objective throughput --max-tpot-ms 30 --host-gib 64"
    )


def test_the_command_line_quotes_what_a_shell_would_split() -> None:
    assert "--gpu 'my card.toml'" in Question(gpu="my card.toml").command_line

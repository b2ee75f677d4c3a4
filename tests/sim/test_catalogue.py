"""The catalogue: figures that physics and the makers' own statements bear out, and names that are found or refused."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sim import catalogue
from sim.spec import GpuSpec, HostSpec, LinkSpec, ModelSpec

# Dense FLOPs of one SM (or compute unit) in one cycle: fp16 tensor with 32-bit accumulation, and plain fp32.
FLOP_PER_SM_CYCLE = {
    "v100-16g": (1024, 128),
    "v100-32g": (1024, 128),
    "t4": (1024, 128),
    "a10": (1024, 256),
    "a10g": (512, 256),
    "l4": (1024, 256),
    "l40s": (1024, 256),
    "a100-40g": (2048, 128),
    "a100-80g": (2048, 128),
    "rtx-3090": (512, 256),
    "rtx-4090": (512, 256),
    "rtx-5090": (512, 256),
    "rtx-a6000": (1024, 256),
    "h100-80g-pcie": (4096, 256),
    "h100-80g-sxm": (4096, 256),
    "h200": (4096, 256),
    "gh200": (4096, 256),
    "b200": (8192, 256),
    "mi300x": (2048, 256),
}
NOMINAL_GIB = {
    "v100-16g": 16,
    "v100-32g": 32,
    "t4": 16,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "l40s": 48,
    "a100-40g": 40,
    "a100-80g": 80,
    "rtx-3090": 24,
    "rtx-4090": 24,
    "rtx-5090": 32,
    "rtx-a6000": 48,
    "h100-80g-pcie": 80,
    "h100-80g-sxm": 80,
    "h200": 141,
    "gh200": 96,
    "b200": 180,
    "mi300x": 192,
}

GPU_TOML = """
hbm_bytes = 24e9
hbm_bytes_per_s = 1e12
fp16_flop_per_s = 100e12
fp32_flop_per_s = 50e12
has_bf16 = true
sm_count = 100
launch_s = 3e-6
link = { name = "PCIe 4.0 x16", bytes_per_s = 31.5e9 }
"""


def refusal(act: Callable[..., object], *args: object) -> str:
    """The message with which ``act(*args)`` refuses."""
    with pytest.raises(ValueError, match=r".") as error:
        act(*args)
    return str(error.value)


def by_name(spec: GpuSpec | HostSpec | ModelSpec) -> str:
    return spec.name


def test_the_names_are_those_of_the_specs_in_order() -> None:
    assert catalogue.gpu_names() == tuple(FLOP_PER_SM_CYCLE) == tuple(map(by_name, catalogue.gpus()))
    assert catalogue.host_names() == tuple(map(by_name, catalogue.hosts()))
    assert catalogue.model_names() == tuple(map(by_name, catalogue.models()))


@pytest.mark.parametrize("spec", [*catalogue.gpus(), *catalogue.hosts(), *catalogue.models()], ids=by_name)
def test_every_entry_says_where_its_figures_come_from(spec: GpuSpec | HostSpec | ModelSpec) -> None:
    assert len(spec.source) > 20
    assert "\n" not in spec.source


@pytest.mark.parametrize("gpu", catalogue.gpus(), ids=by_name)
class TestGpuIsPhysical:
    """A rate with sparsity, or of the wrong accumulator, implies a clock that the card does not have."""

    def test_tensor_rate_implies_a_clock_that_the_fp32_rate_implies_too(self, gpu: GpuSpec) -> None:
        fp16_per_cycle, fp32_per_cycle = FLOP_PER_SM_CYCLE[gpu.name]
        fp16_clock_per_s = gpu.fp16_flop_per_s / (gpu.sm_count * fp16_per_cycle)
        fp32_clock_per_s = gpu.fp32_flop_per_s / (gpu.sm_count * fp32_per_cycle)

        assert 1.3e9 < fp16_clock_per_s < 2.6e9
        # Tensor cores may be held to a lower boost clock than the rest (Hopper and Blackwell: by 7 to 8 %).
        assert fp32_clock_per_s == pytest.approx(fp16_clock_per_s, rel=0.09)

    def test_eight_bit_rates_are_small_multiples_of_the_fp16_rate(self, gpu: GpuSpec) -> None:
        if gpu.fp8_flop_per_s is not None:
            assert gpu.fp8_flop_per_s / gpu.fp16_flop_per_s == pytest.approx(2, rel=0.02)
        if gpu.int8_op_per_s is not None:
            # GeForce multiplies int8 at full rate, and fp16 with 32-bit accumulation at half.
            full_rate = 4 if gpu.name.startswith("rtx-") and gpu.name != "rtx-a6000" else 2
            assert gpu.int8_op_per_s / gpu.fp16_flop_per_s == pytest.approx(full_rate, rel=0.02)

    def test_memory_is_the_nominal_size_less_a_reserve(self, gpu: GpuSpec) -> None:
        assert 0.91 < gpu.hbm_bytes / (NOMINAL_GIB[gpu.name] * 2**30) <= 1

    def test_arithmetic_intensity_and_link_lie_where_cards_lie(self, gpu: GpuSpec) -> None:
        assert 70 < gpu.fp16_flop_per_s / gpu.hbm_bytes_per_s < 430
        assert 8 < gpu.hbm_bytes_per_s / gpu.link.bytes_per_s < 130
        assert 2e-6 <= gpu.launch_s <= 5e-6

    def test_link_rate_is_that_of_its_name(self, gpu: GpuSpec) -> None:
        rates = {"PCIe 3.0 x16": 15.75e9, "PCIe 4.0 x16": 31.5e9, "PCIe 5.0 x16": 63.0e9, "NVLink-C2C": 450e9}
        assert gpu.link.bytes_per_s == rates[gpu.link.name]

    def test_bf16_came_with_ampere(self, gpu: GpuSpec) -> None:
        assert gpu.has_bf16 == (gpu.name not in ("v100-16g", "v100-32g", "t4"))


@pytest.mark.parametrize("host", catalogue.hosts(), ids=by_name)
def test_a_host_is_physical(host: HostSpec) -> None:
    assert 32 * 2**30 <= host.dram_bytes <= 2**41
    assert 50e9 < host.dram_bytes_per_s < 1e12
    # fp32 FLOPs of one core in a second: 32 to 64 in a cycle at 2 to 4.5 GHz.
    assert 60e9 < host.flop_per_s / host.cores < 190e9


def test_the_default_host_has_128_gib() -> None:
    assert (catalogue.host().name, catalogue.host().dram_bytes) == ("default", 128 * 2**30)


@pytest.mark.parametrize("model", catalogue.models(), ids=by_name)
class TestModelMatchesItsMakers:
    def test_parameters(self, model: ModelSpec) -> None:
        published = catalogue.published(model.name)
        # A count that is not rounded must be met to the last bias.
        tolerance = 0.01 if published.parameters % 10**6 == 0 else 0
        assert model.parameters == pytest.approx(published.parameters, rel=tolerance, abs=0)

    def test_kv_bytes_per_token(self, model: ModelSpec) -> None:
        kv_bytes = 2 * model.layers * model.kv_dim * 2
        assert kv_bytes == catalogue.published(model.name).kv_bytes_per_token_fp16


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("a100-40g", "a100-40g"),
        ("A100_40GB", "a100-40g"),
        ("a100 40g", "a100-40g"),
        ("  A100-40 GiB ", "a100-40g"),
        ("a100-80", "a100-80g"),
        ("RTX4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g-sxm"),
        ("H100_PCIe", "h100-80g-pcie"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_gpu_is_found_by_any_spelling(spelling: str, name: str) -> None:
    assert catalogue.gpu(spelling).name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("opt-6.7b", "opt-6.7b"),
        ("OPT-6.7B", "opt-6.7b"),
        ("opt6.7b", "opt-6.7b"),
        ("opt_6.7", "opt-6.7b"),
        ("facebook/opt-6.7b", "opt-6.7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Llama 3.1 70B", "llama-3.1-70b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("huggyllama/llama-30b", "llama-33b"),
        ("llama33b", "llama-33b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("qwen-3 8b", "qwen3-8b"),
        ("EleutherAI/pythia-6.9b", "pythia-6.9b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("microsoft/phi-2", "phi-2"),
        ("Phi-3-mini-4k-instruct", "phi-3-mini"),
    ],
)
def test_a_model_is_found_by_any_spelling(spelling: str, name: str) -> None:
    assert catalogue.model(spelling).name == name
    assert catalogue.published(spelling) == catalogue.published(name)


def test_no_spelling_stands_for_two_entries() -> None:
    for kind in ("gpu", "host", "model"):
        entries = catalogue._entries(kind)
        spellings = [s for name, entry in entries.items() for s in (name, *entry.get("aliases", ()))]
        assert len({catalogue.spelling_key(s) for s in spellings}) == len(spellings)


@pytest.mark.parametrize(
    ("ambiguous", "variants"),
    [
        ("h100", "h100-80g-pcie, h100-80g-sxm"),
        ("NVIDIA H100 80GB", "h100-80g-pcie, h100-80g-sxm"),
        ("a100", "a100-40g, a100-80g"),
        ("V100", "v100-16g, v100-32g"),
        ("rtx", "rtx-3090, rtx-4090, rtx-5090, rtx-a6000"),
    ],
)
def test_an_ambiguous_gpu_is_not_guessed(ambiguous: str, variants: str) -> None:
    message = refusal(catalogue.gpu, ambiguous)
    assert message == f"gpu={ambiguous!r}, could be any of {variants}: give one in full"


def test_an_ambiguous_model_lists_its_family_and_no_other() -> None:
    message = refusal(catalogue.model, "llama-2")
    assert message == "model='llama-2', could be any of llama-2-7b, llama-2-13b, llama-2-70b: give one in full"


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        ("mi300", "not in the catalogue; near it: mi300x; `planner gpus` lists all 19"),
        ("a1", "not in the catalogue; near it: a10, a10g; `planner gpus` lists all 19"),
        ("l40", "not in the catalogue; near it: l40s, l4; `planner gpus` lists all 19"),
        ("toaster", "not in the catalogue; `planner gpus` lists all 19"),
        ("", "not in the catalogue; `planner gpus` lists all 19"),
        ("-", "not in the catalogue; `planner gpus` lists all 19"),
    ],
)
def test_an_unknown_gpu_is_answered_with_near_ones_or_how_to_list(unknown: str, hint: str) -> None:
    message = refusal(catalogue.gpu, unknown)
    assert message == f"gpu={unknown!r}, {hint}"


@pytest.mark.parametrize(
    "unknown", ["llama-3-3b", "opt-175b", "./opt-6.7b", "models/hub/opt-6.7b", "opt-67b", "a100-40g"]
)
def test_an_unknown_model_is_refused(unknown: str) -> None:
    with pytest.raises(ValueError, match="not in the catalogue"):
        catalogue.model(unknown)


def test_something_that_is_no_name_is_refused_in_one_line() -> None:
    assert refusal(catalogue.gpu, None) == "gpu=None, must be a name: `planner gpus` lists them"
    message = refusal(catalogue.host, "no\nsuch " + "x" * 1000)
    assert len(message.splitlines()) == 1
    assert len(message) < 200


class TestLoadGpu:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "my-card.toml"
        path.write_text(text)
        return path

    def test_a_card_of_the_catalogue_is_as_it_is_there(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, GPU_TOML + 'name = "h200"\n')

        assert refusal(catalogue.load_gpu, path) == (
            f"{path}: name='h200', is a card of the catalogue with other figures: give it a name of its own"
        )

    @pytest.mark.parametrize("head", ["", "[gpu]"])
    def test_keys_at_the_top_level_or_in_a_table(self, tmp_path: Path, head: str) -> None:
        path = self.write(tmp_path, head + GPU_TOML)
        assert catalogue.load_gpu(path) == GpuSpec(
            name="my-card",
            hbm_bytes=24_000_000_000,
            hbm_bytes_per_s=1e12,
            fp16_flop_per_s=100e12,
            fp32_flop_per_s=50e12,
            fp8_flop_per_s=None,
            int8_op_per_s=None,
            has_bf16=True,
            sm_count=100,
            launch_s=3e-6,
            link=LinkSpec(name="PCIe 4.0 x16", bytes_per_s=31.5e9),
            source=str(path),
        )

    def test_stated_name_source_and_eight_bit_rates_are_kept(self, tmp_path: Path) -> None:
        plain = catalogue.load_gpu(self.write(tmp_path, GPU_TOML))
        stated = 'name = "card"\nsource = "a datasheet"\nfp8_flop_per_s = 200e12\nint8_op_per_s = 200e12\n'
        assert catalogue.load_gpu(self.write(tmp_path, GPU_TOML + stated)) == replace(
            plain, name="card", source="a datasheet", fp8_flop_per_s=200e12, int8_op_per_s=200e12
        )

    @pytest.mark.parametrize(
        ("old", "new", "fault"),
        [
            ("sm_count = 100\n", "", "missing sm_count; a catalogue entry has name, hbm_bytes"),
            ("sm_count = 100\n", "sm_cnt = 100\n", "key=sm_cnt, must be one of name, hbm_bytes"),
            ("24e9", "-24", "gpu.hbm_bytes=-24, must be a whole number of at least 1"),
            ("24e9", "24.5", "gpu.hbm_bytes=24.5, must be a whole number"),
            ("24e9", '"24 GB"', "gpu.hbm_bytes=24 GB, must be a whole number"),
            ("1e12", "nan", "gpu.hbm_bytes_per_s=nan, must be a finite number above 0"),
            ("1e12", "inf", "gpu.hbm_bytes_per_s=inf, must be a finite number above 0"),
            ("1e12", "true", "gpu.hbm_bytes_per_s=True, must be a finite number above 0"),
            ("3e-6", "-3e-6", "gpu.launch_s=-3e-06, must be a finite number of at least 0"),
            ("has_bf16 = true", 'has_bf16 = "yes"', "has_bf16='yes', must be true or false"),
            ("31.5e9", "0", "link.bytes_per_s=0, must be a finite number above 0"),
            ("bytes_per_s = 31.5e9 }", "gb_per_s = 31.5 }", "link: key=gb_per_s, must be one of name, bytes_per_s"),
            (", bytes_per_s = 31.5e9", "", "link: missing bytes_per_s"),
            ('{ name = "PCIe 4.0 x16", bytes_per_s = 31.5e9 }', '"PCIe"', "link='PCIe', must be a table such as"),
            ("sm_count = 100", "sm_count = ", "not TOML"),
        ],
    )
    def test_a_wrong_key_is_named(self, tmp_path: Path, old: str, new: str, fault: str) -> None:
        assert old in GPU_TOML
        path = self.write(tmp_path, GPU_TOML.replace(old, new))
        message = refusal(catalogue.load_gpu, path)
        assert fault in message
        assert str(path) in message
        assert len(message.splitlines()) == 1

    def test_a_file_that_is_missing_or_a_folder_or_binary(self, tmp_path: Path) -> None:
        binary = tmp_path / "card.bin"
        binary.write_bytes(b"\x00\xff\xfe\x80")
        for path, fault in (
            (tmp_path / "none.toml", "no such file"),
            (tmp_path, "not a file"),
            (binary, "not a text file (UTF-8)"),
        ):
            message = refusal(catalogue.load_gpu, path)
            remedy = "give a TOML file with the keys of a GPU"
            assert message == f"gpu={str(path)!r}, {fault}: {remedy}"


def test_importing_reads_nothing_and_stays_in_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import sim.catalogue as c;"
        "assert c._entries.cache_info().currsize == 0;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    root = Path(catalogue.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.stdout.strip(), done.stderr) == ("['sim']", "")

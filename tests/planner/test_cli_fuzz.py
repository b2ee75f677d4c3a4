"""Two hundred seeded command lines that cannot be answered: one line each, the right code, and no file touched."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from builders import make_setting, newest_in_hbm
from commandline import Said, run, unchanged
from planner.terminal import BAD_INPUT, INFEASIBLE
from sim.files import plan_to_json

CASES = 200
Words: TypeAlias = list[str]
Defect: TypeAlias = Callable[[random.Random, Path], Words]

GPUS = ("a100-40g", "L40S", "h100-80g-sxm", "NVIDIA H200")
NUMBERS = ("--batch", "--prompt", "--output", "--concurrency", "--hbm-gib", "--link-gb-s", "--kv-budget-gib")
NOT_NUMBERS = (
    "0",
    "-1",
    "-0",
    "nan",
    "NaN",
    "inf",
    "-Infinity",
    "1e999",
    "",
    " ",
    "twelve",
    "1,000",
    "0x40",
    "½",
    "--",
)
STRANGE = (
    "[bold]x[/bold]",
    "[/]",
    "[link=file:///x]y",
    "\x1b[31mred",
    "a\nb",
    "tab\there",
    "🦙-7b",
    "‮desrever",
    "\udcff\udcfe",
    "' OR 1=1",
    "$(reboot)",
    "%s%n",
    "x" * 300,
    "../../../etc/passwd",
    "C:\\gpu",
    ".",
)
GPU_TOML = {
    "hbm_bytes": "24e9",
    "hbm_bytes_per_s": "1e12",
    "fp16_flop_per_s": "100e12",
    "fp32_flop_per_s": "50e12",
    "has_bf16": "true",
    "sm_count": "50",
    "launch_s": "3e-6",
    "link": '{ name = "PCIe 4.0 x16", bytes_per_s = 31.5e9 }',
}
CONFIG = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
}
SOLVABLE = ["--model", "opt-125m", "--batch", "1", "--prompt", "8", "--output", "4"]


# Defects of the options


def bad_number(rng: random.Random, _: Path) -> Words:
    return solve(rng, rng.choice(NUMBERS), rng.choice(NOT_NUMBERS))


def bad_number_where_zero_is_allowed(rng: random.Random, _: Path) -> Words:
    option = rng.choice(("--sparsity", "--host-gib"))
    bad = [text for text in NOT_NUMBERS if text not in ("0", "-0")]
    return solve(rng, option, rng.choice([*bad, *(("1", "1.0", "1.2", "100") if option == "--sparsity" else ())]))


def too_large(rng: random.Random, _: Path) -> Words:
    return solve(rng, rng.choice((*NUMBERS, "--host-gib", "--max-tpot-ms")), rng.choice(("1e300", "9" * 400)))


def unknown_name(rng: random.Random, _: Path) -> Words:
    option = rng.choice(("--gpu", "--host", "--model", "--dtype", "--weight-format", "--objective", "--concurrency"))
    return solve(rng, option, rng.choice((*STRANGE, "h100x", "opt", "", "native,int8", "FP16")))


def unknown_name_among_several(rng: random.Random, _: Path) -> Words:
    option, known = rng.choice((("--selector", "swa"), ("--kv-formats", "int8")))
    bad = rng.choice([text for text in STRANGE if text.strip()])
    return solve(rng, *rng.choice(((option, f"{known},{bad}"), (option, known, option, bad), (option, f"{known},"))))


def ambiguous_name(rng: random.Random, _: Path) -> Words:
    return solve(
        rng, *rng.choice((("--gpu", "h100"), ("--gpu", "V100"), ("--model", "llama-3"), ("--model", "pythia")))
    )


def contradiction(rng: random.Random, _: Path) -> Words:
    pair = rng.choice(
        (
            ["--lossless", "--sparsity", "0.5"],
            ["--lossless", "--kv-formats", "int8"],
            ["--lossless", "--weight-format", "int4"],
            ["--gpu", "v100-16g", "--dtype", "bf16"],
            ["--gpu", "a100-40g", "--kv-formats", "fp8"],
            ["--batch", "4", "--concurrency", "5"],
            ["--model", "opt-13b", "--prompt", "2048", "--output", "2"],
        )
    )
    return solve(rng, *pair)


def wrong_words(rng: random.Random, _: Path) -> Words:
    return rng.choice(
        (
            [rng.choice([text for text in STRANGE if text != "."])],
            ["--gpu", "l4", "solve"],
            ["solve", f"--{rng.choice(('gpus', 'bacth', 'x', 'no-json'))}", "1"],
            ["solve", rng.choice(NUMBERS)],
            ["solve", rng.choice(STRANGE), "l4"],
            ["solve", "--json=yes"],
            ["simulate"],
            ["simulate", "a.json", "b.json"],
            ["gpus", "--batch", "3"],
            ["-z"],
        )
    )


# Defects of files that are read


def bad_gpu_file(rng: random.Random, folder: Path) -> Words:
    keys = dict(GPU_TOML)
    key = rng.choice(sorted(keys))
    what = rng.choice(("missing", "wrong", "unknown", "truncated", "binary", "empty", "folder", "absent"))
    if what == "missing":
        del keys[key]
    elif what == "wrong":
        keys[key] = rng.choice(("nan", "-1", '"many"', "[]", "0.5" if key in ("hbm_bytes", "sm_count") else "-inf"))
    elif what == "unknown":
        keys[rng.choice(("hbm_gib", "[bold]", "名"))] = "1"
    text = "".join(f"{json.dumps(name, ensure_ascii=False)} = {value}\n" for name, value in keys.items())
    file = write(folder, rng, ".toml", what, text)
    return solve(rng, "--gpu", str(file))


def bad_model_file(rng: random.Random, folder: Path) -> Words:
    config: dict[str, Any] = dict(CONFIG)
    key = rng.choice(sorted(config))
    what = rng.choice(("missing", "wrong", "no object", "truncated", "binary", "empty", "folder", "absent"))
    if what == "missing":
        del config[key]
    elif what == "wrong":
        config[key] = rng.choice((0, -1, 1.5, "seven", None, [], {}, True, float("nan")))
    text = rng.choice(("[]", "3", "null", '"opt"')) if what == "no object" else json.dumps(config)
    file = write(folder, rng, ".json", what, text)
    return solve(rng, "--model", str(file))


def bad_plan_file(rng: random.Random, folder: Path) -> Words:
    plan = a_plan()
    what = rng.choice(("version", "missing", "wrong", "truncated", "binary", "empty", "folder", "absent", "constant"))
    if what == "version":
        plan["schema_version"] = rng.choice((0, 2, 99, "1", None, [1], 1.5))
    elif what == "missing":
        holder, key = a_place(rng, plan)
        while key in ("phases", "access") or key in OPTIONAL:
            holder, key = a_place(rng, plan)
        del holder[key]
    elif what == "wrong":
        holder, key = a_place(rng, plan)
        while key == "phases":
            holder, key = a_place(rng, plan)
        holder[key] = rng.choice(({"no": "such"}, [[]], {"deep": [{"er": None}]}))
    text = json.dumps(plan)
    if what == "constant":
        text = text.replace(
            '"batch": 5', f'"batch": {rng.choice(("NaN", "Infinity", "-Infinity", "9" * 5000, "-5", "0"))}'
        )
    file = write(folder, rng, ".json", what, text)
    return ["simulate", str(file), *rng.choice(([], ["--json"], ["--trace", str(folder / "kept.json")]))]


# Defects of files that are written, and questions without an answer


def bad_output(rng: random.Random, folder: Path) -> Words:
    out = rng.choice(
        (
            folder / "missing" / "plan.json",
            folder,
            folder / "kept.json" / "plan.json",
            folder / "[bold]" / "x",
            folder / ("x" * 300),
            Path("/proc/plan.json"),
        )
    )
    return ["solve", *SOLVABLE, *rng.choice(([], ["--json"])), rng.choice(("-o", "--out")), str(out)]


def bad_trace(rng: random.Random, folder: Path) -> Words:
    (folder / "plan.json").write_text(json.dumps(a_plan()))
    *_, out = bad_output(rng, folder)
    return ["simulate", str(folder / "plan.json"), "--trace", out]


def infeasible(rng: random.Random, folder: Path) -> Words:
    lacking = rng.choice(
        (
            ["--hbm-gib", "0.5"],
            ["--model", "opt-66b", "--gpu", "t4", "--host-gib", "16"],
            ["--kv-budget-gib", "0.000001"],
            ["--max-tpot-ms", "0.001"],
            ["--model", "llama-3.1-405b", "--weight-format", "int4"],
        )
    )
    return ["solve", "--batch", "2", *lacking, *rng.choice(([], ["--json"], ["-o", str(folder / "kept.json")]))]


def overflowing_plan(rng: random.Random, folder: Path) -> Words:
    plan = a_plan()
    if rng.random() < 0.5:
        plan["kv_budget_bytes"] = rng.randrange(100)
    else:
        plan["machine"]["host"]["dram_bytes"] = rng.randrange(100)
    (folder / "plan.json").write_text(json.dumps(plan))
    return [
        "simulate",
        str(folder / "plan.json"),
        *rng.choice(([], ["--json"], ["--trace", str(folder / "kept.json")])),
    ]


UNANSWERABLE = (infeasible, overflowing_plan)
DEFECTS: tuple[Defect, ...] = (
    bad_number,
    bad_number_where_zero_is_allowed,
    too_large,
    unknown_name,
    unknown_name_among_several,
    ambiguous_name,
    contradiction,
    wrong_words,
    bad_gpu_file,
    bad_model_file,
    bad_plan_file,
    bad_plan_file,
    bad_output,
    bad_trace,
    *UNANSWERABLE,
)
# Keys that a plan may leave out: they have defaults, or follow from the others.
OPTIONAL = {
    "weight_format",
    "weights_on_host",
    "drop_dead",
    "placement",
    "write_back",
    "recompute",
    "fetch_by",
    "host_attention",
    "guess_hits",
    "prefetch_layers",
    "overrides",
    "usable_share",
    "sparsity",
    "local_fraction",
    "gpu",
    "host",
    "age_shares",
    "picks",
}


def solve(rng: random.Random, *defect: str) -> Words:
    """``planner solve`` with harmless options around the one that is at fault, which comes last and so counts."""
    harmless = [["--gpu", rng.choice(GPUS)], ["--output", "20"], ["--json"], ["--batch", "8"], ["--objective", "tpot"]]
    chosen = [word for option in rng.sample(harmless, rng.randrange(3)) for word in option]
    return ["solve", *chosen, *defect, *rng.choice(([], ["-o", "kept.json"]))]


def a_plan() -> dict[str, Any]:
    return plan_to_json(newest_in_hbm(make_setting(batch=5, prompt=4, output=6, concurrency=2), slots=3))


def a_place(rng: random.Random, data: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """An object somewhere in ``data`` and one of its keys."""
    key = rng.choice(sorted(data))
    return a_place(rng, data[key]) if isinstance(data[key], dict) and rng.random() < 0.7 else (data, key)


def write(folder: Path, rng: random.Random, suffix: str, what: str, text: str) -> Path:
    """A file with ``text``, or with what else ``what`` says it is."""
    file = folder / f"{rng.choice(('mine', '[bold]mine', 'mein Gerät', '模型'))}{suffix}"
    if what == "folder":
        file.mkdir()
    elif what == "binary":
        file.write_bytes(b"\x89PNG\r\n\x1a\n\x00" + rng.randbytes(200))
    elif what == "truncated":
        file.write_text(text[: rng.randrange(1, len(text) - 20)] + "[", encoding="utf-8")
    elif what != "absent":
        file.write_text("" if what == "empty" else text, encoding="utf-8")
    return file


@pytest.mark.parametrize("seed", range(CASES))
def test_a_command_line_that_cannot_be_answered_is_refused_in_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect = DEFECTS[seed % len(DEFECTS)]
    monkeypatch.chdir(tmp_path)
    Path("kept.json").write_text("what was there before")
    words = defect(random.Random(seed), tmp_path)

    with unchanged(tmp_path):
        said = run(*words)

    assert_refused(said, INFEASIBLE if defect in UNANSWERABLE else BAD_INPUT, words)


def assert_refused(said: Said, code: int, words: Words) -> None:
    __tracebackhide__ = True
    assert said.code == code, (words, said)
    assert len(said.error) > 10, (words, said)
    assert "Traceback" not in said.err

"""From what a command line says to what the planner works on: text to machines, models, workloads and requests.

Numbers stay text until here, so that every command refuses a bad one in the same words.
"""

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TypeVar

from planner.request import Objective, Request
from sim import catalogue
from sim.attention import Selector
from sim.kv import KvFormat, require_kv_format
from sim.model_config import load_model_config
from sim.profile import Profile
from sim.profile_files import load_profile, profile_for, shipped_file
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.units import GB, GIB, MILLI
from sim.workload import Workload

Noun = TypeVar("Noun")
Choice = TypeVar("Choice", bound=StrEnum)

DEFAULT_SPARSITY = "0.8"
DEFAULT_SELECTORS = (Selector.SWA.value,)
DEFAULT_KV_FORMATS = (KvFormat.NATIVE.value, KvFormat.INT8.value)
NOMINAL = "nominal"  # as a profile: datasheet rates, though the card may have been measured
# Nobody plans beyond these; they keep a slip of the keyboard from filling the memory.
MOST_SEQUENCES = 100_000
MOST_TOKENS = 10_000_000
MOST_GIB = 2**20
MOST_GB_PER_S = 10**6
MOST_MS = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The options of ``planner solve``, as typed. Those that are None or empty were not given."""

    gpu: str = "a100-40g"
    host: str = "default"
    model: str = "opt-13b"
    batch: str = "64"
    prompt: str = "128"
    output: str = "512"
    dtype: str = DType.FP16.value
    weight_format: str = WeightFormat.NATIVE.value
    sparsity: str | None = None
    selector: tuple[str, ...] = ()
    kv_formats: tuple[str, ...] = ()
    lossless: bool = False
    concurrency: str = "auto"
    objective: str = Objective.THROUGHPUT.value
    max_tpot_ms: str | None = None
    hbm_gib: str | None = None
    host_gib: str | None = None
    link_gb_s: str | None = None
    kv_budget_gib: str | None = None
    profile: str | None = None

    @property
    def command_line(self) -> str:
        """A command that asks the same, defaults written out so that it still does when they change."""
        options = [
            (f"--{field.name.replace('_', '-')}", getattr(_explicit(self), field.name)) for field in fields(self)
        ]
        return shlex.join(["planner", "solve", *(word for name, value in options for word in _words(name, value))])


def question_of(command_line: str) -> Question:
    """The question that ``Question.command_line`` wrote, a plan's provenance.

    Raises ValueError for anything else.
    """
    words = shlex.split(command_line)
    known = {f"--{field.name.replace('_', '-')}": field for field in fields(Question)}
    answers: dict[str, str | tuple[str, ...] | bool] = {}
    if words[:2] != ["planner", "solve"]:
        raise ValueError(f"command {_brief(command_line)}, must be one of `planner solve`")
    rest = iter(words[2:])
    for word in rest:
        if word not in known:
            raise ValueError(
                f"command {_brief(command_line)}, {_brief(word)} is no option of this version: solve again"
            )
        name = known[word].name
        answers[name] = True if name == "lossless" else next(rest, "")
    for name in ("selector", "kv_formats"):
        answers[name] = tuple(_split([str(answers[name])])) if name in answers else ()
    return Question(**answers)  # type: ignore[arg-type]


def request_of(question: Question) -> Request:
    """The planning problem that ``question`` poses.

    Raises ValueError, saying what was given and what is allowed, where it poses none.
    """
    asked = _explicit(question)
    machine = machine_of(asked)
    workload = workload_of(asked)
    kv_formats = _choices("--kv-formats", asked.kv_formats, KvFormat)
    for kv_format in kv_formats:
        require_kv_format(machine.gpu, kv_format)
    budget = asked.kv_budget_gib
    return Request(
        machine=machine,
        profile=profile_of(asked.profile, machine),
        model=model_of(asked),
        workload=workload,
        dtype=_choice("--dtype", asked.dtype, DType),
        weight_format=_choice("--weight-format", asked.weight_format, WeightFormat),
        max_sparsity=_sparsity(asked.sparsity),
        selectors=tuple(one for one in _choices("--selector", asked.selector, Selector) if one is not Selector.DENSE),
        kv_formats=tuple(one for one in kv_formats if one is not KvFormat.NATIVE),
        concurrency=_concurrency(asked.concurrency, workload.batch),
        objective=_choice("--objective", asked.objective, Objective),
        max_tpot_s=None if asked.max_tpot_ms is None else real("--max-tpot-ms", asked.max_tpot_ms, MOST_MS) * MILLI,
        kv_budget_bytes=None if budget is None else _gib("--kv-budget-gib", budget),
    )


def machine_of(question: Question) -> MachineSpec:
    """The GPU in its host, with the overrides applied and listed."""
    measured = _measured_machine(question)
    gpu = measured.gpu if measured else named_or_file("--gpu", question.gpu, ".toml", catalogue.gpu, catalogue.load_gpu)
    host = measured.host if measured and question.host == "default" else catalogue.host(question.host)
    overrides = {}
    if question.hbm_gib is not None:
        gpu = replace(gpu, hbm_bytes=_gib("--hbm-gib", question.hbm_gib))
        overrides["hbm_gib"] = question.hbm_gib
    if question.link_gb_s is not None:
        rate = real("--link-gb-s", question.link_gb_s, MOST_GB_PER_S) * GB
        gpu = replace(gpu, link=replace(gpu.link, bytes_per_s=rate))
        overrides["link_gb_s"] = question.link_gb_s
    if question.host_gib is not None:
        host = replace(host, dram_bytes=_gib("--host-gib", question.host_gib, or_none=True))
        overrides["host_gib"] = question.host_gib
    said = tuple(f"{name}={value.strip()}" for name, value in overrides.items())
    return MachineSpec(name=gpu.name, gpu=gpu, host=host, overrides=said)


def profile_of(text: str | None, machine: MachineSpec) -> Profile:
    """The profile in the file ``text``, the nominal one if it says so, else the best known one of ``machine``.

    Raises ValueError for a file that holds none of this card.
    """
    if text == NOMINAL:
        return Profile.nominal(machine)
    if text is not None and not text.strip():
        raise ValueError(f"--profile={text!r}, must be {NOMINAL} or the path of a file that `planner calibrate` wrote")
    return profile_for(machine, None if text is None else Path(text))


def _measured_machine(question: Question) -> MachineSpec | None:
    """The machine of a profile that describes its own, where it is the one asked about: no catalogue knows this CPU."""
    given = question.profile not in (None, NOMINAL)
    file = Path(str(question.profile)) if given else shipped_file(question.gpu)
    if file is None or (given and not os.path.isfile(file)):
        return None  # what is wrong with it, if anything, is said where it is read for its constants
    evidence = load_profile(file).evidence
    machine = evidence.machine if evidence else None
    return machine if machine and machine.gpu.name == question.gpu else None


def model_of(question: Question) -> ModelSpec:
    """A model of the catalogue, or the shape in a config.json."""
    return named_or_file("--model", question.model, ".json", catalogue.model, load_model_config)


def workload_of(question: Question) -> Workload:
    """Sequences and tokens."""
    return Workload(
        batch=whole("--batch", question.batch, MOST_SEQUENCES),
        prompt_tokens=whole("--prompt", question.prompt, MOST_TOKENS),
        output_tokens=whole("--output", question.output, MOST_TOKENS),
    )


def named_or_file(
    option: str, text: str, suffix: str, by_name: Callable[[str], Noun], from_file: Callable[[str], Noun]
) -> Noun:
    """What the catalogue knows as ``text``, or what the file of that name describes; a known name wins."""
    if not text.strip():
        raise ValueError(f"{option}={text!r}, must be a name of the catalogue or the path of a {suffix} file")
    if text.endswith(suffix) or text.startswith((".", "~", os.sep)):
        return from_file(text)
    try:
        return by_name(text)
    except ValueError:
        if os.path.exists(text):
            return from_file(text)
        raise


def whole(option: str, text: str, most: int) -> int:
    """A whole number from 1 to ``most``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise ValueError(
            f"{option}={_brief(text)}, must be a whole number from 1 to {most:,}: give it in digits, as 64"
        )
    return value


def real(option: str, text: str, most: float, *, or_none: bool = False) -> float:
    """A number above 0 (or 0 itself, with ``or_none``) and at most ``most``."""
    value = _number(text)
    if value is None or not (0 < value <= most or (or_none and value == 0)):
        low, example = "of at least 0" if or_none else "above 0", "24 or 1.5" if most > 1 else "0.5"
        raise ValueError(
            f"{option}={_brief(text)}, must be a number {low} and at most {most:,}: give one, as {example}"
        )
    return value


def _explicit(question: Question) -> Question:
    """The same question with its open options filled in; ``--lossless`` fills them in its own way."""
    if not question.lossless:
        return replace(
            question,
            sparsity=DEFAULT_SPARSITY if question.sparsity is None else question.sparsity,
            selector=question.selector or DEFAULT_SELECTORS,
            kv_formats=question.kv_formats or DEFAULT_KV_FORMATS,
        )
    native = KvFormat.NATIVE.value
    contrary = {
        "--sparsity": question.sparsity is not None and _number(question.sparsity) != 0 and question.sparsity,
        "--selector": _split(question.selector) not in ([], [Selector.DENSE.value]) and ",".join(question.selector),
        "--kv-formats": _split(question.kv_formats) not in ([], [native]) and ",".join(question.kv_formats),
        "--weight-format": question.weight_format != WeightFormat.NATIVE.value and question.weight_format,
    }
    for option, given in contrary.items():
        if given:
            raise ValueError(
                f"{option}={_brief(given)}, changes the output, --lossless forbids that: drop one of the two"
            )
    return replace(question, sparsity="0", selector=(Selector.DENSE.value,), kv_formats=(native,))


def _sparsity(text: str | None) -> float:
    value = _number(text or "")
    if value is None or not 0 <= value < 1:
        raise ValueError(
            f"--sparsity={_brief(text or '')}, must lie in [0, 1): 0.8 leaves out up to 80 % of the cached tokens, "
            "0 leaves out none"
        )
    return value


def _concurrency(text: str, batch: int) -> int | None:
    """None lets the planner choose."""
    if text == "auto":
        return None
    if text == "all":
        return batch
    try:
        value = whole("--concurrency", text, MOST_SEQUENCES)
    except ValueError:
        value = 0
    if not 1 <= value <= batch:
        raise ValueError(
            f"--concurrency={_brief(text)}, must be auto, all or a whole number from 1 to the batch, {batch}"
        )
    return value


def _gib(option: str, text: str, *, or_none: bool = False) -> int:
    """Bytes; at least one unless none are allowed."""
    size_bytes = round(real(option, text, MOST_GIB, or_none=or_none) * GIB)
    return size_bytes if or_none else max(1, size_bytes)


def _choice(option: str, text: str, choices: type[Choice]) -> Choice:
    if text not in list(choices):
        raise ValueError(f"{option}={_brief(text)}, must be one of {', '.join(choices)}")
    return choices(text)


def _choices(option: str, texts: Iterable[str], choices: type[Choice]) -> tuple[Choice, ...]:
    """Named together, with commas between, or one after the other, the option repeated."""
    return tuple(dict.fromkeys(_choice(option, text, choices) for text in _split(texts)))


def _split(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _words(option: str, value: str | tuple[str, ...] | bool | None) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, tuple):
        return [option, ",".join(_split(value))]
    return [] if value is None else [option, value]


def _brief(text: str) -> str:
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return shown if shown.isascii() and shown.isprintable() and shown.strip() else ascii(shown)

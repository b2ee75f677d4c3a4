"""The machines and models that are known by name, from data/*.toml, and a user's own GPU file.

Names are forgiving in spelling and strict in meaning: ``A100_40GB`` and ``facebook/OPT-6.7B`` are found, while ``h100``
is not guessed at. Nothing is read before it is asked for.
"""

import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sim.checks import require_one_of
from sim.model_config import model_from_config, one_line, read_text_file, user_path
from sim.spec import GpuSpec, HostSpec, LinkSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a model's makers state, to hold ModelSpec's own arithmetic against."""

    parameters: int
    kv_bytes_per_token_fp16: int
    source: str


def gpu(name: str) -> GpuSpec:
    """The GPU that ``name`` means; ValueError with the candidates where it means none or several."""
    return _gpus()[_resolve("gpu", name)]


def host(name: str = "default") -> HostSpec:
    """The host that ``name`` means; the default one has 16 cores and 128 GiB."""
    return _hosts()[_resolve("host", name)]


def model(name: str) -> ModelSpec:
    """The catalogue's model of that name; for a config.json of your own see ``sim.model_config.load_model_config``."""
    return _models()[_resolve("model", name)]


def published(name: str) -> Published:
    """The published figures of the model that ``name`` means."""
    entry = _entries("model")[_resolve("model", name)]
    return Published(
        parameters=entry["published_parameters"],
        kv_bytes_per_token_fp16=entry["published_kv_bytes_per_token_fp16"],
        source=entry["source"],
    )


def gpus() -> tuple[GpuSpec, ...]:
    """All GPUs, in the order of the file."""
    return tuple(_gpus().values())


def hosts() -> tuple[HostSpec, ...]:
    """All hosts, the default one first."""
    return tuple(_hosts().values())


def models() -> tuple[ModelSpec, ...]:
    """All models, family by family and small to large."""
    return tuple(_models().values())


def gpu_names() -> tuple[str, ...]:
    """Names of ``gpus()``, without building them."""
    return tuple(_entries("gpu"))


def host_names() -> tuple[str, ...]:
    """Names of ``hosts()``, without building them."""
    return tuple(_entries("host"))


def model_names() -> tuple[str, ...]:
    """Names of ``models()``, without building them."""
    return tuple(_entries("model"))


def load_gpu(path: str | Path) -> GpuSpec:
    """A GPU from a user's TOML file with the catalogue's keys, at the top level or under ``[gpu]``.

    ``name`` may be left out (the file's name stands in), and so may ``source`` (the file's path). A card of the catalogue must
    be as it is there: its measured profile would stand for another.
    """
    file = user_path(path)
    remedy = "give a TOML file with the keys of a GPU"
    text = read_text_file(file, what="gpu", remedy=remedy)
    try:
        top = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"gpu={str(file)!r}, not TOML ({one_line(error)}): {remedy}") from None
    nested = set(top) == {"gpu"} and isinstance(top["gpu"], dict)
    entry = {"name": file.stem, "source": str(file)} | (top["gpu"] if nested else top)
    spec = _gpu_spec(entry, where=str(file))
    known = _gpus().get(spec.name)
    if known is not None and replace(known, source=spec.source) != spec:
        raise ValueError(
            f"{file}: name={spec.name!r}, is a card of the catalogue with other figures: give it a name of its own"
        )
    return spec


def spelling_key(name: str) -> str:
    """What is left of ``name`` when spelling is taken away.

    An organisation (``facebook/``), makers' names, case and separators go, except a separator between two digits: with
    it gone, ``llama-3-3b`` would be LLaMA 33B.
    """
    key = re.sub(r"^[a-z0-9][\w.-]*/(?=[^/]+$)", "", name.strip().lower())
    key = re.sub(r"[\s_-]+", "-", key).strip("-")
    key = re.sub(r"^((meta|nvidia|amd|geforce|tesla|instinct)-)+", "", key)
    key = re.sub(r"(?<=\d)-?gi?b(?=-|$)", "g", key)
    return re.sub(r"(?<!\d)-|-(?!\d)", "", key)


def _resolve(kind: str, name: str) -> str:
    """The catalogue's own name for ``name``; a missing last ``g`` or ``b`` (gigabytes, billions) is forgiven."""
    if not isinstance(name, str):
        raise ValueError(f"{kind}={reprlib.repr(name)}, must be a name: `planner {kind}s` lists them")
    spellings, wanted = _spellings(kind), spelling_key(name)
    for key in (wanted, f"{wanted}g", f"{wanted}b"):
        if key in spellings:
            return spellings[key]
    raise ValueError(f"{kind}={reprlib.repr(name)}, {_hint(kind, wanted)}")


def _hint(kind: str, wanted: str) -> str:
    """Why a name was not found, and what to say instead."""
    spellings = _spellings(kind)
    variants = _unique(name for key, name in spellings.items() if _is_variant(key, wanted))
    if len(variants) > 1:
        return f"could be any of {', '.join(variants)}: give one in full"
    close = difflib.get_close_matches(wanted, spellings, n=6, cutoff=0.6)
    near = _unique([*variants, *(spellings[key] for key in close)])[:4]
    found = f"; near it: {', '.join(near)}" if near else ""
    return f"not in the catalogue{found}; `planner {kind}s` lists all {len(_entries(kind))}"


def _is_variant(key: str, wanted: str) -> bool:
    """Whether ``key`` says more than ``wanted``: it begins so, and no number is cut in two (``a1`` is no ``a10``)."""
    rest = key.removeprefix(wanted)
    return bool(wanted) and key.startswith(wanted) and not (wanted[-1].isdigit() and rest[:1].isdigit())


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


@cache
def _spellings(kind: str) -> Mapping[str, str]:
    """Every accepted spelling key, and the name that it stands for."""
    return {
        spelling_key(spelling): name
        for name, entry in _entries(kind).items()
        for spelling in (name, *entry.get("aliases", ()))
    }


@cache
def _entries(kind: str) -> Mapping[str, Mapping[str, Any]]:
    text = (files("sim") / "data" / f"{kind}s.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _gpus() -> Mapping[str, GpuSpec]:
    return {name: _gpu_spec(_named(name, entry), where=f"gpus.toml {name}") for name, entry in _entries("gpu").items()}


@cache
def _hosts() -> Mapping[str, HostSpec]:
    return {name: HostSpec(**_named(name, entry)) for name, entry in _entries("host").items()}


@cache
def _models() -> Mapping[str, ModelSpec]:
    return {
        name: model_from_config(entry["config"], name=name, source=entry["source"])
        for name, entry in _entries("model").items()
    }


def _named(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name} | {key: value for key, value in entry.items() if key != "aliases"}


def _gpu_spec(entry: Mapping[str, Any], *, where: str) -> GpuSpec:
    """A GpuSpec from a TOML table; keys are checked here, numbers by the spec itself."""
    optional = {"fp8_flop_per_s": None, "int8_op_per_s": None}
    _require_keys(entry, [field.name for field in fields(GpuSpec)], optional, where=where)
    _require_type(entry, "name", str, where=where)
    _require_type(entry, "source", str, where=where)
    _require_type(entry, "has_bf16", bool, where=where)
    _require_type(entry, "link", dict, where=where)
    _require_keys(entry["link"], [field.name for field in fields(LinkSpec)], {}, where=f"{where}: link")
    _require_type(entry["link"], "name", str, where=f"{where}: link")
    try:
        values = optional | dict(entry) | {key: _as_whole(entry[key]) for key in ("hbm_bytes", "sm_count")}
        return GpuSpec(**values | {"link": LinkSpec(**entry["link"])})
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


def _require_keys(entry: Mapping[str, Any], known: list[str], optional: Iterable[str], *, where: str) -> None:
    for key in entry:
        require_one_of(f"{where}: key", key, known)
    missing = [key for key in known if key not in entry and key not in optional]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; a catalogue entry has {', '.join(known)}")


def _require_type(entry: Mapping[str, Any], key: str, kind: type, *, where: str) -> None:
    words = {str: "text in quotes", bool: "true or false", dict: 'a table such as { name = "PCIe 4.0 x16", ... }'}
    if not isinstance(entry[key], kind):
        raise ValueError(f"{where}: {key}={reprlib.repr(entry[key])}, must be {words[kind]}")


def _as_whole(value: object) -> object:
    """``24e9`` is a natural way to write a number of bytes; TOML reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""prompts.jsonl to tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """``place`` is the prompt's line in its file, the first one being 0."""

    id: str | int
    place: int
    tokens: tuple[int, ...]


class Text:
    """A checkpoint's tokenizer, or none: then prompts are token ids and completions have no text."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        path = folder / TOKENIZER if folder is not None else None
        self._tokenizer = _load(path) if path is not None and path.is_file() else None

    def encode(self, text: str, where: str) -> tuple[int, ...]:
        """Tokens of ``text``; ValueError where there is no tokenizer."""
        if self._tokenizer is None:
            missing = f"{self.folder} holds no {TOKENIZER}" if self.folder else "random weights have no tokenizer"
            raise ValueError(f'{where}, is text, and {missing}: give "tokens" instead of "prompt"')
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, tokens: tuple[int, ...]) -> str | None:
        """Text of ``tokens``, None where there is no tokenizer."""
        return None if self._tokenizer is None else str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def read_prompts(path: Path, text: Text) -> list[Prompt]:
    """Every line of ``path``.

    Raises ValueError, naming the line, for what is no prompt, and for an id that occurs twice.
    """
    prompts: dict[str | int, Prompt] = {}
    for place, line in enumerate(_lines(path)):
        where = f"{path} line {place + 1}"
        prompt = _prompt(_object(line, where), place, where, text)
        if prompt.id in prompts:
            raise ValueError(f"{where}, id={prompt.id!r} occurs twice: ids must differ")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path}, holds no prompts: give one JSON object a line")
    return list(prompts.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}, does not exist: give a file with one JSON object a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}, is not UTF-8 text: give a file with one JSON object a line") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(
            f'{where}, is no JSON object: write {{"id": …, "prompt": "text"}} or {{"id": …, "tokens": […]}}'
        )
    return data


def _prompt(data: dict[str, Any], place: int, where: str, text: Text) -> Prompt:
    unknown = sorted(set(data) - {"id", "prompt", "tokens"})
    if unknown:
        raise ValueError(f"{where}, unknown key {unknown[0]}, must be id, prompt or tokens")
    name, tokens, words = data.get("id"), data.get("tokens"), data.get("prompt")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError(f"{where}, id={name!r}, must be text or a whole number")
    if (tokens is None) == (words is None):
        raise ValueError(f"{where}, must have either prompt or tokens")
    if tokens is None:
        if not isinstance(words, str):
            raise ValueError(f"{where}, prompt={words!r}, must be text")
        return Prompt(id=name, place=place, tokens=text.encode(words, where))
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"{where}, tokens, must be an array of whole numbers")
    return Prompt(id=name, place=place, tokens=tuple(tokens))


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}, is no tokenizer ({' '.join(str(error).split())}): copy it again") from None

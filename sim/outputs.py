"""Files that are about to be written: refused before any work where they cannot be, or where something else is lost."""

import os
from collections.abc import Iterable
from pathlib import Path


def require_place(file: Path) -> None:
    """Raises ValueError for a folder, a device, which no file should replace, and where the file's folder is missing or none."""
    if file.is_dir():
        raise ValueError(f"{file}, is a folder: name a file in it")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}, is not a regular file: name a new one, or redirect what --json prints")
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"{file}, cannot be written, {file.parent} is no folder: name another")
    if not file.parent.is_dir():
        raise ValueError(f"{file}, its folder {file.parent} does not exist: create it first")


def require_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | str | None] = ()) -> None:
    """Whether a command can write ``outputs``, None for those that were not asked for, and loses none of ``inputs`` by it.

    Inputs that are no files, such as names, are passed over. Raises ValueError in one line.
    """
    read = {os.path.realpath(one) for one in inputs if one and Path(one).is_file()}
    written = set[str]()
    for file in outputs:
        if file is None:
            continue
        require_place(file)
        place = os.path.realpath(file)
        if place in read:
            raise ValueError(f"{file}, is read by this command and would be lost: write to another file")
        if place in written:
            raise ValueError(f"{file}, is to hold two answers: give each a file of its own")
        written.add(place)

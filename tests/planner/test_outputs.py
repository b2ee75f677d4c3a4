"""No command writes over what it reads, one answer over another, or begins work whose answer has no place."""

import subprocess
import sys
from pathlib import Path

import pytest

from commandline import run
from sim.outputs import require_outputs

READ = "is read by this command and would be lost: write to another file"
TWICE = "is to hold two answers: give each a file of its own"
MISSING = "its folder no does not exist: create it first"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.toml"):
        (tmp_path / name).write_text(f"what {name} held")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("solve --gpu b.toml -o b.toml", f"b.toml, {READ}"),
        ("solve --profile a.json -o a.json", f"a.json, {READ}"),
        ("solve -o no/a.json", f"no/a.json, {MISSING}"),
        ("simulate a.json --trace a.json", f"a.json, {READ}"),
        ("simulate a.json --trace c.json --save-trace ./c.json", f"c.json, {TWICE}"),
        ("report a.json -o a.json", f"a.json, {READ}"),
        ("report b.toml a.json -o a.json", f"a.json, {READ}"),
        ("whatif --batch 1,2 --csv c.csv --html c.csv", f"c.csv, {TWICE}"),
        ("whatif --gpu l4,b.toml --csv b.toml", f"b.toml, {READ}"),
        (
            "run a.json --random-weights --trace /dev/null",
            "/dev/null, is not a regular file: name a new one, or redirect what --json prints",
        ),
        ("whatif --csv a.json/c.csv", "a.json/c.csv, cannot be written, a.json is no folder: name another"),
        ("run a.json --random-weights --save-trace a.json", f"a.json, {READ}"),
        ("run b.toml --prompts a.json -o a.json", f"a.json, {READ}"),
        ("run a.json --random-weights --trace no/t.json", f"no/t.json, {MISSING}"),
        ("calibrate --from a.json -o a.json", f"a.json, {READ}"),
        ("calibrate --device cpu --quick -o no/c.json", f"no/c.json, {MISSING}"),
        ("validate a.json --prepare a.json", f"a.json, {READ}"),
    ],
)
def test_what_would_be_lost_is_refused_before_any_work(words: str, message: str) -> None:
    said = run(*words.split())

    assert (said.code, said.error) == (2, message)
    assert [Path(name).read_text() for name in ("a.json", "b.toml")] == ["what a.json held", "what b.toml held"]
    assert sorted(file.name for file in Path().iterdir()) == ["a.json", "b.toml"]


def test_a_link_to_what_is_read_is_it_and_a_name_of_the_catalogue_is_no_file() -> None:
    Path("link.json").symlink_to("a.json")
    with pytest.raises(ValueError, match=READ):
        require_outputs([Path("link.json")], ["a.json"])

    require_outputs([Path("l4"), None, Path("c.json")], ["l4", None, ""])


def test_a_program_without_a_standard_output_still_writes_its_answer() -> None:
    command = f"{sys.executable} -m planner solve --model opt-125m --batch 2 --prompt 8 --output 6 -o c.json >&-"
    ended = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path("c.json").read_text().startswith("{")

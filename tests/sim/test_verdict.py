"""A verdict as a document."""

import json
from pathlib import Path

import pytest

from sim.verdict import load_verdict, verdict_to_json
from studies import make_verdict


def test_a_verdict_is_read_as_it_was_printed(tmp_path: Path) -> None:
    file, verdict = tmp_path / "verdict.json", make_verdict()
    file.write_text(json.dumps(verdict_to_json(verdict, 1.02)))

    assert load_verdict(file) == verdict
    assert json.loads(file.read_text())["summary"] == verdict.summary
    assert "3 of 10 plans have not been run" in verdict.summary


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": None}, "schema_version=None, must be 1: give what `planner validate --json` prints"),
        ({"plans": []}, "no plan has been judged: run the campaign first"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_another_document_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(verdict_to_json(make_verdict(), None) | changes))

    with pytest.raises(ValueError, match=said) as caught:
        load_verdict(file)
    assert "\n" not in str(caught.value)

"""A verdict as a document."""

import json
from dataclasses import replace
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


def test_a_verdict_mentions_the_hosts_pace_where_it_is_known_of_every_run(tmp_path: Path) -> None:
    file, plans = tmp_path / "verdict.json", make_verdict().plans
    paced = [
        replace(one, paced=error) for one, error in zip(plans, (0.02, -0.03, 0.04, -0.01, 0.12, 0.05), strict=True)
    ]
    whole = make_verdict(plans=tuple(paced))
    partly = replace(whole, plans=(*paced[:-1], replace(paced[-1], paced=None)))

    assert "; at the host's pace of each run 3.5%, worst 12.0%; 3 of 10 plans" in whole.summary
    assert "pace" not in partly.summary
    assert "pace" not in make_verdict().summary
    file.write_text(json.dumps(verdict_to_json(partly, None)))
    assert load_verdict(file) == partly

"""Runs saved and read back: exactly, and nothing that is no run."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from builders import in_hbm, make_cost, make_setting, newest_in_hbm
from sim.cost import CostModel
from sim.engine import simulate
from sim.files import load_trace, save_trace
from sim.plan import Plan
from strategies import priced_plans


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(priced_plans())
def test_what_is_saved_is_read_back(tmp_path: Path, priced: tuple[Plan, CostModel]) -> None:
    trace = simulate(*priced, ops=True)
    save_trace(tmp_path / "trace.json", trace)

    assert load_trace(tmp_path / "trace.json") == trace


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "trace.json"
    save_trace(file, simulate(newest_in_hbm(make_setting(), slots=1), make_cost()))
    return file


def test_spans_are_columns(saved: Path) -> None:
    spans = json.loads(saved.read_text())["waves"][0]["spans"]

    assert list(spans) == ["resource", "name", "step", "layer", "start_s", "end_s", "size_bytes"]
    assert len(set(map(len, spans.values()))) == 1
    assert set(spans["resource"]) == {"gpu", "h2d", "d2h"}
    assert None in spans["layer"]


def test_a_run_without_spans_is_one_too(tmp_path: Path) -> None:
    from dataclasses import replace

    trace = simulate(in_hbm(make_setting()), make_cost())
    bare = replace(trace, waves=(replace(trace.waves[0], spans=(), levels=()),))
    save_trace(tmp_path / "bare.json", bare)

    assert load_trace(tmp_path / "bare.json") == bare


def put(data: Any, path: str, value: Any) -> None:
    *names, last = [int(name) if name.isdecimal() else name for name in path.split(".")]
    for name in names:
        data = data[name]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "no trace of schema version 1"),
        ("waves", [], "waves, must have at least one"),
        ("waves.0.step_end_s", [0.0], "step_end_s, must ascend from above 0"),
        ("waves.0.step_end_s", [2.0, 1.0], "step_end_s, must ascend from above 0"),
        ("waves.0.spans.end_s", "no", "spans.end_s='no', must be an array"),
        ("waves.0.spans.layer", [[]], "spans.layer, must be an array of plain values"),
        ("waves.0.spans.step", [1], "spans, columns of"),
        ("waves.0.spans.resource.0", "tape", "spans.resource='tape', must be one of gpu, h2d, d2h, cpu"),
        ("waves.0.spans.start_s.0", 1e9, "spans, one ends before it starts"),
        ("waves.0.spans.start_s.0", "0", "spans.start_s='0', must be a float"),
        ("waves.0.spans.colour", [], "spans, columns resource"),
        ("waves.0.served.0.last_step", 99, "served, names a step that there is not"),
        ("output_tokens", "4", "output_tokens='4', must be a int"),
    ],
)
def test_what_is_no_run_is_refused(saved: Path, path: str, value: Any, message: str) -> None:
    data = json.loads(saved.read_text())
    put(data, path, value)
    saved.write_text(json.dumps(data))

    with pytest.raises(ValueError, match=message) as refusal:
        load_trace(saved)
    assert str(refusal.value).startswith(str(saved))

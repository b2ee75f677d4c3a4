"""Plans as JSON: exact there and back, one line for whatever does not fit, and files that are whole or absent."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import in_hbm, make_cost, make_setting, newest_in_hbm, refuses
from sim.attention import Attention, Selector
from sim.codec import from_plain, to_plain
from sim.engine import simulate
from sim.files import SCHEMA_VERSION, load_plan, plan_from_json, plan_to_json, read_json_object, write_atomically
from sim.kv import KvFormat, KvFormats
from sim.outcome import Outcome
from sim.plan import Plan
from sim.profile import MeasuredProduct, Profile
from sim.spec import DType
from strategies import continuous_plans, plans

PLAN = newest_in_hbm(make_setting(Selector.PAGES, sparsity=0.5, guess_hits=0.5), slots=3)


@settings(max_examples=200, deadline=None)
@given(st.one_of(plans(), continuous_plans()))
def test_a_plan_comes_back_from_its_text_as_it_was(plan: Plan) -> None:
    text = json.dumps(plan_to_json(plan), allow_nan=False)

    assert plan_from_json(json.loads(text), "plan.json") == plan


def test_other_nouns_come_back_too() -> None:
    outcome = simulate(PLAN, make_cost()).outcome
    product = MeasuredProduct(inputs=16, outputs=48, dtype=DType.FP16, rows=(1, 64), seconds=(0.1 + 0.2, 1.0))
    profile = Profile(name="mine", basis="test", copy_setup_s=0.1 + 0.2, products=(product,))

    for noun in (outcome, profile, PLAN.homes, simulate(in_hbm(make_setting(output=1)), make_cost()).outcome):
        assert from_plain(type(noun), json.loads(json.dumps(to_plain(noun))), "noun") == noun


def test_a_plan_on_disk_comes_back_as_it_was(tmp_path: Path) -> None:
    write_atomically(tmp_path / "plan.json", json.dumps(plan_to_json(PLAN)))

    assert load_plan(tmp_path / "plan.json") == PLAN


def test_the_keys_that_other_programs_rely_on() -> None:
    data = plan_to_json(PLAN)

    assert data["schema_version"] == SCHEMA_VERSION == 1
    assert (data["machine"]["name"], data["model"]["name"], data["dtype"]) == ("card", "tiny", "fp16")
    assert data["workload"] == {"batch": 1, "prompt_tokens": 4, "output_tokens": 4}
    assert data["attention"] == {"selector": "pages", "sparsity": 0.5, "local_fraction": 0.5}
    assert data["kv_format"] == {"gpu": "native", "host": "native"}
    assert (data["concurrency"], data["placement"]) == (1, "recent")
    assert data["phases"] == [{"name": "gpu_cpu", "first_step": 0}]


def test_keys_that_an_answer_adds_are_passed_over() -> None:
    assert plan_from_json(plan_to_json(PLAN) | {"predicted": {"makespan_s": 1.0}}, "plan.json") == PLAN


def test_options_with_defaults_may_be_left_out() -> None:
    data = plan_to_json(in_hbm(make_setting()))
    for name in ("weight_format", "weights_on_host", "placement", "write_back", "guess_hits", "drop_dead"):
        del data[name]

    assert plan_from_json(data, "plan.json") == in_hbm(make_setting())


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``PLAN`` as JSON with one value replaced."""
    data: dict[str, Any] = json.loads(json.dumps(plan_to_json(PLAN)))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, "p: schema_version=2, must be 1: solve again with this version"),
        (("schema_version",), None, "p: schema_version=None, must be 1: solve again with this version"),
        (("concurrency",), "1", "p.concurrency='1', must be a int"),
        (("concurrency",), True, "p.concurrency=True, must be a int"),
        (("concurrency",), None, "p.concurrency=None, must be a int"),
        (("drop_dead",), 1, "p.drop_dead=1, must be a bool"),
        (("guess_hits",), float("inf"), "p.guess_hits=inf, must be finite"),
        (("placement",), "near", "p.placement='near', must be one of recent, resident"),
        (("placement",), ["recent"], "p.placement=['recent'], must be one of recent, resident"),
        (("workload",), [1, 4, 4], "p.workload=[1, 4, 4], must be an object"),
        (
            ("workload", "prompt"),
            4,
            "p.workload.prompt, unknown key, must be one of batch, prompt_tokens, output_tokens",
        ),
        (("workload", "batch"), 0, "batch=0, must be a whole number of at least 1"),
        (("homes", "hbm"), 4, "p.homes.hbm=4, must be an array"),
        (("homes", "hbm"), [3, 3, 3, 3.5], "p.homes.hbm[3]=3.5, must be a int"),
        (("homes", "hbm"), [3, 3, 3], "homes, columns of [3, 4] rows, must all have one row a step"),
        (("access", "age_shares"), [[0, 0, 0]], "p.access.age_shares[0], 3 entries, must have 2"),
        (("model", "name"), "x" * 99, None),
        (("model", "layers"), "x" * 99, f"p.model.layers='{'x' * 36}..., must be a int"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(
    path: tuple[str, ...], value: Any, message: str | None
) -> None:
    if message is None:
        assert plan_from_json(changed(path, value), "p").setting.model.name == value
        return
    with refuses(message):
        plan_from_json(changed(path, value), "p")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("homes",), "p: homes, missing key"),
        (("schema_version",), "p: schema_version=None, must be 1: solve again with this version"),
        (("concurrency",), "p.concurrency, missing key"),
        (("machine", "gpu", "link"), "p.machine.gpu.link, missing key"),
        (("homes", "copies"), "p.homes.copies, missing key"),
    ],
)
def test_a_missing_key_is_named(path: tuple[str, ...], message: str) -> None:
    data = changed(path, None)
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]

    with refuses(message):
        plan_from_json(data, "p")


def test_a_row_that_breaks_the_plan_is_refused_by_the_plan() -> None:
    with refuses("homes at step 1, 4 tokens, must hold all 5 cached ones"):
        plan_from_json(changed(("homes", "hbm"), [3, 2, 3, 3]), "p")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not complete JSON (line 1: Expecting value): write it anew"),
        (
            b'{"schema_version": 1, "homes": {"hbm": [1,',
            "is not complete JSON (line 1: Expecting value): write it anew",
        ),
        (b'{"a": NaN}', "is not complete JSON (line 1: NaN is not a number): write it anew"),
        (b'{"a": -Infinity}', "is not complete JSON (line 1: -Infinity is not a number): write it anew"),
        (b"\x89PNG\xff\xfe\x00", "is not JSON text"),
        (b"[" * 100_000, "is not JSON text"),
        (b"[1, 2]", "holds a list, must be a JSON object"),
        (b"null", "holds a NoneType, must be a JSON object"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)

    with refuses(f"{path}, {message}"):
        load_plan(path)


def test_a_truncated_plan_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "plan.json", json.dumps(plan_to_json(PLAN))
    for length in range(0, len(text) - 1, 97):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match=r"is not complete JSON \(line 1: .*\): write it anew$"):
            load_plan(path)


def test_another_programs_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "package.json"
    path.write_text('{"name": "left-pad", "version": "1.3.0"}')

    with refuses(f"{path}: schema_version=None, must be 1: solve again with this version"):
        load_plan(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with refuses(f"{tmp_path / 'none.json'}, does not exist: give the path of a JSON file"):
        read_json_object(tmp_path / "none.json")
    with refuses(f"{tmp_path}, is a folder: name a JSON file in it"):
        read_json_object(tmp_path)


def test_writing_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    write_atomically(path, "new ✓")

    assert path.read_text(encoding="utf-8") == "new ✓"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full_disk(_source: str, _target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)

    with refuses(f"{path}, cannot be written (No space left on device): choose another place"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with refuses(f"{tmp_path}, is a folder: name a file in it"):
        write_atomically(tmp_path, "text")
    missing = tmp_path / "no" / "plan.json"
    with refuses(f"{missing}, its folder {missing.parent} does not exist: create it first"):
        write_atomically(missing, "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "plan.json", "text")


def test_what_a_link_leads_to_is_written_anew_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "plan.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)

    write_atomically(link, "new")

    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["plan.json"]


def test_plain_values_are_built_into_nouns_with_defaults() -> None:
    assert from_plain(KvFormats, {"gpu": "int8"}, "kv") == KvFormats(gpu=KvFormat.INT8)
    assert from_plain(Attention, {"selector": "swa", "sparsity": 0}, "a").sparsity == 0.0
    with refuses("outcome=[1, 2, 3], must be an object"):
        from_plain(Outcome, [1, 2, 3], "outcome")

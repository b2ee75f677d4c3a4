"""Who may import whom. Read off the source, so that an import inside a function counts too."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "sim": set(),
    "planner": {"sim"},
    "runtime": {"sim"},
    "reports": {"sim"},
    "calibration": {"sim", "runtime"},
}
FOLDERS = [name for name in MAY_IMPORT if (ROOT / name / "__init__.py").exists()]
SIM_MODULES = sorted(path.stem for path in (ROOT / "sim").glob("*.py") if path.stem != "__init__")
EVENT_LOOP = {"engine", "machine"}
NOUNS = {  # the ground floor: the standard library and each other
    *(
        "access",
        "attention",
        "capture",
        "catalogue",
        "checks",
        "codec",
        "files",
        "footprint",
        "homes",
        "kv",
        "model_config",
    ),
    *("outcome", "outputs", "plan", "profile", "profile_files", "spec", "trace", "units", "workload"),
}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from sim import access`` gives ``sim.access``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            inside = node.module in MAY_IMPORT
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def roots_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def sim_modules_in(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("sim.")}


def test_the_house_stands() -> None:
    assert {"sim", "planner"} <= set(FOLDERS)
    assert set(SIM_MODULES) >= NOUNS | EVENT_LOOP


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_they_stand_on(folder: str) -> None:
    others = set(MAY_IMPORT) - MAY_IMPORT[folder] - {folder} | {"tests", "benchmarks", "builders", "strategies"}

    wrong = {str(path.relative_to(ROOT)): roots_of(imports_of(path)) & others for path in files_of(folder)}

    assert {path: names for path, names in wrong.items() if names} == {}


def test_only_the_engine_knows_the_event_loop() -> None:
    using = {path.stem for path in files_of("sim") if "simpy" in roots_of(imports_of(path))}

    assert using == EVENT_LOOP


def test_within_sim_only_the_engine_knows_the_machine() -> None:
    using = {path.stem for path in files_of("sim") if sim_modules_in(imports_of(path)) & EVENT_LOOP}

    assert using <= EVENT_LOOP


def test_elsewhere_simpy_is_not_imported() -> None:
    using = [
        path for name in FOLDERS if name != "sim" for path in files_of(name) if "simpy" in roots_of(imports_of(path))
    ]

    assert using == []


@pytest.mark.parametrize("name", sorted(NOUNS))
def test_nouns_need_the_standard_library_and_each_other_alone(name: str) -> None:
    names = imports_of(ROOT / "sim" / f"{name}.py")

    assert roots_of(names) - sys.stdlib_module_names - {"sim"} == set()
    assert sim_modules_in(names) <= NOUNS | {"data"}


def test_sim_needs_numpy_and_simpy_at_most() -> None:
    names = set().union(*(roots_of(imports_of(path)) for path in files_of("sim")))

    assert names - sys.stdlib_module_names == {"sim", "numpy", "simpy"}


def test_sim_has_no_import_cycle() -> None:
    graph = {name: sim_modules_in(imports_of(ROOT / "sim" / f"{name}.py")) - {"data"} for name in SIM_MODULES}

    assert len(list(TopologicalSorter(graph).static_order())) == len(SIM_MODULES)


@pytest.mark.skipif("runtime" not in FOLDERS, reason="no runtime yet")
def test_the_runtime_needs_no_event_loop() -> None:
    assert [path for path in files_of("runtime") if sim_modules_in(imports_of(path)) & EVENT_LOOP] == []

"""One browser for all tests of a process, and the pages that they open."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import chromium
from reports import Run, plan_page, sweep_page
from studies import (
    as_if_measured,
    continuous,
    large,
    make_rivals,
    make_study,
    make_sweep,
    measured_study,
    three_phases,
)

PAGES: dict[str, Callable[[], str]] = {
    "plan": lambda: plan_page(make_study(three_phases())),
    "everything": lambda: everything(),
    "continuous": lambda: plan_page(make_study(continuous())),
    "evidence": lambda: plan_page(measured_study(three_phases())),
    "large": lambda: plan_page(make_study(large())),
    "sweep": lambda: sweep_page(make_sweep()),
}


def everything() -> str:
    study = make_study(three_phases(), rivals=make_rivals())
    runs = tuple(Run(name=f"bench {n}", trace=as_if_measured(study.simulated.trace, n)) for n in (1, 2))
    return plan_page(replace(study, measured=runs))


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.chromium() is None:
        pytest.skip("no chromium with chromedriver on PATH: apt-get install chromium chromium-driver")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pages")

    def made(name: str) -> Path:
        file = folder / f"{name}.html"
        if not file.exists():
            file.write_text(PAGES[name](), encoding="utf-8")
        return file

    return made

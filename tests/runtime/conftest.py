"""Without torch and transformers nothing here is collected."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runtime.where import Where

if find_spec("torch") is None or find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def where() -> "Where":
    from tests.runtime.where import from_environment

    return from_environment()

"""The solvers behind PuLP."""

import subprocess
import sys

import pytest

from commandline import ROOT

IMPORTER = """
import gc
import weakref

class Model:
    pass

def solve():
    model = Model()
    {beforehand}
    import planner.solvers
    return weakref.ref(model)

found = solve()
gc.collect()
print(found() is None)
"""
LACKING = """
    import pulp
    class Lacking:
        try:
            try:
                raise OSError
            except OSError:
                raise ImportError
        except ImportError as error:
            err = error
    pulp.Lacking = Lacking
"""


@pytest.mark.parametrize("beforehand", ["", LACKING], ids=["as it is", "an error behind an error"])
def test_solvers_that_are_missing_keep_nothing_of_who_imported_them(beforehand: str) -> None:
    """PuLP keeps their errors, whose frames would keep the importer's, and its model with it."""
    code = IMPORTER.format(beforehand=beforehand)
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "True"

"""Without torch and scipy nothing here is collected."""

from importlib.util import find_spec

if find_spec("torch") is None or find_spec("scipy") is None:
    collect_ignore_glob = ["test_*.py"]

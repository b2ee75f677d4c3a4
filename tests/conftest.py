"""Where there is no GPU, Triton's kernels are interpreted: said before anything imports Triton."""

import os

if os.environ.get("KVPLAN_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

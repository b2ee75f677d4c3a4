"""What interpretation cannot see: that a compiler for GPUs takes the kernels, those of chained launches too."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

KERNELS = {"add_norm", "attend", "choose", "digest", "exchange", "fetch", "gate", "merge", "place", "product", "score"}
KERNELS |= {
    "settle",
    "bear",
    "carry",
    "mask",
    "weigh",
    "choose_first",
    "choose_newest",
    "remember",
    "keep",
    "name",
    "gather",
    "round_prompt",
    "widen",
}


@pytest.mark.skipif(find_spec("triton") is None, reason="compiles Triton's kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles what it runs")
def test_every_kernel_compiles_for_a_hopper_gpu() -> None:
    """In a process of its own: where kernels are interpreted they are not compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runtime.compiled"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split(":")[0].split(".")[-1] for line in done.stdout.splitlines()}
    assert compiled >= KERNELS

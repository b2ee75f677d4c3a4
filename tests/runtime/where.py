"""Where the tests run: ``KVPLAN_DEVICE=cuda`` takes a GPU, ``KVPLAN_DTYPE=fp16|bf16`` 16 bit."""

import os
from dataclasses import dataclass

import torch
from hypothesis import Phase, settings

from runtime.execute import DTYPES
from sim.spec import DType

# Examples are seeds: shrinking them would lead nowhere.
DRAWN = settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Device and compute type under test, and how far logits of the same computation in another order may differ."""

    device: torch.device
    dtype: torch.dtype

    @property
    def logit_tolerance(self) -> float:
        """In 16 bit 40 unit roundoffs, 2^-11 and 2^-8, of numbers about 1, as logits are here (0.9 in the mean square).

        Three layers round a dozen results each, embedding and head a few more. Some texts turn rounding into more than
        others do: of 2,400 (dense, random plans) the farthest were 0.013 and 0.093 off, the median 0.0035 and 0.028.
        """
        return {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[self.dtype]

    @property
    def exact(self) -> bool:
        """Whether greedy tokens must be equal: in 16 bit two near-equal logits may change places."""
        return self.dtype is torch.float32


def on_gpu() -> bool:
    """Whether a GPU is asked for: a machine that has one may run the tests without."""
    return device_asked_for() == "cuda"


def device_asked_for() -> str:
    return os.environ.get("KVPLAN_DEVICE", "cpu")


def dtype_asked_for() -> DType:
    """The compute type of plans and models under test."""
    return DType(os.environ.get("KVPLAN_DTYPE", "fp32"))


def from_environment() -> Where:
    """What the two variables ask for; float32 on the CPU without them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    return Where(device=torch.device(device_asked_for()), dtype=DTYPES[dtype_asked_for()])

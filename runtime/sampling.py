"""The next token from logits: the likeliest, or drawn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim.checks import require_non_negative, require_share, require_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_p`` keeps the likeliest tokens that together reach that probability.

    A prompt's draws depend on ``seed`` and its place in the job alone, not on what runs beside it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_non_negative("temperature", self.temperature)
        require_share("top_p", self.top_p)
        require_whole("seed", self.seed, at_least=0)


class Sampler:
    """Draws for one wave, made ahead: [sequence, step] uniform numbers on the device."""

    def __init__(self, sampling: Sampling, places: Sequence[int], steps: int, device: torch.device) -> None:
        self.sampling = sampling
        if sampling.temperature:
            draws = [_uniform(sampling.seed, place, steps) for place in places]
            self.draws = torch.stack(draws).to(device)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """[sequence, vocab] to [sequence]."""
        if not self.sampling.temperature:
            return logits.max(-1).indices  # of equals the first, as argmax, and on the CPU in a third of its time
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)  # of equals the first, as max has it
        shares = (ordered / self.sampling.temperature).softmax(-1)
        reached = shares.cumsum(-1)
        kept = shares * (reached - shares < self.sampling.top_p)  # the first one always
        kept[:, 0] = shares[:, 0]
        sums = kept.cumsum(-1)
        drawn = self.draws[:, step : step + 1] * sums[:, -1:]
        place = torch.searchsorted(sums, drawn, right=True).clamp(max=logits.shape[-1] - 1)
        return tokens.gather(-1, place)[:, 0]


def _uniform(seed: int, place: int, steps: int) -> Tensor:
    mixed = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=4).digest()  # the CPU's generator takes 32 bits
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
    return torch.rand(steps, generator=generator, dtype=torch.float32)

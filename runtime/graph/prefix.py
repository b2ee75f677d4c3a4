"""The oldest tokens of a wave's prompts, which have no home: through every layer anew, within a step.

A lane's rows begin with its first token that is no padding. Causal attention then needs no mask: what a short prompt lacks
lies at the end, where no other token sees it, and whoever attends to the prefix leaves it out.
"""

import torch
from torch import Tensor

from runtime.graph.fused import FusedDecoder
from runtime.models import Decoder
from runtime.prefill import prompt_layer
from sim.footprint import prefill_rows
from sim.plan import Plan


class Prefix:
    """Of as many lanes as there are in ``padding`` [lane]. All operations may be captured; numbers of tokens are Python's."""

    def __init__(self, plan: Plan, decoder: Decoder, padding: Tensor) -> None:
        self.decoder, self.padding = FusedDecoder(decoder), padding
        lanes, prompt = padding.shape[0], plan.setting.workload.prompt_tokens
        self.most_rows = prefill_rows(lanes, prompt)  # of a pass: the prefill's, which workspace is there for
        self.at = torch.arange(prompt, device=decoder.device)
        self.tokens = torch.zeros((lanes, prompt), dtype=torch.int64, device=decoder.device)
        self.positions: list[Tensor] = []  # of each pass, [lane, token]
        self.x: list[Tensor] = []  # and the coming layer's inputs, [lane, token, hidden]

    def take(self, tokens: Tensor) -> None:
        """The prompts [lane, token], padding first."""
        from_front = (self.at + self.padding[:, None]).clamp(max=self.at.shape[0] - 1)
        self.tokens.copy_(tokens.gather(1, from_front))

    def begin(self, count: int) -> None:
        """Embed the first ``count`` tokens."""
        self.x, self.positions = [], []
        if count:
            lanes, at = self.tokens.shape[0], self.at[None, :count]
            size = max(1, min(self.most_rows, prefill_rows(lanes, count)) // count)
            self.x = [self.decoder.embed(part, at) for part in torch.split(self.tokens[:, :count], size)]
            self.positions = [at.repeat(part.shape[0], 1) for part in self.x]

    def forward(self, layer: int, out: Tensor) -> None:
        """Keys and values of ``layer`` to ``out`` [token, lane, key or value, head, channel]; layers come in order."""
        first = 0
        for number in range(len(self.x)):
            _, k, v, after = prompt_layer(self.decoder, layer, self.x[number], self.positions[number], None)
            self.x[number] = after
            for part, rows in enumerate((k, v)):
                out[: k.shape[1], first : first + k.shape[0], part] = rows.transpose(0, 1)
            first += k.shape[0]

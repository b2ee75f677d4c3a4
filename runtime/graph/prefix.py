"""The oldest tokens of a wave's prompts, which have no home: through every layer anew, beside a step or between its pieces.

A lane's rows begin with its first token that is no padding. Causal attention then needs no mask: what a short prompt lacks
lies at the end, where no other token sees it, and whoever attends to the prefix leaves it out.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from runtime.graph.capturing import captured
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
        self.most_rows = prefill_rows(
            lanes, prompt
        )  # of a pass: no more than the prefill's, which workspace is there for
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


class PrefixGraphs:
    """A ``prefix`` captured layer by layer, for pieces of a step to come between: for each number of tokens and place to put
    their keys and values at, one graph that embeds them and one a layer.
    """

    def __init__(self, prefix: Prefix, layers: int) -> None:
        self.prefix, self.layers = prefix, layers
        self.graphs: dict[tuple[int, int], list[torch.cuda.CUDAGraph]] = {}  # by tokens and the place's address
        self.at_hand: list[torch.cuda.CUDAGraph] = []

    def capture(self, wanted: Sequence[tuple[int, Tensor]]) -> None:
        """Tokens and where they go, the most first: others find room in what those took. On the current stream."""
        pool = torch.cuda.graph_pool_handle()
        for count, out in wanted:
            self.prefix.begin(count)
            self.prefix.forward(0, out)  # so that kernels are compiled and loaded
            graphs = [captured(pool, partial(self.prefix.begin, count))]
            graphs += [captured(pool, partial(self.prefix.forward, layer, out)) for layer in range(self.layers)]
            self.graphs[count, out.data_ptr()] = graphs

    def begin(self, count: int, out: Tensor) -> None:
        """Of a step that forwards ``count`` tokens to ``out``."""
        self.at_hand = self.graphs.get((count, out.data_ptr()), [])
        if self.at_hand:
            self.at_hand[0].replay()
        else:
            self.prefix.begin(count)

    def forward(self, layer: int, out: Tensor) -> None:
        """As ``Prefix.forward``, of the step at hand."""
        if self.at_hand:
            self.at_hand[layer + 1].replay()
        else:
            self.prefix.forward(layer, out)

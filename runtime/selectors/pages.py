"""Page digests with recall (Quest, ArkVale): a page's minimum and maximum keys bound what its tokens can score."""

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.selectors.base import LayerSelector, Scope
from sim.attention import PAGE_TOKENS


class Pages(LayerSelector):
    """Tokens by the bound of their page, as a share of the softmax over pages, heads summed; whole pages, then a part."""

    recalls = True

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.pages = -(-scope.positions // PAGE_TOKENS)
        self.digests: Tensor | None = None  # [lane, page, 2, head, channel]: minimum and maximum

    def start(self, q: Tensor, k: Tensor) -> None:  # noqa: ARG002
        tokens, whole = k.shape[1], self.pages * PAGE_TOKENS
        real = self.scope.real[:, :tokens, None, None]
        ends = [
            fn.pad(k.masked_fill(~real, nothing), (0, 0, 0, 0, 0, whole - tokens), value=nothing)
            for nothing in (torch.inf, -torch.inf)
        ]
        low, high = (end.view(end.shape[0], self.pages, PAGE_TOKENS, *end.shape[2:]) for end in ends)
        self.digests = torch.stack((low.amin(2), high.amax(2)), dim=2)

    def bear(self, row: int, k: Tensor) -> None:
        assert self.digests is not None
        digest = self.digests[:, (self.scope.counts.cached[row] - 1) // PAGE_TOKENS]
        digest[:, 0] = torch.minimum(digest[:, 0], k[:, 0])
        digest[:, 1] = torch.maximum(digest[:, 1], k[:, 0])

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        assert self.digests is not None
        assert q is not None
        empty = self.digests[:, :, 0].isinf().any(-1).any(-1)  # [lane, page]: no token yet, or padding alone
        digests = self.digests.float().masked_fill(empty[:, :, None, None, None], 0.0)
        ends = torch.einsum("lhgc,lpehc->lhgpec", q.float(), digests)  # products with both ends of each channel's range
        bounds = ends.amax(-2).sum(-1) * self.scope.scale
        shares = bounds.masked_fill(empty[:, None, None], -torch.inf).softmax(-1).sum((1, 2))
        return shares.repeat_interleave(PAGE_TOKENS, -1)[:, : self.scope.positions]

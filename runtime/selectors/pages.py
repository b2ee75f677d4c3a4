"""Page digests with recall (Quest, ArkVale): a page's minimum and maximum keys bound what its tokens can score."""

import torch
from torch import Tensor

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
        lanes, _, heads, channels = k.shape
        infinite = torch.full((lanes, self.pages, heads, channels), torch.inf, device=k.device, dtype=k.dtype)
        self.digests = torch.stack((infinite, -infinite), dim=2)
        real = self.scope.real[:, : k.shape[1], None, None]
        for page in range(-(-k.shape[1] // PAGE_TOKENS)):
            tokens = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            self.digests[:, page, 0] = k[:, tokens].where(real[:, tokens], torch.inf).amin(1)
            self.digests[:, page, 1] = k[:, tokens].where(real[:, tokens], -torch.inf).amax(1)

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

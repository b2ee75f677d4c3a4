"""H2O: tokens by what all earlier queries paid them."""

from torch import Tensor

from runtime.selectors.base import LayerSelector, Scope, prompt_weights

_CHUNK = 256  # prompt queries whose weights are held at once


class HeavyHitters(LayerSelector):
    """One running sum a token."""

    needs_weights = True

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.sums = scope.zeros(scope.positions)

    def start(self, q: Tensor, k: Tensor) -> None:
        for first in range(0, k.shape[1], _CHUNK):
            last = min(first + _CHUNK, k.shape[1])
            weights = prompt_weights(q[:, :last], k[:, :last], self.scope.padding, self.scope.scale, first)
            self.sums[:, :last] += weights.sum(1)

    def observe(self, row: int, weights: Tensor) -> None:  # noqa: ARG002
        self.sums += weights[:, :-1]

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        return self.sums

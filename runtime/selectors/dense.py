"""Dense attention: every cached token."""

from torch import Tensor

from runtime.selectors.base import LayerSelector


class Dense(LayerSelector):
    """The newest tokens are all there are."""

    def picks(self, row: int, older: Tensor, count: int, q: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return older

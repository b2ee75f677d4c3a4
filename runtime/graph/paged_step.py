"""The captured step of continuous admission: each lane in a row of its own."""

import torch
from torch import Tensor

from runtime.graph.paged import COUNT, PADDING, SEQUENCE, PagedSlots
from runtime.graph.step import CapturedStep
from runtime.models import Decoder
from sim.plan import Plan


class PagedStep(CapturedStep):
    """Lanes of any age: a lane's last token is read from ``generated`` [sequence, step], where the next one goes too.

    Idle lanes write to a sequence more than there are.
    """

    def __init__(self, decoder: Decoder, slots: PagedSlots, plan: Plan, sequences: int) -> None:
        work = plan.setting.workload
        super().__init__(decoder, slots, slots.state.shape[0])
        self.state, self.prompt_tokens = slots.state, work.prompt_tokens
        self.sequences = sequences
        size = (sequences + 1, work.output_tokens)
        self.generated = torch.zeros(size, dtype=torch.int64, device=decoder.device)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        sequence, place = self._at()
        positions = (self.state[:, COUNT] - 1 - self.state[:, PADDING]).clamp(min=0)
        return self.generated[sequence, (place - 1).clamp(min=0)], positions.long()

    def _emit(self, tokens: Tensor) -> None:
        self.generated.index_put_(self._at(), tokens)

    def _at(self) -> tuple[Tensor, Tensor]:
        """Sequence and place of the tokens to come, [lane]."""
        place = self.state[:, COUNT] - self.prompt_tokens
        return self.state[:, SEQUENCE].long(), place.clamp(min=0).long()

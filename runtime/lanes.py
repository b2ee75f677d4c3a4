"""How sequences become lanes: with heads summed one lane a sequence, per head one lane a sequence and key head."""

from dataclasses import dataclass

from torch import Tensor

from sim.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """A lane holds ``heads`` key heads; ``group`` queries share one of them."""

    sequences: int
    heads: int
    per_sequence: int
    group: int

    @classmethod
    def of(cls, spec: ModelSpec, sequences: int, *, per_head: bool) -> "Lanes":
        per_sequence = spec.kv_heads if per_head else 1
        heads = spec.kv_heads // per_sequence
        return cls(sequences=sequences, heads=heads, per_sequence=per_sequence, group=spec.heads // spec.kv_heads)

    @property
    def count(self) -> int:
        return self.sequences * self.per_sequence

    def keys(self, x: Tensor) -> Tensor:
        """[sequence, token, kv_head, channel] to [lane, token, head, channel]."""
        split = x.view(*x.shape[:2], self.per_sequence, self.heads, x.shape[-1])
        return split.transpose(1, 2).reshape(-1, x.shape[1], self.heads, x.shape[-1])

    def queries(self, q: Tensor) -> Tensor:
        """[sequence, token, query_head, channel] to [lane, token, head, group, channel]."""
        split = q.view(*q.shape[:2], self.per_sequence, self.heads, self.group, q.shape[-1])
        return split.transpose(1, 2).reshape(-1, q.shape[1], self.heads, self.group, q.shape[-1])

    def merge(self, attended: Tensor) -> Tensor:
        """[lane, head, group, channel] to [sequence, 1, query_head, channel]."""
        return attended.reshape(self.sequences, 1, -1, attended.shape[-1])

    def spread(self, x: Tensor) -> Tensor:
        """A value of each sequence, for each of its lanes."""
        return x.repeat_interleave(self.per_sequence, 0)

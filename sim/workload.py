"""What must be generated."""

from dataclasses import dataclass

from sim.checks import require_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``batch`` sequences, each with ``prompt_tokens`` given and ``output_tokens`` to generate.

    Prefill yields the first output token; the other ``output_tokens - 1`` are decode steps.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        require_whole("batch", self.batch)
        require_whole("prompt_tokens", self.prompt_tokens)
        require_whole("output_tokens", self.output_tokens)

    @property
    def decode_steps(self) -> int:
        return self.output_tokens - 1

    @property
    def cached_tokens(self) -> int:
        """Tokens a sequence has cached at its last step: the last one generated is never attended to."""
        return self.prompt_tokens + self.output_tokens - 1

"""Which tokens a decode step attends to, and what follows for the tokens that must be kept."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from math import floor

from sim.checks import require_one_of, require_share
from sim.spec import DType, ModelSpec

PAGE_TOKENS = 16  # tokens summarised by one digest (Quest, ArkVale and shared measurements use 16)


class Selector(StrEnum):
    """The rule that picks a step's tokens; measured accuracy and turnover live in ``sim.access``."""

    DENSE = "dense"
    LOCAL = "local"
    STRIDED = "strided"
    SWA = "swa"
    H2O = "h2o"
    PAGES = "pages"
    TOPK = "topk"

    @property
    def chooses_ahead(self) -> bool:
        """Whether attention weights say what the next step attends to."""
        return self in (Selector.SWA, Selector.H2O)

    @property
    def recalls(self) -> bool:
        """Any token may return, and which is known only after this layer's query projection."""
        return self in (Selector.PAGES, Selector.TOPK)

    @property
    def forgets_at_once(self) -> bool:
        """What is not attended now can never be attended again."""
        return self in (Selector.LOCAL, Selector.STRIDED, Selector.H2O)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """``sparsity`` is the share of cached tokens left out; ``local_fraction`` the share of the kept ones that are newest."""

    selector: Selector
    sparsity: float = 0.0
    local_fraction: float = 0.5

    def __post_init__(self) -> None:
        require_one_of("attention.selector", self.selector, Selector)
        require_share("attention.sparsity", self.sparsity, below_one=True)
        require_share("attention.local_fraction", self.local_fraction)
        if self.selector is Selector.DENSE and self.sparsity:
            raise ValueError(
                f"attention.sparsity={self.sparsity}, dense attention leaves nothing out: use 0 or a sparse selector"
            )

    @property
    def is_dense(self) -> bool:
        return self.selector is Selector.DENSE

    def local_tokens(self, cached_tokens: int) -> int:
        """Newest tokens kept out of ``cached_tokens`` (at least the one being processed)."""
        if self.is_dense:
            return cached_tokens
        share = 1.0 if self.selector is Selector.LOCAL else self.local_fraction
        return min(cached_tokens, max(1, _round_half_up(cached_tokens * (1 - self.sparsity) * share)))

    def global_tokens(self, cached_tokens: int) -> int:
        """Selected older tokens (ALISA Algorithm 1: k = round(n r / 2) each for local and global)."""
        if self.is_dense or self.selector is Selector.LOCAL:
            return 0
        wanted = _round_half_up(cached_tokens * (1 - self.sparsity) * (1 - self.local_fraction))
        return min(wanted, cached_tokens - self.local_tokens(cached_tokens))

    def history_steps(self, cached_tokens: int) -> int:
        """Steps that a token may stay unattended and still return: k recent queries under SWA, else 0 or unbounded."""
        return self.local_tokens(cached_tokens) if self.selector is Selector.SWA else 0

    def kept_tokens(self, cached_tokens: int) -> int:
        """Tokens that a step attends to."""
        return self.local_tokens(cached_tokens) + self.global_tokens(cached_tokens)

    def living_tokens(self, cached_tokens: int) -> int:
        """Tokens that a later step may still attend to; under SWA about 3k (selected ones and k steps of leavers)."""
        kept = self.kept_tokens(cached_tokens)
        if self.selector.forgets_at_once:
            return kept
        if self.selector is Selector.SWA:
            return min(cached_tokens, kept + self.history_steps(cached_tokens))
        return cached_tokens

    def state_bytes_per_token(self, model: ModelSpec, dtype: DType) -> float:
        """Selection state for each cached token, one sequence, one layer (digests, keys of all tokens, 0 for the others)."""
        if self.selector is Selector.PAGES:  # a minimum and a maximum of each key channel for a page
            return 2 * model.kv_dim * dtype.size_bytes / PAGE_TOKENS
        return 0.0

    def offloaded_state_bytes_per_token(self, model: ModelSpec, dtype: DType) -> float:
        """State that stays in HBM for a token whose KV does not: exact top-k must score every key."""
        return float(model.kv_dim * dtype.size_bytes) if self.selector is Selector.TOPK else 0.0

    def state_bytes(self, cached_tokens: int, dtype: DType) -> int:
        """Selection state that depends on the kept tokens, one sequence, one layer.

        SWA keeps the weights of the last k queries over the kept tokens (heads summed); H2O one running sum a token.
        """
        kept = self.kept_tokens(cached_tokens)
        if self.selector is Selector.SWA:
            return self.history_steps(cached_tokens) * kept * dtype.size_bytes
        return 4 * kept if self.selector is Selector.H2O else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Per step, of one sequence: tokens cached, newest kept, older selected, and those that can never be attended again."""

    cached: tuple[int, ...]
    local: tuple[int, ...]
    selected: tuple[int, ...]
    dead: tuple[int, ...]


def count_tokens(attention: Attention, prompt_tokens: int, steps: int, *, drop_dead: bool = True) -> TokenCounts:
    """Counts at steps 0 (end of prefill) to ``steps`` - 1, with ``prompt_tokens`` + step tokens cached.

    What has been dropped stays dropped, so the living grow by no more than the newborn token.
    """
    cached = tuple(range(prompt_tokens, prompt_tokens + steps))
    never_dead = (0,) * steps
    dead = tuple(accumulate((n - attention.living_tokens(n) for n in cached), max)) if drop_dead else never_dead
    local = tuple(min(attention.local_tokens(n), n - gone) for n, gone in zip(cached, dead, strict=True))
    selected = tuple(
        min(attention.global_tokens(n), n - gone - near) for n, gone, near in zip(cached, dead, local, strict=True)
    )
    return TokenCounts(cached=cached, local=local, selected=selected, dead=dead)


def _round_half_up(value: float) -> int:
    return floor(value + 0.5 + 1e-9)  # the margin undoes 0.2 * 5 * 0.5 = 0.49999…

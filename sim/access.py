"""How a selector's picks behave over time: how many are new at each step, how old they are, what accuracy they cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import log

from sim.attention import Selector
from sim.checks import require_share, require_whole
from sim.codec import IF_KNOWN

_MEASURED_ON = "91M-parameter decoder, Python text, 376 steps after a prompt of 1,024, 2026-11-24"
_RETURNED_SHARE = 0.01  # under SWA, 99 runs on an H200 with random weights, 2026-11-29: 0.00 to 0.011


EARLY_STEPS = 32
AGES = 8  # equal shares of the living older tokens, by age, on which picks are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingAges:
    """Of the picks that a selector makes among living older tokens, the shares on the oldest eighth, the oldest two, up to
    seven: in the ``first`` decode step, and ``later``.

    Where the unattended die, hardly more lives than is picked: of the prompt what is picked, of what came since all; ``later``
    is when as many steps have passed as the newest tokens that are kept. Where any token may return ``later`` is of new picks.
    """

    first: tuple[float, ...]
    later: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("first", "later"):
            shares: tuple[float, ...] = getattr(self, name)
            if len(shares) != AGES - 1 or list(shares) != sorted(shares) or not 0 <= shares[0] <= shares[-1] <= 1:
                raise ValueError(f"access.living_ages.{name}={shares}, must be {AGES - 1} ascending shares in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessProfile:
    """Turnover is the share of a step's *selected older* tokens that the step before did not attend to. Where it falls as a text
    goes on ``early_turnovers`` are those of decode steps up to ``EARLY_STEPS``, ``turnovers`` later ones; None: all alike.

    ``keep_shares`` ascend; values between are interpolated, values outside take the nearest.
    ``age_shares`` maps the oldest share x of the older tokens to the share of picks that fall on them, as
    (x, picks) corners from (0, 0) to (1, 1); the straight line, picks of every age alike, is assumed unless measured.
    ``returned_share`` is of new picks where the least wanted leave HBM (``sim.capture.evicts_least_wanted``): those that
    come from outside it, relative to what picks of all tokens alike would bring; None: not measured.
    ``living_ages``, one for each of ``keep_shares``, are of picks where the unattended die, of new ones where any token may
    return; None: not looked at, of every age alike among the living, or as ``age_shares`` says.
    ``model`` is the catalogue's name of the one that it holds for, None where it stands for any; so are ``tokens``, the cached
    ones of a sequence in the middle of the run that was looked at.
    """

    selector: Selector
    keep_shares: tuple[float, ...]
    turnovers: tuple[float, ...]
    perplexity_ratios: tuple[float, ...]
    age_shares: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 1.0))
    returned_share: float | None = field(default=None, metadata=IF_KNOWN)
    living_ages: tuple[LivingAges, ...] | None = field(default=None, metadata=IF_KNOWN)
    early_turnovers: tuple[float, ...] | None = field(default=None, metadata=IF_KNOWN)
    source: str
    model: str | None = None
    tokens: int | None = field(default=None, metadata=IF_KNOWN)

    def __post_init__(self) -> None:
        if not len(self.keep_shares) == len(self.turnovers) == len(self.perplexity_ratios) >= 1:
            raise ValueError(
                f"access.keep_shares={self.keep_shares}, needs one turnover and one perplexity ratio for each"
            )
        if list(self.keep_shares) != sorted(set(self.keep_shares)):
            raise ValueError(f"access.keep_shares={self.keep_shares}, must ascend")
        for share in (*self.keep_shares, *self.turnovers, *(self.early_turnovers or ())):
            require_share("access share", share)
        if self.returned_share is not None:
            require_share("access.returned_share", self.returned_share)
        _check_corners(self.age_shares)
        for name in ("living_ages", "early_turnovers"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.keep_shares):
                raise ValueError(
                    f"access.{name}, {len(found)} entries, needs one for each of {len(self.keep_shares)} keep shares"
                )
        if self.tokens is not None:
            require_whole("access.tokens", self.tokens)

    def turnover(self, keep_share: float) -> float:
        """Once a text has gone on for some time."""
        return _interpolate(self.keep_shares, self.turnovers, keep_share)

    def early_turnover(self, keep_share: float) -> float:
        """At first."""
        return _interpolate(self.keep_shares, self.early_turnovers or self.turnovers, keep_share)

    def ages_at(self, keep_share: float) -> LivingAges | None:
        """Between the two nearest keep shares that were measured."""
        if self.living_ages is None:
            return None
        first, later = zip(*((ages.first, ages.later) for ages in self.living_ages), strict=True)

        def between(measured: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
            return _ascending(
                _interpolate(self.keep_shares, shares, keep_share) for shares in zip(*measured, strict=True)
            )

        return LivingAges(first=between(first), later=between(later))

    def perplexity_ratio(self, keep_share: float) -> float:
        """Perplexity relative to dense attention, as measured; 1.0 at keep share 1."""
        return _interpolate((*self.keep_shares, 1.0), (*self.perplexity_ratios, 1.0), keep_share)

    def picks_among_oldest(self, oldest_share: float) -> float:
        """Share of the picks that fall on the oldest ``oldest_share`` of the older tokens."""
        xs, ys = zip(*self.age_shares, strict=True)
        return _interpolate(xs, ys, oldest_share)

    @property
    def returning(self) -> float:
        """``returned_share``; where it is not measured, an H200's under SWA, and 1, as many as of all alike, elsewhere."""
        if self.returned_share is not None:
            return self.returned_share
        return _RETURNED_SHARE if self.selector is Selector.SWA else 1.0

    @property
    def picks_every_age_alike(self) -> bool:
        return all(x == y for x, y in self.age_shares)


def at_tokens(found: Sequence[AccessProfile], tokens: int) -> AccessProfile:
    """Of what was found of one selector and model: between the two over the nearest numbers of ``tokens``, by logarithms; the
    first one where those are not known.
    """
    known = {one.tokens: one for one in reversed(found) if one.tokens is not None}
    if not known:
        return found[0]
    for few, many in pairwise(sorted(known)):
        if tokens < many:
            return _between(known[few], known[many], log(max(1.0, tokens / few)) / log(many / few))
    return known[max(known)]


def _between(fewer: AccessProfile, more: AccessProfile, way: float) -> AccessProfile:
    """``way`` of the way from the one to the other, at the keep shares of the first."""
    if way == 0:
        return fewer

    def mixed(some: Iterable[float], others: Iterable[float]) -> tuple[float, ...]:
        return tuple(a + (b - a) * way for a, b in zip(some, others, strict=True))

    def ages(share: float) -> LivingAges | None:
        a, b = fewer.ages_at(share), more.ages_at(share)
        if a is None or b is None:
            return None
        return LivingAges(first=_ascending(mixed(a.first, b.first)), later=_ascending(mixed(a.later, b.later)))

    living = tuple(one for one in map(ages, fewer.keep_shares) if one is not None)
    early = mixed(map(fewer.early_turnover, fewer.keep_shares), map(more.early_turnover, fewer.keep_shares))
    corners = sorted({at for at, _ in (*fewer.age_shares, *more.age_shares)})
    picks = _ascending(mixed(map(fewer.picks_among_oldest, corners), map(more.picks_among_oldest, corners)))
    return replace(
        fewer,
        turnovers=mixed(fewer.turnovers, map(more.turnover, fewer.keep_shares)),
        age_shares=tuple(zip(corners, picks, strict=True)),
        living_ages=living or None,
        early_turnovers=early if fewer.early_turnovers or more.early_turnovers else None,
        source=f"{fewer.source}; {way:.0%} of the way to: {more.source}",
        tokens=None,
    )


# selector: keep shares, turnovers, perplexity ratios to dense, as measured
_MEASURED: dict[Selector, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    Selector.DENSE: ((1.0,), (0.0,), (1.0,)),
    Selector.LOCAL: ((0.05, 0.10, 0.20), (0.0, 0.0, 0.0), (1.653, 1.391, 1.198)),
    Selector.STRIDED: ((0.05, 0.10, 0.20), (0.0, 0.0, 0.0), (100.0, 86.0, 55.0)),
    Selector.SWA: ((0.05, 0.10, 0.20), (0.0040, 0.0028, 0.0006), (1.566, 1.348, 1.190)),
    Selector.H2O: ((0.05, 0.10, 0.20), (0.0022, 0.0020, 0.0), (1.994, 1.498, 1.274)),
    Selector.PAGES: ((0.05, 0.10, 0.20), (0.29, 0.26, 0.22), (1.240, 1.101, 1.037)),
    Selector.TOPK: ((0.05, 0.10, 0.20), (0.33, 0.32, 0.29), (1.042, 1.020, 1.009)),
}


def measured_access(selector: Selector) -> AccessProfile:
    """The default profile of ``selector``: one model on one domain, so measure on yours before trusting the last percent."""
    keep, turnover, perplexity = _MEASURED[selector]
    return AccessProfile(
        selector=selector, keep_shares=keep, turnovers=turnover, perplexity_ratios=perplexity, source=_MEASURED_ON
    )


def parametric_access(selector: Selector, turnover: float) -> AccessProfile:
    """Picks of every age alike of which ``turnover`` are new at each step: no measurement, to see what a plan can bear."""
    measured = measured_access(selector)
    return AccessProfile(
        selector=selector,
        keep_shares=measured.keep_shares,
        turnovers=(turnover,) * len(measured.keep_shares),
        perplexity_ratios=measured.perplexity_ratios,
        source=f"assumed: {turnover:g} of the picks new at every step; perplexity: {measured.source}",
    )


def _check_corners(corners: tuple[tuple[float, float], ...]) -> None:
    ascending = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(corners))
    if len(corners) < 2 or corners[0] != (0, 0) or corners[-1] != (1, 1) or not ascending:
        raise ValueError(f"access.age_shares={corners}, must ascend from (0, 0) to (1, 1)")


def _ascending(shares: Iterable[float]) -> tuple[float, ...]:
    """Without what rounding takes off: no share falls below the one before, or passes 1."""
    return tuple(min(1.0, share) for share in accumulate(shares, max))


def _interpolate(xs: tuple[float, ...], ys: tuple[float, ...], x: float) -> float:
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0))  # never beyond either, rounded as it is
    return ys[-1]

"""Which slot each token has and what crosses the link, row by row: known before a run that attends to every token.

HBM is one block. Slots fill it from the front and are always the first ones, as many as the row has tokens there; staging
ends at its end. A *layout* of the staging holds for as many rows as it can.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sim.capture import forwarded_tokens
from sim.plan import Plan, WriteBack


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Tokens for which the staging has room: recomputed ones, and those fetched as keys and values."""

    recomputed: int
    fetched: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Elements that a token takes: in a slot (all layers); staged, of one layer, as keys and values that the host has, as
    those that are computed again, or as layer input.
    """

    slot: int
    kv: int
    again: int
    inputs: int
    buffers: int  # of the ring of fetched layers

    def staged(self, layout: Layout) -> int:
        """Elements of all staging; what is fetched lies in a ring, what is projected does not."""
        recomputed = layout.recomputed * (self.again + self.buffers * self.inputs)
        return recomputed + layout.fetched * self.buffers * self.kv


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One decode step. The oldest tokens are ``recomputed``, from inputs or from token ids, the next ones ``fetched``, the
    others are in HBM.

    ``positions`` says which token each slot holds, the newborn one in slot ``newborn``; ``moves`` between slots
    (from, to) come first. ``written`` (position, slot) go to the host once a layer has attended.
    """

    recomputed: int
    fetched: int
    positions: tuple[int, ...]
    newborn: int
    moves: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """``rows`` from the first decode step on, under row number 1; ``elements`` of the block are what a lane needs at most.

    The host keeps keys and values of positions from ``kept_from`` to before ``kept_to``.
    """

    rows: dict[int, Row]
    elements: int
    kept_from: int
    kept_to: int


def schedule_of(plan: Plan, widths: Widths, *, rounded: bool = False) -> Schedule:
    """``rounded``: as many tokens are staged as a graph forwards, and where they lie follows from that number alone."""
    homes, steps = plan.homes, range(1, plan.homes.steps)
    needs = [Layout(recomputed=_recomputed(plan, row), fetched=homes.host_kv[row]) for row in range(homes.steps)]
    if rounded:
        prompt = plan.setting.workload.prompt_tokens
        needs = [Layout(recomputed=forwarded_tokens(need.recomputed, prompt), fetched=0) for need in needs]
    occupied = [homes.hbm[row] * widths.slot + widths.staged(needs[row]) for row in steps]
    elements = max([homes.hbm[0] * widths.slot, *occupied])
    layouts = needs if rounded else list(_layouts(homes.hbm, needs, widths, elements))
    kept_from, kept_to = _kept(plan)
    rows, at = {}, {position: slot for slot, position in enumerate(range(_off_hbm(plan, 0), _cached(plan, 0)))}
    for row in steps:
        at, moves = _settled(plan, row, at)
        rows[row] = Row(
            recomputed=_recomputed(plan, row),
            fetched=homes.host_kv[row],
            positions=tuple(sorted(at, key=at.__getitem__)),
            newborn=at[_cached(plan, row) - 1],
            moves=moves,
            written=tuple((position, at[position]) for position in _leaving(plan, row)),
            layout=layouts[row],
        )
    return Schedule(rows=rows, elements=elements, kept_from=kept_from, kept_to=kept_to)


def _settled(plan: Plan, row: int, at: dict[int, int]) -> tuple[dict[int, int], tuple[tuple[int, int], ...]]:
    """Slots of ``row``: the first ones. Tokens in others move to where one has left, the newborn takes the last that is free."""
    slots = plan.homes.hbm[row]
    staying = {position: slot for position, slot in at.items() if position >= _off_hbm(plan, row)}
    free = sorted(set(range(slots)) - set(staying.values()))
    moves = []
    for position, slot in staying.items():
        if slot >= slots:
            staying[position] = free.pop(0)
            moves.append((slot, staying[position]))
    return staying | {_cached(plan, row) - 1: free.pop(0)}, tuple(moves)


def _leaving(plan: Plan, row: int) -> range:
    """Positions whose keys and values go to the host during ``row``."""
    if plan.setting.write_back is WriteBack.AT_BIRTH:
        return range(_cached(plan, row) - 1, _cached(plan, row))
    if row + 1 == plan.homes.steps:
        return range(0)
    return range(max(_off_hbm(plan, row), _recomputed(plan, row + 1)), _off_hbm(plan, row + 1))


def _kept(plan: Plan) -> tuple[int, int]:
    if plan.setting.write_back is WriteBack.AT_BIRTH:
        return _recomputed(plan, 0), plan.setting.token_counts.cached[-1]
    rows = [row for row in range(1, plan.homes.steps) if plan.homes.host_kv[row]]
    first = min((_recomputed(plan, row) for row in rows), default=0)
    return first, max((_off_hbm(plan, row) for row in rows), default=0)


def _layouts(hbm: tuple[int, ...], needs: list[Layout], widths: Widths, elements: int) -> Iterator[Layout]:
    """A row's layout each; the first row, the prefill, stages nothing."""
    first, none = 1, Layout(recomputed=0, fetched=0)
    yield none
    while first < len(hbm):
        last, layout, slots = first, none, 0
        for row in range(first, len(hbm)):
            wider = Layout(
                recomputed=max(layout.recomputed, needs[row].recomputed),
                fetched=max(layout.fetched, needs[row].fetched),
            )
            slots = max(slots, hbm[row])
            if slots * widths.slot + widths.staged(wider) > elements:
                break
            last, layout = row, wider
        yield from [layout] * (last + 1 - first)
        first = last + 1


def _off_hbm(plan: Plan, row: int) -> int:
    return _recomputed(plan, row) + plan.homes.host_kv[row]


def _recomputed(plan: Plan, row: int) -> int:
    """Under dense attention none is dead: what is dropped is forwarded."""
    return plan.homes.activations[row] + plan.homes.dropped[row]


def _cached(plan: Plan, row: int) -> int:
    return plan.setting.token_counts.cached[row]
